"""Layers of exactly the shapes of real models, with random weights, under recorded routing: kernels and link alone.

Nothing predicts here, as nothing could: what real weights would be asked for is not known. The routing is the demo
model's on held-out text, layer for layer; where a real layer has more experts, several recorded layers stand side by
side in it, each with its share of the experts that a token chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import record
import torch
from decoding import Run, timed
from models import MODEL, Shape, prompts, random_model
from proactive import NO_PREDICTION, options, speedup
from subjects import InMemory, Subject
from timing import take_turns
from torch import Tensor
from transformers import AutoModelForCausalLM

from promoe_triton.kernels.shapes import LayerShape
from promoe_triton.patch._swap import find_experts

LAYERS = 8
RECORDED_EXPERTS = 64
"""Layers and experts of the demo model."""
RESIDENT = "resident"
VARIANTS = ("lru", NO_PREDICTION, RESIDENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """What each layer of a model was asked for, token by token: ids and weights [T, A], the largest weight first."""

    ids: Sequence[Tensor]
    weights: Sequence[Tensor]

    def among(self, experts: int, active: int) -> Routing:
        """Return the routing of layers of so many experts, `active` for each token; their weights add up to 1."""
        copies = experts // RECORDED_EXPERTS
        each = active // copies
        assert (copies * RECORDED_EXPERTS, copies * each) == (experts, active)
        layers = [(i[:, :each], w[:, :each].float()) for i, w in zip(self.ids, self.weights, strict=True)]
        beside = [[layers[(i + 3 * c) % len(layers)] for c in range(copies)] for i in range(len(layers))]
        ids = [torch.cat([ids + c * RECORDED_EXPERTS for c, (ids, _) in enumerate(parts)], 1) for parts in beside]
        weights = [torch.cat([weights for _, weights in parts], 1) for parts in beside]
        return Routing(ids=ids, weights=[w / w.sum(1, keepdim=True) for w in weights])


@cache
@torch.inference_mode()
def recorded(text: int, tokens: int) -> Routing:
    """Return the demo model's routing of `tokens` tokens, from another place of the text for every number `text`."""
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").eval()
    seen: list[tuple[Tensor, Tensor]] = []
    for path in find_experts(model):
        module = model.get_submodule(path)
        module.register_forward_pre_hook(lambda _, args: seen.append((args[1].clone(), args[2].clone())))
    model(torch.tensor([prompts(MODEL, 8, tokens)[text % 8]]))
    order = [weights.argsort(1, descending=True) for _, weights in seen]
    return Routing(
        ids=[ids.gather(1, by) for (ids, _), by in zip(seen, order, strict=True)],
        weights=[weights.gather(1, by) for (_, weights), by in zip(seen, order, strict=True)],
    )


def subject_of(shape: LayerShape, device: torch.device, layers: int = LAYERS) -> InMemory:
    """Return a model with such layers in the host's memory; all else in it is small, and not called."""
    made = Shape(experts=shape.E, active=shape.A, width=shape.F, hidden=shape.D, layers=layers, vocabulary=64)
    return InMemory(random_model(made), device)


class Layers:
    """The patched layers of a model, called one after the other with what was recorded, T tokens at a time."""

    def __init__(self, model: Any, routing: Routing, T: int) -> None:
        self._modules = [module for module in model.modules() if hasattr(module, "_promoe")]
        dtype, device = next(model.parameters()).dtype, model.device
        generator = torch.Generator().manual_seed(0)
        D = model.config.hidden_size
        self._x_TD = torch.randn(T, D, generator=generator).to(device, dtype)
        calls = [
            list(zip(ids.to(device).split(T), weights.to(device, dtype).split(T), strict=True))
            for ids, weights in zip(routing.ids, routing.weights, strict=True)
        ]
        self._steps = iter([[layer[i] for layer in calls] for i in range(len(calls[0]))])

    @torch.inference_mode()
    def step(self, count: int) -> None:
        for _ in range(count):
            for module, (ids_TA, weights_TA) in zip(self._modules, next(self._steps), strict=False):
                module(self._x_TD, ids_TA, weights_TA)


def case_of(shape: str, T: int, share: float) -> str:
    return f"{shape}, T {T}, {share:.1%} in slots"


def measure(
    subject: Subject,
    results: record.Results,
    shape: LayerShape,
    T: int,
    share: float,
    repeats: int,
    steps: int,
    **common: Any,
) -> None:
    """Time passes through all layers: T tokens each, `steps` of them after half as many that are not timed."""
    case = case_of(shape.name, T, share)
    if results.has(case):
        return
    results.begin()
    slots = round(subject.experts * share)
    runs: dict[str, list[Run]] = {variant: [] for variant in VARIANTS}

    def run(variant: str) -> float:
        chosen = {"slots": 1.0} if variant == RESIDENT else common | {"slots": slots} | options(variant)
        warm_up = max(steps // 2, 1)
        routing = recorded(len(runs[variant]), T * (warm_up + steps)).among(shape.E, shape.A)
        with subject.opened(chosen) as model:
            layers = Layers(model, routing, T)
            layers.step(warm_up)
            runs[variant].append(timed(model, steps, lambda: layers.step(steps)))
        return runs[variant][-1].per_step

    take_turns({variant: lambda variant=variant: run(variant) for variant in VARIANTS}, repeats)  # type: ignore[misc]
    rows = []
    for variant, found in runs.items():
        rows.append(record.row(case, variant, "time", "ms/pass", [r.per_step * 1e3 for r in found], better="lower"))
        if variant != RESIDENT:
            moved = [r.counted("bytes_read") / r.steps / 1e6 for r in found]
            rate = [r.counted("bytes_read") / max(r.counted("link_seconds"), 1e-9) / 1e9 for r in found]
            rows += [
                record.row(case, variant, "hits", "share", [r.hit_ratio for r in found]),
                record.row(case, variant, "moved", "MB/pass", moved, better="lower"),
                record.row(case, variant, "bandwidth", "GB/s", rate),
                record.row(case, variant, "link", "ms/pass", [m / b for m, b in zip(moved, rate, strict=True)]),
            ]
    results.write([*rows, speedup(case, runs, NO_PREDICTION, "lru", 1.0)])
