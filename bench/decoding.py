"""Decoding held-out text from slots, token by token as it stands: every variant sees the same routing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import promoe_triton
from promoe_triton.counters import Stats


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What so many tokens took. seconds: all of them together; stats: what was counted meanwhile."""

    tokens: int
    seconds: float
    before: Stats
    after: Stats

    @property
    def per_token(self) -> float:
        return self.seconds / self.tokens

    def counted(self, name: str) -> float:
        """Return by how much a statistic has grown."""
        return float(getattr(self.after, name)) - float(getattr(self.before, name))

    @property
    def hit_ratio(self) -> float:
        hits, misses = self.counted("hits"), self.counted("misses")
        return hits / (hits + misses)


def load(folder: Path, options: Mapping[str, Any]) -> Any:
    """Return the model in slots, read past the page cache."""
    return promoe_triton.from_pretrained(str(folder), **{"io": "direct"} | dict(options))


@torch.inference_mode()
def decode(model: Any, ids: Sequence[Sequence[int]], warm_up: int) -> Run:
    """Decode texts side by side, a token of each at a time; the first `warm_up` tokens are not timed."""
    cache, columns = None, torch.tensor(ids).T.contiguous()
    before = promoe_triton.stats(model)
    began = time.perf_counter()
    for place, column in enumerate(columns):
        if place == warm_up:
            before = promoe_triton.stats(model)
            began = time.perf_counter()
        cache = model(column[:, None], past_key_values=cache, use_cache=True).past_key_values
    seconds = time.perf_counter() - began
    return Run(tokens=len(columns) - warm_up, seconds=seconds, before=before, after=promoe_triton.stats(model))
