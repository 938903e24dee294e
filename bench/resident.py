"""Speed with everything resident: the patched model against transformers' own three ways to run experts.

All four run the same weights (one copy in memory) in one process and take turns. Before anything is timed the
patched model's logits must equal grouped_mm's bit for bit. `ours / best` divides, repeat by repeat, by the
implementation with the best median.
"""

from __future__ import annotations

import statistics
from typing import Any

import record
import torch
from models import Shape, random_model, sharing_weights
from timing import ratios, seconds, take_turns
from torch import Tensor

import promoe_triton

SHAPES = (
    Shape(experts=32, active=4, width=1024),
    Shape(experts=128, active=8, width=256, dtype=torch.float32),
    Shape(experts=128, active=8, width=256),
)
QUICK_SHAPES = tuple(Shape(experts=s.experts, active=s.active, width=s.width, dtype=s.dtype, layers=2) for s in SHAPES)
TARGETS = {"decode batch 1": 1.25, "decode batch 8": 0.95, "prefill 256": 1.0}
REPEATS = {"decode batch 1": 101, "decode batch 8": 51, "prefill 256": 31}
STOCK = ("eager", "batched_mm", "grouped_mm")
OURS = "promoe_triton"
TOO_SLOW = 6.0
"""A stock implementation this many times slower than the fastest of them is not the best: a few passes will do."""


class Decode:
    """Greedy decoding that goes on from call to call, a few steps at a time, and begins anew when it is long."""

    LONGEST = 96

    def __init__(self, model: Any, prompt_BT: Tensor, steps: int) -> None:
        self._model, self._prompt_BT, self._steps = model, prompt_BT, steps
        self._begin()

    def _begin(self) -> None:
        out = self._model(self._prompt_BT, use_cache=True)
        self._cache, self._token_B1 = out.past_key_values, out.logits[:, -1:].argmax(-1)
        self._done = 0

    def step(self) -> Tensor:
        logits: Tensor = self._model(self._token_B1, past_key_values=self._cache, use_cache=True).logits
        self._token_B1 = logits[:, -1:].argmax(-1)
        return logits

    def __call__(self) -> float:
        """Return tokens per second of the next steps."""
        if self._done + self._steps > self.LONGEST:
            self._begin()
        self._done += self._steps
        taken = seconds(lambda: [self.step() for _ in range(self._steps)])
        return self._prompt_BT.shape[0] * self._steps / taken


class Prefill:
    """A whole prompt at once."""

    def __init__(self, model: Any, prompt_BT: Tensor, steps: int) -> None:
        self._model, self._prompt_BT = model, prompt_BT

    def step(self) -> Tensor:
        logits: Tensor = self._model(self._prompt_BT, use_cache=True).logits
        return logits

    def __call__(self) -> float:
        """Return tokens per second."""
        return self._prompt_BT.numel() / seconds(self.step)


def compare(case: str, metric: str, models: dict[str, Any], repeats: int) -> list[record.Row]:
    kind, batch, length, steps = METRICS[metric]
    prompt_BT = torch.randint(2048, (batch, length), generator=torch.Generator().manual_seed(1))
    runs = {name: kind(model, prompt_BT, steps) for name, model in models.items()}
    if not all(torch.equal(runs["grouped_mm"].step(), runs[OURS].step()) for _ in range(4)):
        raise SystemExit(f"{case}, {metric}: logits differ from grouped_mm's; nothing is timed until they are equal")
    first = take_turns(runs, 2)
    fastest = max(max(first[name]) for name in STOCK)
    slow = [name for name in STOCK if max(first[name]) * TOO_SLOW < fastest]
    taken = take_turns({name: run for name, run in runs.items() if name not in slow}, repeats)
    best = max((name for name in STOCK if name not in slow), key=lambda name: statistics.median(taken[name]))
    if slow:
        taken |= take_turns({name: runs[name] for name in slow}, 3)
    rows = [record.row(case, name, metric, "tokens/s", taken[name]) for name in models]
    shares = ratios(taken[OURS], taken[best])
    rows.append(record.row(case, "ours / best", metric, "x", shares, target=TARGETS[metric], note=f"best: {best}"))
    return rows


METRICS: dict[str, tuple[type[Decode] | type[Prefill], int, int, int]] = {
    "decode batch 1": (Decode, 1, 16, 4),
    "decode batch 8": (Decode, 8, 16, 4),
    "prefill 256": (Prefill, 1, 256, 1),
}
"""How each is measured: by what, batch, length of the prompt, steps in one turn."""


@torch.inference_mode()
def main() -> None:
    args = record.arguments(__doc__ or "").parse_args()
    record.confine()
    results = record.results(args, "resident")
    for shape in QUICK_SHAPES if args.quick else SHAPES:
        case = str(shape)
        missing = [metric for metric in TARGETS if not results.has(case, metric)]
        if not missing:
            continue
        stock = random_model(shape)
        models: dict[str, Any] = {name: sharing_weights(stock) for name in (*STOCK, OURS)}
        for name in STOCK:
            models[name].set_experts_implementation(name)
        promoe_triton.patch(models[OURS])
        for metric in missing:
            results.begin()
            results.write(compare(case, metric, models, repeats=9 if args.quick else REPEATS[metric]))


if __name__ == "__main__":
    main()
