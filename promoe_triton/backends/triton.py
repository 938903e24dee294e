"""The layer's stages as Triton kernels that read experts where they lie (see `kernels`).

    h = activation(x W_up^T + b_up)          one row after the other, or rows grouped by expert
    y = sum over a of weight_a * (h W_down^T + b_down)

Which kernel runs, and with which tiles, follows from the shape of the whole call, so that no split into waves shows
in the result. The host reads nothing of a call unless it is asked which experts it needs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from promoe_triton.backends.gates import fused_gate, own_gate
from promoe_triton.errors import PromoeError
from promoe_triton.kernels import tiles, whole
from promoe_triton.kernels.checks import IS_INTERPRETED
from promoe_triton.kernels.combine import combine
from promoe_triton.kernels.graphs import GraphForm
from promoe_triton.kernels.pool import Gate, Pool, Projection
from promoe_triton.kernels.schedule import Schedule
from promoe_triton.kernels.tiles import TileTable, table_for, target_of
from promoe_triton.layout import ExpertLayout
from promoe_triton.protocols import ExpertSpec, ExpertTensors, LayerKernels, TensorSpec

UNIT = 64
"""Elements. Experts that lie at multiples of it are addressed in steps of it, which tells the compiler that loads of 16
bytes are aligned."""


class TritonBackend:
    """Triton kernels, on a GPU; on the CPU in Triton's interpreter only, for tests.

    table: tiles to use in place of those shipped for the device.
    """

    name = "triton"

    def __init__(self, table: TileTable | None = None) -> None:
        self._table = table

    def layer(self, experts: nn.Module, layout: ExpertLayout, spec: ExpertSpec) -> LayerKernels[Any]:
        return TritonLayer(experts, layout, spec, self._table)


def check_runs_on(device: torch.device) -> None:
    """Raise PromoeError where these kernels cannot read a device's memory."""
    if device.type == "cpu" and not IS_INTERPRETED:
        raise PromoeError(
            "backend='triton' computes on a GPU, but slots are in RAM; use backend='torch' (or, for tests, set "
            "TRITON_INTERPRET=1 before the package is imported)"
        )


def own_table(device: torch.device, file: Path) -> TileTable:
    """Return a device's tiles from a person's own file. Raises PromoeError where it has none."""
    try:
        return table_for(target_of(device), file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PromoeError(
            f"{file} is no table of tiles for {device} (promoe-triton tune writes one): {error}"
        ) from error


class Places:
    """Where one tensor of every expert lies: distances from the beginning of the memory that holds all of them.

    The host keeps them, and sends them to the device before the next product that reads them.
    """

    def __init__(self, spec: TensorSpec, experts: int, transposed: bool) -> None:
        self._spec = spec
        self._transposed = transposed
        self._experts = experts
        self._memory = 0
        self._unit = UNIT
        self._offsets: dict[int, int] = {}
        self._pool: Pool | None = None
        self._is_sent = False

    @property
    def pool(self) -> Pool:
        if self._pool is None:
            raise PromoeError(f"no expert's {self._spec.name} has been placed")
        if not self._is_sent:
            # Pageable memory: the call has taken its own copy of it when it returns.
            slots = [self._offsets.get(e, -self._unit) // self._unit for e in range(self._experts)]
            self._pool.slot_of_E.copy_(torch.tensor(slots, dtype=torch.int64), non_blocking=True)
            self._is_sent = True
        return self._pool

    def check(self, experts: Sequence[int] | None) -> None:
        """Raise PromoeError unless these experts (None: all) can be read."""
        if experts is None and len(self._offsets) == self._experts:
            return
        missing = {*(range(self._experts) if experts is None else experts)} - self._offsets.keys()
        if missing:
            raise PromoeError(f"{self._spec.name} of experts {sorted(missing)} is not in a slot")

    def place(self, expert: int, tensor: Tensor) -> None:
        if not tensor.is_contiguous():
            raise ValueError(f"{self._spec.name}: expected a contiguous tensor, got strides {tensor.stride()}")
        memory = tensor.untyped_storage().data_ptr()
        offset = int(tensor.storage_offset())
        if memory != self._memory or self._pool is None or self._pool.data.dtype != tensor.dtype:
            # Other memory than before, as when resident weights were cast: what lay in the old is gone.
            self._offsets, self._memory, self._unit = {}, memory, UNIT
            self._pool = self._view(tensor, torch.empty(self._experts, dtype=torch.int64, device=tensor.device))
        if offset % self._unit:
            self._unit = 1
            self._pool = self._view(tensor, self._pool.slot_of_E)
        self._offsets[expert] = offset
        self._is_sent = False

    def remove(self, expert: int) -> None:
        if self._offsets.pop(expert, None) is not None:
            self._is_sent = False

    def _view(self, tensor: Tensor, slot_of_E: Tensor) -> Pool:
        memory = tensor.untyped_storage()
        flat = tensor.new_empty(0).set_(memory, 0, (memory.nbytes() // tensor.itemsize,), (1,))
        slots = (len(flat) - tensor.numel()) // self._unit + 1
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        if self._transposed:
            shape, strides = shape[::-1], strides[::-1]
        return Pool(data=flat.as_strided((slots, *shape), (self._unit, *strides)), slot_of_E=slot_of_E)


@dataclass(kw_only=True, eq=False)
class TritonCall:
    """One call: its routing, and what the stages have computed so far. schedule: None where rows are not grouped."""

    x_TD: Tensor
    x: Tensor
    ids_TA: Tensor
    weights_TA: Tensor
    known: int
    shape: tiles.Call
    schedule: Schedule | None
    up_RN: Tensor
    h_RF: Tensor
    y_RD: Tensor

    @cached_property
    def asked_E(self) -> Tensor:
        """Which experts this call needs, bool [E]."""
        used = (self.ids_TA < self.known) & (self.weights_TA != 0)
        # One place more, for all that is of no expert.
        asked = self.ids_TA.new_zeros(self.known + 1, dtype=torch.bool)
        asked.scatter_(0, torch.where(used, self.ids_TA, self.known).flatten().long(), True)
        return asked[:-1]

    @property
    def experts(self) -> Collection[int]:
        """The experts this call needs. The host waits for the routing here."""
        return [e for e, is_asked in enumerate(self.asked_E.tolist()) if is_asked]


class TritonLayer:
    """The kernels of one layer, and where its experts lie."""

    def __init__(self, experts: nn.Module, layout: ExpertLayout, spec: ExpertSpec, table: TileTable | None) -> None:
        self.module: Any = experts
        self.layout = layout
        self._table = table
        shapes = {s.name: s.shape[::-1] if s.name in layout.transposed else s.shape for s in spec.tensors}
        self.dtype = spec.tensors[0].dtype
        self._places = {s.name: Places(s, layout.experts, s.name in layout.transposed) for s in spec.tensors}
        self._columns = [shapes[name][0] for name in layout.up]
        self.F = shapes[layout.down[0]][1] if layout.down else sum(self._columns)
        self.D = shapes[layout.down[0]][0] if layout.down else self.F
        self._gated = sum(self._columns) == 2 * self.F
        self._norm: Any = experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None
        self._gate: Gate | None = Gate()
        if layout.down:
            gate = fused_gate(experts, layout, self._gated)
            self._gate = gate if len(layout.up) == 1 else None

    def place(self, expert: int, tensors: ExpertTensors) -> None:
        for name, tensor in tensors.items():
            self._places[name].place(expert, tensor)
            self.dtype = tensor.dtype

    def remove(self, expert: int) -> None:
        for places in self._places.values():
            places.remove(expert)

    def begin(self, x_TD: Tensor, expert_ids_TA: Tensor, weights_TA: Tensor) -> TritonCall:
        T, A = expert_ids_TA.shape
        E = self.layout.experts
        ids_TA, weights_TA = expert_ids_TA.contiguous(), weights_TA.contiguous()
        x = x_TD.to(self.dtype)
        x = x if x.stride(-1) == 1 else x.contiguous()
        shape = tiles.Call(T=T, A=A, E=E, dtype=self.dtype)
        R, N = T * A, sum(self._columns)
        fused = self._gate is not None
        h_RF = x.new_empty((R, self.F if fused else 0))
        # A norm takes its rows in the layer's own type.
        y_RD = x.new_empty((R, self.D), dtype=shape.sum_dtype if self._norm is None else self.dtype)
        return TritonCall(
            x_TD=x_TD,
            x=x,
            ids_TA=ids_TA,
            weights_TA=weights_TA,
            known=E,
            shape=shape,
            schedule=whole.plan(ids_TA, weights_TA, shape, self._tiles(x)),
            up_RN=x.new_empty((R, 0 if fused else N)),
            h_RF=h_RF,
            y_RD=y_RD,
        )

    def up(self, call: TritonCall, experts: Sequence[int] | None) -> None:
        wave_E = self._wave(call, self.layout.up, experts)
        out_RN = call.h_RF if self._gate is not None else call.up_RN
        first = 0
        for name, columns in zip(self.layout.up, self._columns, strict=True):
            gate = self._gate or Gate()
            width = columns // 2 if gate.gated else columns
            projection = self._projection(name, self.layout.up_bias, gate)
            self._product(out_RN[:, first : first + width], call.x, call, projection, wave_E, up=True)
            first += width

    def activate(self, call: TritonCall) -> None:
        if self._gate is None:
            # All rows, also those that nobody has computed: what becomes of them is not read.
            call.h_RF = own_gate(self.module, self.layout, call.up_RN, self._gated)

    def down(self, call: TritonCall, experts: Sequence[int] | None) -> None:
        if not self.layout.down:
            return
        wave_E = self._wave(call, self.layout.down, experts)
        projection = self._projection(self.layout.down[0], self.layout.down_bias, Gate())
        self._product(call.y_RD, call.h_RF, call, projection, wave_E, up=False)

    def combine(self, call: TritonCall) -> Tensor:
        y_RD = call.y_RD if self.layout.down else call.h_RF
        y_RD = y_RD if self._norm is None else self._norm(y_RD)
        return combine(
            y_RD,
            call.schedule.row_of_R if call.schedule is not None else None,
            call.x_TD,
            call.ids_TA,
            call.weights_TA,
            experts=self.layout.experts,
            identities=self.layout.identities,
            weighted=self._is_weighted,
        )

    def graph_form(self) -> GraphForm | None:
        """Return how a resident layer stands in compiled graphs; None where more than the kernels computes it."""
        layout, gate = self.layout, self._gate
        if gate is None or self._norm is not None or not layout.down or self._table is not None:
            return None
        if any("." in name for name in layout.names):
            return None
        kind = " interleaved" if gate.interleaved else " gated" if gate.gated else ""
        return GraphForm(
            up=layout.up[0],
            up_bias=layout.up_bias,
            down=layout.down[0],
            down_bias=layout.down_bias,
            gate=gate.activation + kind,
            numbers=(gate.alpha, gate.limit),
            transposed=(layout.up[0] in layout.transposed, layout.down[0] in layout.transposed),
            identities=layout.identities,
        )

    @property
    def _is_weighted(self) -> bool:
        """Whether the second product multiplies with the routing weights; a norm must come before them."""
        return self._norm is None and bool(self.layout.down)

    def _tiles(self, x: Tensor) -> TileTable:
        if self._table is None:
            self._table = table_for(target_of(x.device))
        return self._table

    def _projection(self, weight: str, bias: str | None, gate: Gate) -> Projection:
        pool = self._places[bias].pool if bias else None
        return Projection(weight=self._places[weight].pool, bias=pool, gate=gate)

    def _wave(self, call: TritonCall, names: Sequence[str], experts: Sequence[int] | None) -> Tensor | None:
        """Return which experts are computed, [E]; None: all."""
        for name in names:
            self._places[name].check(experts)
        if experts is None:
            return None
        wave = torch.zeros(self.layout.experts, dtype=torch.int32)
        wave[list(experts)] = 1
        return wave.to(call.x.device, non_blocking=True)

    def _product(
        self, out: Tensor, x: Tensor, call: TritonCall, projection: Projection, wave_E: Tensor | None, up: bool
    ) -> None:
        whole.product(
            out,
            x,
            call.ids_TA,
            call.weights_TA,
            call.schedule,
            projection,
            wave_E,
            up=up,
            weighted=not up and self._is_weighted,
            call=call.shape,
            table=self._tiles(x),
        )
