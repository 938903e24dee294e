"""What a layer launches, without a device: the launchers run on tensors of no memory, kernels take notes.

So nothing here restates an argument list, and what is compiled ahead is what would be compiled at run time: pointers
are specialised by their distance from the beginning of an allocation, numbers by their values, as Triton does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton

from promoe_triton.kernels import combine as combining
from promoe_triton.kernels import grouped, rows, whole
from promoe_triton.kernels import schedule as scheduling
from promoe_triton.kernels.checks import IS_INTERPRETED
from promoe_triton.kernels.pool import Gate, Pool, Projection
from promoe_triton.kernels.samples import UNIT
from promoe_triton.kernels.shapes import LayerShape
from promoe_triton.kernels.tiles import Tile, TileTable

SLOT_BYTES = 1 << 32
"""Slots fill more than 2 GiB, as they do in use: compilers are told of smaller memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch of a kernel, as its launcher asked for it."""

    stage: str
    kernel: str
    grid: int
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def tile(self) -> Tile | None:
        """The tile of a product."""
        if "BLOCK_N" not in self.options:
            return None
        return Tile(
            rows=self.options.get("BLOCK_M", 1),
            columns=self.options["BLOCK_N"],
            depth=self.options["BLOCK_K"],
            warps=self.options["num_warps"],
            stages=self.options["num_stages"],
        )


class Notes:
    """The launches of one call, and which stage is running."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.stage = ""

    def note(self, kernel: str, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.launches.append(Launch(stage=self.stage, kernel=kernel, grid=grid[0], args=args, options=options))


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


def launches(
    shape: LayerShape,
    T: int,
    dtype: torch.dtype,
    table: TileTable,
    *,
    waves: bool = False,
    ranked: bool = False,
    scaled: bool = False,
) -> list[Launch]:
    """Return what one call of T tokens launches, in order.

    waves: some of the experts only, as when slots are few. ranked: rows in the order in which experts are ready.
    scaled: weights of 8 bits, with a factor for each of their rows.
    """
    call = shape.call(T, dtype)
    A, E, R = shape.A, shape.E, T * shape.A
    up = _projection(shape, shape.up_rows, shape.D, shape.gate, dtype, scaled)
    down = _projection(shape, shape.D, shape.F, Gate(), dtype, scaled)
    x_TD, weights_TA = _empty(T, shape.D, dtype=dtype), _empty(T, A, dtype=dtype)
    ids_TA = _empty(T, A, dtype=torch.int64)
    h_RF, y_RD = _empty(R, shape.F, dtype=dtype), _empty(R, shape.D, dtype=call.sum_dtype)
    wave_E = _empty(E, dtype=torch.int32) if waves else None
    rank_E = _empty(E, dtype=torch.int32) if ranked else None
    with recording() as notes:
        notes.stage = "schedule"
        rows = whole.plan(ids_TA, weights_TA, call, table, rank_E)
        for notes.stage, out, x, projection in (("up", h_RF, x_TD, up), ("down", y_RD, h_RF, down)):
            is_up = notes.stage == "up"
            how = {"up": is_up, "weighted": not is_up}
            whole.product(out, x, ids_TA, weights_TA, rows, projection, wave_E, **how, call=call, table=table)
        notes.stage = "combine"
        order_R = None if rows is None else rows.row_of_R
        combining.combine(y_RD, order_R, x_TD, ids_TA, weights_TA, experts=E, weighted=True)
    return notes.launches


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _projection(shape: LayerShape, N: int, K: int, gate: Gate, dtype: torch.dtype, scaled: bool) -> Projection:
    slot_of_E = _empty(shape.E, dtype=torch.int64)
    strides = (1, N) if shape.transposed else (K, 1)
    weight = _pool(slot_of_E, (N, K), strides, torch.int8 if scaled else dtype)
    bias = _pool(slot_of_E, (N,), (1,), dtype) if shape.biased else None
    scale = _pool(slot_of_E, (N,), (1,), torch.float32) if scaled else None
    return Projection(weight=weight, bias=bias, scale=scale, gate=gate)


def _pool(slot_of_E: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Pool:
    flat = _empty(SLOT_BYTES // dtype.itemsize, dtype=dtype)
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    slots = (len(flat) - size) // UNIT + 1
    return Pool(data=flat.as_strided((slots, *shape), (UNIT, *strides)), slot_of_E=slot_of_E)
