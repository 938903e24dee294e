"""Held-out text through a model in slots, a token at a time or as prompts: every variant sees the same routing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from subjects import Subject
from timing import settle

import promoe_triton
from promoe_triton.counters import Ahead, Stats


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What so many steps took, in seconds, and what was counted meanwhile."""

    steps: int
    seconds: float
    before: Stats
    after: Stats

    @property
    def per_step(self) -> float:
        return self.seconds / self.steps

    def counted(self, name: str) -> float:
        """Return by how much a statistic has grown."""
        return float(getattr(self.after, name)) - float(getattr(self.before, name))

    @property
    def hit_ratio(self) -> float:
        return self.counted("hits") / (self.counted("hits") + self.counted("misses"))

    @property
    def ahead(self) -> Ahead:
        """What prefetching did meanwhile."""
        before, after = self.before.ahead, self.after.ahead
        return Ahead(**{name: getattr(after, name) - getattr(before, name) for name in Ahead.__slots__})

    @property
    def wasted_share(self) -> float:
        """Bytes that were copied ahead for nothing, of all that were moved."""
        return self.ahead.bytes_wasted / max(self.counted("bytes_read"), 1.0)


def timed(model: Any, steps: int, action: Callable[[], object]) -> Run:
    settle(model.device)
    before = promoe_triton.stats(model)
    began = time.perf_counter()
    action()
    settle(model.device)
    seconds = time.perf_counter() - began
    return Run(steps=steps, seconds=seconds, before=before, after=promoe_triton.stats(model))


class Decoder:
    """Texts of equal length side by side, decoded as they stand. greedy: what each step would have gone on with."""

    def __init__(self, model: Any, ids: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._columns = iter(torch.tensor(ids, device=model.device).T.contiguous()[:, :, None])
        self._cache: Any = None
        self.greedy: list[torch.Tensor] = []

    @torch.inference_mode()
    def step(self, tokens: int) -> None:
        for _ in range(tokens):
            out = self._model(next(self._columns), past_key_values=self._cache, use_cache=True)
            self._cache = out.past_key_values
            self.greedy.append(out.logits[:, -1].argmax(-1))


def decode(subject: Subject, options: Mapping[str, Any], ids: Sequence[Sequence[int]], warm_up: int) -> Run:
    """Open a model, decode texts side by side, and time all but the first `warm_up` tokens of each."""
    with subject.opened(options) as model:
        decoder, tokens = Decoder(model, ids), len(ids[0]) - warm_up
        decoder.step(warm_up)
        return timed(model, tokens, lambda: decoder.step(tokens))


def decode_in_turns(
    subject: Subject,
    variants: Mapping[str, Mapping[str, Any]],
    ids: Sequence[Sequence[int]],
    warm_up: int,
    turn: int,
) -> dict[str, Run]:
    """Open a model for each of some options at once, and let them decode the same texts by turns of a few tokens.

    So whatever else goes on in a shared machine, which may change within seconds, meets all of them alike. The tokens
    after `warm_up` are whole turns. For a subject that can be opened more than once.
    """
    turns, rest = divmod(len(ids[0]) - warm_up, turn)
    assert turns, "a turn at least"
    assert not rest, "whole turns"
    with contextlib.ExitStack() as stack:
        models = {name: stack.enter_context(subject.opened(options)) for name, options in variants.items()}
        decoders = {name: Decoder(model, ids) for name, model in models.items()}
        for decoder in decoders.values():
            decoder.step(warm_up)
        runs: dict[str, list[Run]] = {name: [] for name in models}
        order = [*models]
        for _ in range(turns):
            for name in order:
                runs[name].append(timed(models[name], turn, lambda name=name: decoders[name].step(turn)))  # type: ignore[misc]
                wait_for_copies(models[name])
            order.reverse()
    return {name: joined(found) for name, found in runs.items()}


def wait_for_copies(model: Any) -> None:
    """Return when nothing has been copied for a while, so that no turn pays for what the one before has ordered."""
    before, now = -1, 0
    while before != now:
        before, now = now, promoe_triton.stats(model).bytes_read
        time.sleep(0.03)


def joined(runs: Sequence[Run]) -> Run:
    """Return turns of one model as one run."""
    steps, seconds = sum(run.steps for run in runs), sum(run.seconds for run in runs)
    return Run(steps=steps, seconds=seconds, before=runs[0].before, after=runs[-1].after)


@torch.inference_mode()
def prefill(
    subject: Subject, options: Mapping[str, Any], earlier: Sequence[int], prompt: Sequence[int]
) -> tuple[Run, Run]:
    """Open a model and time a first prompt, and one after it."""
    with subject.opened(options) as model:
        texts = [torch.tensor([ids], device=model.device) for ids in (earlier, prompt)]
        first, second = (timed(model, 1, lambda text=text: model(text)) for text in texts)  # type: ignore[misc]
        return first, second
