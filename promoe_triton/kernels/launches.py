"""What a layer launches, without a device: the launchers run on tensors of no memory, kernels take notes.

So nothing here restates an argument list, and what is compiled ahead is what would be compiled at run time: pointers
are specialised by their distance from the beginning of an allocation, numbers by their values, as Triton does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

from promoe_triton.kernels import combine as combining
from promoe_triton.kernels import grouped, rows
from promoe_triton.kernels import schedule as scheduling
from promoe_triton.kernels.checks import IS_INTERPRETED
from promoe_triton.kernels.pool import Gate, Pool, Projection
from promoe_triton.kernels.tiles import Call, Shape, Tile, TileTable

SLOT_BYTES = 1 << 32
"""Slots fill more than 2 GiB, as they do in use: compilers are told of smaller memory."""

UNIT = 64
"""Elements between two places where experts may lie, as in `backends.triton`."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One MoE layer: what decides which kernels it needs."""

    name: str
    D: int
    F: int
    E: int
    A: int
    dtype: str = "bf16"
    gate: Gate = field(default_factory=lambda: Gate(activation="silu", gated=True))
    transposed: bool = False
    bias: bool = False

    @property
    def storage(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def call(self, T: int) -> Call:
        return Call(T=T, A=self.A, E=self.E, dtype=self.storage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch of a kernel, as its launcher asked for it."""

    stage: str
    kernel: str
    grid: int
    args: tuple[Any, ...]
    options: dict[str, Any]
    tile: Tile | None


class Notes:
    """The launches of one call, and which stage is running."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.stage = ""
        self.tile: Tile | None = None

    def note(self, kernel: str, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        launch = Launch(stage=self.stage, kernel=kernel, grid=grid[0], args=args, options=options, tile=self.tile)
        self.launches.append(launch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorder:
    """Stands in a kernel's place."""

    kernel: str
    notes: Notes

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.notes.note(self.kernel, grid, args, options)

        return launch


@contextmanager
def recording() -> Iterator[Notes]:
    """Let the kernels of all stages take notes instead of running."""
    if IS_INTERPRETED:
        raise RuntimeError("kernels are interpreted in this process; unset TRITON_INTERPRET to compile them")
    notes = Notes()
    replaced = []
    for module in (rows, scheduling, grouped, combining):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction):
                replaced.append((module, name, value))
                setattr(module, name, Recorder(kernel=f"{module.__name__}:{name}", notes=notes))
    try:
        yield notes
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


def launches(layer: Layer, T: int, table: TileTable, *, waves: bool = False) -> list[Launch]:
    """Return what one call of T tokens launches, in order. waves: some of the experts only, as when slots are few."""
    call = layer.call(T)
    A, E, R = layer.A, layer.E, T * layer.A
    dtype = layer.storage
    up = _projection(layer, 2 * layer.F if layer.gate.gated else layer.F, layer.D, layer.gate)
    down = _projection(layer, layer.D, layer.F, Gate())
    x_TD, ids_TA, weights_TA = (
        _empty(T, layer.D, dtype=dtype),
        _empty(T, A, dtype=torch.int64),
        _empty(T, A, dtype=dtype),
    )
    h_RF = _empty(R, layer.F, dtype=dtype)
    y_RD = _empty(R, layer.D, dtype=call.sum_dtype)
    wave_E = _empty(E, dtype=torch.int32) if waves else None
    with recording() as notes:
        plan = None
        if not call.by_rows:
            notes.stage = "schedule"
            plan = scheduling.schedule(ids_TA, weights_TA, None, experts=E, block=table.block(call))
        for stage, out, x, projection in (("up", h_RF, x_TD, up), ("down", y_RD, h_RF, down)):
            notes.stage = stage
            how: dict[str, Any] = {"weighted": stage == "down"}
            if plan is None:
                notes.tile = table.rows(call, _shape(projection))
                rows.rows_product(out, x, ids_TA, weights_TA, projection, wave_E, tile=notes.tile, **how)
            else:
                notes.tile = table.grouped(call, _shape(projection))
                how |= {"gather": stage == "up", "tile": notes.tile}
                grouped.grouped_product(out, x, plan, weights_TA, projection, wave_E, **how)
        notes.stage, notes.tile = "combine", None
        order = plan.row_of_R if plan is not None else None
        combining.combine(y_RD, order, x_TD, ids_TA, weights_TA, experts=E, weighted=True)
    return notes.launches


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _projection(layer: Layer, N: int, K: int, gate: Gate) -> Projection:
    slot_of_E = _empty(layer.E, dtype=torch.int64)
    shape, strides = ((N, K), (1, N)) if layer.transposed else ((N, K), (K, 1))
    weight = _pool(slot_of_E, shape, strides, layer.storage)
    bias = _pool(slot_of_E, (N,), (1,), layer.storage) if layer.bias else None
    return Projection(weight=weight, bias=bias, gate=gate)


def _pool(slot_of_E: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Pool:
    flat = _empty(SLOT_BYTES // dtype.itemsize, dtype=dtype)
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    slots = (len(flat) - size) // UNIT + 1
    return Pool(data=flat.as_strided((slots, *shape), (UNIT, *strides)), slot_of_E=slot_of_E)


def _shape(projection: Projection) -> Shape:
    return Shape(N=projection.N, K=projection.K, gated=projection.gate.gated, transposed=projection.is_transposed)
