"""What stock transformers says: its greedy tokens, from a second process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from promoe_triton.errors import PromoeError

SCRIPT = Path(__file__).with_name("stock.py")
TIMEOUT = 1800.0
"""Seconds after which the second process is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StockRun:
    """Greedy tokens of stock transformers. prompt_ids, ids: the prompt's tokens and those that follow them."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    torch: str
    transformers: str

    def difference(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str | None:
        """Say where other tokens differ from these; None where they are the same."""
        if tuple(prompt_ids) != self.prompt_ids:
            return (
                f"the prompt has {len(prompt_ids)} tokens here and {len(self.prompt_ids)} others in stock transformers"
            )
        for place, (ours, theirs) in enumerate(zip(ids, self.ids, strict=False)):
            if ours != theirs:
                return f"new token {place + 1} of {len(self.ids)} is {ours}, stock transformers has {theirs}"
        if len(ids) != len(self.ids):
            return f"{len(ids)} new tokens instead of the {len(self.ids)} of stock transformers"
        return None


def stock_run(model: Path, prompt: str, max_new_tokens: int, script: Path = SCRIPT) -> StockRun:
    """Run stock transformers greedily in a second process, with as many threads as this one.

    Raises PromoeError, with the process's last words, where it fails or takes too long.
    """
    request = {
        "model": str(model),
        "prompt": prompt,
        "max_new_tokens": max_new_tokens,
        "threads": torch.get_num_threads(),
    }
    # -P: the script's folder stays off the path, so that nothing there shadows a module of the same name.
    command = [sys.executable, "-P", str(script)]
    try:
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise PromoeError(f"the process running stock transformers has not ended in {TIMEOUT:g} s") from error
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["no message"]
        raise PromoeError(f"the process running stock transformers ended with code {done.returncode}: {words[-1]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if answer["imported"]:
        raise PromoeError(f"the process running stock transformers imported {', '.join(answer['imported'])}")
    return StockRun(prompt_ids=tuple(answer["prompt_ids"]), ids=tuple(answer["ids"]), **answer["versions"])
