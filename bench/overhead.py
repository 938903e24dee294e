"""What a layer costs beside its matrix products, everything resident, one token: microseconds per layer per step.

The products alone are a bare loop of the same products (torch.mv, or torch.bmm over parts of fp32 weights) over
views prepared beforehand, for as many experts of the same layers. Layer and loop take turns, call by call, each
with freshly drawn experts, so that neither finds its weights in the cache. The stages are timed in further calls;
`up` and `down` are given less their products.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import record
import torch
from models import Shape, random_model
from timing import seconds, take_turns
from torch import Tensor

import promoe_triton
from promoe_triton.backends.torch import products, row_operand, row_parts, rows_in, rows_out

SHAPES = (
    Shape(experts=128, active=8, width=256),
    Shape(experts=32, active=4, width=1024),
    Shape(experts=128, active=8, width=256, dtype=torch.float32),
    Shape(experts=128, active=8, width=16),
)
TARGET_US = 60.0
STAGES = ("begin", "up", "activate", "down", "combine")
BATCHES = 25


class Draws:
    """Calls of layers with one token each: the same sequence of experts for whoever asks with the same seed."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self._random = random.Random(seed)
        self._shape = shape
        self.x_TD = torch.randn(1, shape.hidden).to(shape.dtype)
        self.weights_TA = torch.full((1, shape.active), 1 / shape.active, dtype=shape.dtype)

    def next(self) -> tuple[int, list[int]]:
        layer = self._random.randrange(self._shape.layers)
        return layer, self._random.sample(range(self._shape.experts), self._shape.active)


class Products:
    """The matrix products of one token through one layer, done the product's way, and nothing else."""

    def __init__(self, modules: Sequence[Any], shape: Shape) -> None:
        first = modules[0]
        self._up_parts, self._down_parts = (row_parts(w[0].detach()) for w in (first.gate_up_proj, first.down_proj))
        self._up = [[row_operand(w, self._up_parts) for w in m.gate_up_proj.detach()] for m in modules]
        self._down = [[row_operand(w, self._down_parts) for w in m.down_proj.detach()] for m in modules]
        dtype = shape.dtype
        self._up_rows = rows_out(torch.empty(shape.active, 2 * shape.width, dtype=dtype), self._up_parts)
        self._down_rows = rows_out(torch.empty(shape.active, shape.hidden, dtype=dtype), self._down_parts)
        self._h_rows = rows_in(torch.randn(shape.active, shape.width).to(dtype), self._down_parts)

    def up(self, layer: int, experts: list[int], x_TD: Tensor) -> None:
        x_rows = [*rows_in(x_TD, self._up_parts)] * len(experts)
        products(self._up_parts, x_rows, self._up[layer], None, self._up_rows, zip(experts, count(), strict=False))

    def down(self, layer: int, experts: list[int]) -> None:
        rows = zip(experts, count(), strict=False)
        products(self._down_parts, self._h_rows, self._down[layer], None, self._down_rows, rows)


def timed_stages(kernels: Any, spent: dict[str, list[float]]) -> Callable[[], None]:
    """Time every stage of these kernels from now on; return what ends it."""

    def timed(name: str) -> Callable[..., Any]:
        stage = getattr(kernels, name)

        def run(*args: Any) -> Any:
            began = time.perf_counter()
            result = stage(*args)
            spent[name].append(time.perf_counter() - began)
            return result

        return run

    for name in STAGES:
        setattr(kernels, name, timed(name))

    def restore() -> None:
        for name in STAGES:
            delattr(kernels, name)

    return restore


def measure(shape: Shape, calls: int) -> list[record.Row]:
    model = promoe_triton.patch(random_model(shape))
    modules = [layer.mlp.experts for layer in model.model.layers]
    products = Products(modules, shape)

    def ours(draws: Draws) -> Callable[[], float]:
        def call() -> float:
            layer, experts = draws.next()
            ids_TA = torch.tensor([experts])
            return seconds(lambda: modules[layer](draws.x_TD, ids_TA, draws.weights_TA))

        return call

    def bare(draws: Draws, parts: dict[str, list[float]]) -> Callable[[], float]:
        def call() -> float:
            layer, experts = draws.next()
            up = seconds(lambda: products.up(layer, experts, draws.x_TD))
            down = seconds(lambda: products.down(layer, experts))
            parts["up"].append(up)
            parts["down"].append(down)
            return up + down

        return call

    parts: dict[str, list[float]] = {"up": [], "down": []}
    variants = {"layer": ours(Draws(shape, 1)), "products": bare(Draws(shape, 2), parts)}
    take_turns(variants, calls // 10)
    for spent in parts.values():
        spent.clear()
    taken = take_turns(variants, calls)
    stages: dict[str, list[float]] = defaultdict(list)
    restore = [timed_stages(module._promoe.kernels, stages) for module in modules]
    take_turns(variants, calls // 10)
    stages.clear()
    whole = take_turns(variants, calls)["layer"]
    for undo in restore:
        undo()
    stages["bookkeeping"] = [t - sum(p) for t, *p in zip(whole, *(stages[name] for name in STAGES), strict=True)]
    return [*rows_of_layer(str(shape), taken), *rows_of_stages(str(shape), stages, parts)]


def rows_of_layer(case: str, taken: dict[str, list[float]]) -> list[record.Row]:
    """Single calls are at the mercy of the machine: medians of batches of calls are what is compared."""
    layer, products = batched(taken["layer"]), batched(taken["products"])
    extra = [a - b for a, b in zip(layer, products, strict=True)]
    return [
        record.row(case, "layer", "time", "us", layer, better="lower"),
        record.row(case, "products alone", "time", "us", products, better="lower"),
        record.row(case, "layer - products", "overhead", "us", extra, target=TARGET_US, better="lower"),
    ]


def rows_of_stages(case: str, stages: dict[str, list[float]], parts: dict[str, list[float]]) -> list[record.Row]:
    rows = []
    for name in (*STAGES, "bookkeeping"):
        spent = batched(stages[name])
        if name in parts:
            spent = [a - b for a, b in zip(spent, batched(parts[name]), strict=True)]
            name = f"{name} - its products"
        rows.append(record.row(case, name, "stage", "us", spent, better="lower"))
    return rows


def batched(values: Sequence[float]) -> list[float]:
    """Return medians of equal batches, in microseconds."""
    size = len(values) // BATCHES
    return [1e6 * statistics.median(values[i * size : (i + 1) * size]) for i in range(BATCHES)]


@torch.no_grad()
def main() -> None:
    args = record.arguments(__doc__ or "").parse_args()
    record.confine()
    results = record.results(args, "overhead")
    for shape in SHAPES:
        if not results.has(str(shape)):
            results.begin()
            results.write(measure(shape, BATCHES * (8 if args.quick else 80)))


if __name__ == "__main__":
    main()
