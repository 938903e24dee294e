"""One product of a layer, to be run with any tile: what it gives, how far that is from float64, what it must move."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from promoe_triton.kernels.grouped import grouped_product
from promoe_triton.kernels.rows import rows_product
from promoe_triton.kernels.samples import Experts, Routed, product_in_float64, relative_error
from promoe_triton.kernels.schedule import SMALL, Schedule, schedule
from promoe_triton.kernels.shapes import LayerShape
from promoe_triton.kernels.tiles import Shape, Tile

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
"""Largest relative error (L2) against float64, from the same rounded weights and inputs: a kernel that is further off
is wrong, however fast. In fp32 thousands of products that are added one after the other give 2e-6, by a simulation.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Fewest bytes and operations of one call, on average over the calls that take turns."""

    nbytes: float
    flops: float


class ProductTrial:
    """The first ("up") or second ("down") product of calls that take turns over sets of experts."""

    def __init__(self, shape: LayerShape, part: str, sets: Sequence[Experts], calls: Sequence[Routed]) -> None:
        self.shape, self.part = shape, part
        self._projections = [getattr(sets[i % len(sets)], part) for i in range(len(calls))]
        self._calls = calls
        self.T, self.A = calls[0].ids_TA.shape
        self.dtype = calls[0].x_TD.dtype
        self.call = shape.call(self.T, self.dtype)
        self._h_RF: Tensor | None = None
        self._schedules: dict[int, list[Schedule]] = {}

    @property
    def R(self) -> int:
        return self.T * self.A

    @property
    def product(self) -> Shape:
        return self.shape.up if self.part == "up" else self.shape.down

    def cost(self) -> Cost:
        """Every expert that the routing asks for is read once; so is the input, and the result is written once."""
        expert = (self.shape.up_rows * self.shape.D if self.part == "up" else self.shape.D * self.shape.F) * self._size
        experts = sum(call.experts for call in self._calls) / len(self._calls)
        rows = self.T * self.shape.D if self.part == "up" else self.R * self.shape.F
        flops = 2.0 * self.R * (expert / self._size)
        return Cost(
            nbytes=experts * expert + rows * self._size + self.R * self.product.N * self._new(0).itemsize, flops=flops
        )

    def runs(self, tile: Tile) -> list[Callable[[], object]]:
        """Return the calls, to be timed one after the other; all write to the same memory."""
        out_RN = self._new(self.R)
        return [functools.partial(self._run, i, tile, out_RN) for i in range(len(self._calls))]

    def error(self, tile: Tile) -> float:
        """Return the relative error of the first call against float64; its result is poisoned before."""
        out_RN = self._new(self.R).fill_(torch.nan)
        self._run(0, tile, out_RN)
        if not self.call.by_rows:
            out_RN = out_RN[self._plan(0, tile.rows).row_of_R.long()]
        return relative_error(out_RN, self._want_RN)

    def _run(self, i: int, tile: Tile, out_RN: Tensor) -> None:
        call, up = self._calls[i], self.part == "up"
        x = call.x_TD if up else self._rows
        if self.call.by_rows:
            rows_product(
                out_RN, x, call.ids_TA, call.weights_TA, self._projections[i], None, weighted=not up, tile=tile
            )
        else:
            plan = self._plan(i, tile.rows)
            grouped_product(
                out_RN, x, plan, call.weights_TA, self._projections[i], None, gather=up, weighted=not up, tile=tile
            )

    @functools.cached_property
    def _want_RN(self) -> Tensor:
        call = self._calls[0]
        x_RK = call.x_TD.repeat_interleave(self.A, 0) if self.part == "up" else self._rows
        if self.part == "down" and not self.call.by_rows:
            x_RK = x_RK[self._plan(0, 16).row_of_R.long()]
        want_RN = product_in_float64(x_RK, call.ids_TA.flatten(), self._projections[0])
        return want_RN if self.part == "up" else want_RN * call.weights_TA.double().view(-1, 1)

    @property
    def _rows(self) -> Tensor:
        """The input of the second product, as the first left it: the same for all calls."""
        if self._h_RF is None:
            like = self._calls[0].x_TD
            generator = torch.Generator(like.device).manual_seed(7)
            h_RF = torch.randn(self.R, self.shape.F, generator=generator, device=like.device)
            self._h_RF = h_RF.to(self.dtype)
        return self._h_RF

    def _plan(self, i: int, block: int) -> Schedule:
        if block not in self._schedules:
            self._schedules[block] = [
                schedule(call.ids_TA, call.weights_TA, None, experts=self.shape.E, block=block) for call in self._calls
            ]
        return self._schedules[block][i]

    @property
    def _size(self) -> int:
        return self.dtype.itemsize

    def _new(self, rows: int) -> Tensor:
        """Return room for a result, of the type that the layer gives it."""
        precise = self.part == "down" and self.R <= SMALL
        dtype = torch.float32 if precise else self.dtype
        return torch.empty((rows, self.product.N), dtype=dtype, device=self._calls[0].x_TD.device)
