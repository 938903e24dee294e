"""One shape's experts on the device, calls of them, and our layer over them: the kernels as the backend runs them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grid
import torch
from torch import Tensor

from promoe_triton.kernels import whole
from promoe_triton.kernels.combine import combine
from promoe_triton.kernels.pool import Projection
from promoe_triton.kernels.samples import Routed, draw_call, draw_experts, layer_in_float64, sets_needed
from promoe_triton.kernels.shapes import LayerShape
from promoe_triton.kernels.tiles import TileTable
from promoe_triton.kernels.timing import cache_bytes
from promoe_triton.kernels.trials import Cost

ROOM = 0.85
"""Share of the device's free memory that experts may take, leaving the rest to activations and to the reference."""


MOST_SETS = 64
"""A rehearsal's experts are so small that thousands of sets would be needed to be larger than a cache."""


class DoesNotFit(Exception):
    """The experts of a shape are too large for the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waves:
    """Masks [E] of the experts of each wave, on the device; None: all experts at once."""

    masks: tuple[Tensor | None, ...] = (None,)


class Stage:
    """Sets of experts of one shape that take turns, and what is computed with them."""

    def __init__(self, shape: LayerShape, dtype: torch.dtype, device: torch.device, table: TileTable) -> None:
        self.shape, self.dtype, self.device, self.table = shape, dtype, device, table
        self._generator = torch.Generator(device).manual_seed(1)
        sets = self._sets()
        self.sets = [draw_experts(shape, dtype, self._generator) for _ in range(sets)]
        self._dense: list[dict[str, Tensor]] = []
        # Of one number of tokens at a time: prompts take gigabytes.
        self._calls: dict[int, list[Routed]] = {}
        self._references: dict[int, Tensor] = {}

    def _sets(self) -> int:
        """Return how many sets take turns: in slots and as stacked tensors, so each is there twice."""
        needed = sets_needed(self.shape, 1, self.dtype, cache_bytes(self.device))
        if self.device.type != "cuda":
            return 2
        free, _ = torch.cuda.mem_get_info(self.device)
        fitting = int(ROOM * free) // (2 * self.shape.nbytes(self.dtype))
        if not fitting:
            raise DoesNotFit(f"2 x {self.shape.nbytes(self.dtype) / 1e9:.0f} GB of experts, {free / 1e9:.0f} GB free")
        return min(needed, fitting, MOST_SETS)

    @property
    def dense(self) -> list[dict[str, Tensor]]:
        """The same experts as stacked tensors, without slots."""
        if not self._dense:
            self._dense = [experts.dense() for experts in self.sets]
        return self._dense

    def calls(self, T: int) -> list[Routed]:
        """Return the calls of T tokens that take turns: more of them than there are sets of experts."""
        if T not in self._calls:
            self._calls = {T: self._draw(T)}
        return self._calls[T]

    def _draw(self, T: int) -> list[Routed]:
        count = 2 if self.device.type != "cuda" else 24 if T <= 32 else 8 if T <= 128 else 3
        count = max(count, len(self.sets))
        generator = torch.Generator(self.device).manual_seed(T)
        return [draw_call(self.shape, T, self.dtype, generator) for _ in range(count)]

    def reference(self, T: int) -> Tensor:
        """Return what the first call gives in float64."""
        if T not in self._references:
            self._references = {T: layer_in_float64(self.sets[0], self.calls(T)[0])}
        return self._references[T]

    def experts(self, T: int) -> float:
        """Return how many distinct experts a call needs, on average."""
        calls = self.calls(T)
        return sum(call.experts for call in calls) / len(calls)

    def cost(self, T: int) -> Cost:
        """Every expert asked for is read once, the input once, the output written once; nothing between counts."""
        rows = 2 * T * self.shape.D * self.dtype.itemsize
        flops = 2.0 * T * self.shape.A * (self.shape.up_rows + self.shape.F) * self.shape.D
        return Cost(nbytes=self.experts(T) * self.shape.expert_bytes(self.dtype) + rows, flops=flops)

    def runs(self, variant: str, T: int, residency: int) -> tuple[list[Callable[[], Tensor]], int]:
        """Return our layer's calls, and the most waves of any of them."""
        calls = self.calls(T)
        waves = [self._waves(call, variant, residency, seed) for seed, call in enumerate(calls)]
        runs = [
            functools.partial(self.forward, *self._projections(variant, i), call, plan)
            for i, (call, plan) in enumerate(zip(calls, waves, strict=True))
        ]
        return runs, max(len(plan.masks) for plan in waves)

    def _projections(self, variant: str, i: int) -> tuple[Projection, Projection]:
        experts = self.sets[i % len(self.sets)]
        if variant == grid.DENSE:
            return experts.without_slots(self.dense[i % len(self.sets)])
        return experts.up, experts.down

    def _waves(self, call: Routed, variant: str, residency: int, seed: int) -> Waves:
        """Draw which experts are resident; see `grid` for what becomes of the others."""
        if residency == 100:
            return Waves()
        E = self.shape.E
        generator = torch.Generator().manual_seed(seed)
        resident = set(torch.randperm(E, generator=generator)[: round(E * residency / 100)].tolist())
        used = call.ids_TA.unique().tolist()
        ready, missing = [e for e in used if e in resident], [e for e in used if e not in resident]
        later = [[e] for e in missing] if variant == grid.ONE_BY_ONE else [missing] if missing else []
        waves = [*([ready] if ready else []), *later]
        return Waves(masks=tuple(self._mask(wave) for wave in waves))

    def _mask(self, experts: Sequence[int]) -> Tensor:
        mask = torch.zeros(self.shape.E, dtype=torch.int32)
        mask[list(experts)] = 1
        return mask.to(self.device)

    def forward(
        self, up: Projection, down: Projection, call: Routed, waves: Waves, fill: float | None = None
    ) -> Tensor:
        """Compute one call; fill: what is in the results of the products before they are computed."""
        T, A = call.ids_TA.shape
        R, shape = T * A, self.shape.call(T, self.dtype)
        plan = whole.plan(call.ids_TA, call.weights_TA, shape, self.table)
        h_RF = call.x_TD.new_empty((R, self.shape.F))
        y_RD = call.x_TD.new_empty((R, self.shape.D), dtype=shape.sum_dtype)
        if fill is not None:
            h_RF.fill_(fill)
            y_RD.fill_(fill)
        for out, x, projection, is_up in ((h_RF, call.x_TD, up, True), (y_RD, h_RF, down, False)):
            how = {"up": is_up, "weighted": not is_up}
            for wave in waves.masks:
                whole.product(
                    out, x, call.ids_TA, call.weights_TA, plan, projection, wave, **how, call=shape, table=self.table
                )
        order = None if plan is None else plan.row_of_R
        return combine(y_RD, order, call.x_TD, call.ids_TA, call.weights_TA, experts=self.shape.E, weighted=True)
