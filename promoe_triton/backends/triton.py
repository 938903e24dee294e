"""The layer's stages as Triton kernels that read experts where they lie (see `kernels`).

    h = activation(x W_up^T + b_up)          one row after the other, or rows grouped by expert
    y = sum over a of weight_a * (h W_down^T + b_down)

Which kernel runs, and with which tiles, follows from the shape of the whole call, so that no split into waves shows
in the result. The host reads nothing of a call unless it is asked which experts it needs.
"""

from __future__ import annotations

from array import array
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

FEW = 256
"""Routed pairs that are read as they are, to know which experts a call needs."""

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
    """Where one tensor of every expert lies: distances from the beginning of the memory that holds all of them."""

    def __init__(self, spec: TensorSpec, experts: int, transposed: bool) -> None:
        self.name = spec.name
        self._transposed = transposed
        self._experts = experts
        self._memory = 0
        self._unit = UNIT
        self._offsets: dict[int, int] = {}
        self._data: Tensor | None = None

    @property
    def data(self) -> Tensor:
        """Return all memory as slots that begin `unit` elements apart."""
        if self._data is None:
            raise PromoeError(f"no expert's {self.name} has been placed")
        return self._data

    def slots(self, experts: Sequence[int] | None) -> array[int]:
        """Return [E]: the slots of these experts (None: of all), -1 for the others.

        Raises PromoeError unless they can be read.
        """
        found = array("q", [-1]) * self._experts
        offsets, unit = self._offsets, self._unit
        try:
            for expert in range(self._experts) if experts is None else experts:
                found[expert] = offsets[expert] // unit
        except KeyError:
            missing = {*(range(self._experts) if experts is None else experts)} - offsets.keys()
            raise PromoeError(f"{self.name} of experts {sorted(missing)} is not in a slot") from None
        return found

    def place(self, expert: int, tensor: Tensor) -> bool:
        """Note where an expert lies; whether that is another place than before."""
        if not tensor.is_contiguous():
            raise ValueError(f"{self.name}: expected a contiguous tensor, got strides {tensor.stride()}")
        memory = tensor.untyped_storage().data_ptr()
        offset = int(tensor.storage_offset())
        if memory != self._memory or self._data is None or self._data.dtype != tensor.dtype:
            # Other memory than before, as when resident weights were cast: what lay in the old is gone.
            self._offsets, self._memory, self._unit = {}, memory, UNIT
            self._data = self._view(tensor)
        if offset % self._unit:
            self._unit = 1
            self._data = self._view(tensor)
        changed = self._offsets.get(expert) != offset
        self._offsets[expert] = offset
        return changed

    def remove(self, expert: int) -> None:
        self._offsets.pop(expert, None)

    def _view(self, tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        flat = tensor.new_empty(0).set_(memory, 0, (memory.nbytes() // tensor.itemsize,), (1,))
        slots = (len(flat) - tensor.numel()) // self._unit + 1
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        if self._transposed:
            shape, strides = shape[::-1], strides[::-1]
        return flat.as_strided((slots, *shape), (self._unit, *strides))


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
    def asked(self) -> Tensor:
        used = torch.where(self.weights_TA != 0, self.ids_TA, self.known).flatten()
        if len(used) <= FEW:
            return used
        # Of many pairs, which experts they are: one place more for all that is of none.
        asked = used.new_zeros(self.known + 1, dtype=torch.bool)
        asked[torch.where(used < 0, self.known, used).clamp(max=self.known)] = True
        numbers = torch.arange(self.known + 1, device=used.device)
        return torch.where(asked, numbers, self.known)

    @property
    def experts(self) -> Collection[int]:
        """The experts this call needs. The host waits for the routing here."""
        return sorted({e for e in self.asked.tolist() if 0 <= e < self.known})


class TritonLayer:
    """The kernels of one layer, and where its experts lie."""

    def __init__(self, experts: nn.Module, layout: ExpertLayout, spec: ExpertSpec, table: TileTable | None) -> None:
        self.module: Any = experts
        self.layout = layout
        self._table = table
        shapes = {s.name: s.shape[::-1] if s.name in layout.transposed else s.shape for s in spec.tensors}
        self.dtype = spec.tensors[0].dtype
        self._changes = 0
        self._tables: dict[tuple[str, ...], tuple[int, list[Pool]]] = {}
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
            self._changes += self._places[name].place(expert, tensor)
            self.dtype = tensor.dtype

    def remove(self, expert: int) -> None:
        self._changes += 1
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
        out_RN = call.h_RF if self._gate is not None else call.up_RN
        first = 0
        gate = self._gate or Gate()
        for name, columns in zip(self.layout.up, self._columns, strict=True):
            width = columns // 2 if gate.gated else columns
            projection = self._projection(name, self.layout.up_bias, gate, experts)
            self._product(out_RN[:, first : first + width], call.x, call, projection, up=True)
            first += width

    def activate(self, call: TritonCall) -> None:
        if self._gate is None:
            # All rows, also those that nobody has computed: what becomes of them is not read.
            call.h_RF = own_gate(self.module, self.layout, call.up_RN, self._gated)

    def down(self, call: TritonCall, experts: Sequence[int] | None) -> None:
        if not self.layout.down:
            return
        projection = self._projection(self.layout.down[0], self.layout.down_bias, Gate(), experts)
        self._product(call.y_RD, call.h_RF, call, projection, up=False)

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

    def _projection(self, weight: str, bias: str | None, gate: Gate, experts: Sequence[int] | None) -> Projection:
        """Return a product of these experts (None: of all). The others have no slots in it, and so are left out."""
        names = (weight, bias) if bias else (weight,)
        pools = self._pools(names) if experts is None else self._sent(names, experts)
        return Projection(weight=pools[0], bias=pools[1] if bias else None, gate=gate)

    def _pools(self, names: tuple[str, ...]) -> list[Pool]:
        """Return where all experts lie. The tables stay where they are, as graphs may have their addresses."""
        changes, pools = self._tables.get(names, (-1, []))
        if changes != self._changes:
            fresh = self._sent(names, None)
            if pools and all(old.data is new.data for old, new in zip(pools, fresh, strict=True)):
                for old, new in zip(pools, fresh, strict=True):
                    old.slot_of_E.copy_(new.slot_of_E)
            else:
                pools = fresh
            self._tables[names] = self._changes, pools
        return pools

    def _sent(self, names: tuple[str, ...], experts: Sequence[int] | None) -> list[Pool]:
        """Send the slots of these experts to the device, all tables as one."""
        places = [self._places[name] for name in names]
        E = self.layout.experts
        size = E + E % 2  # tables begin at multiples of 16 bytes, or kernels would be compiled for others as well
        numbers = array("q")
        for each in places:
            numbers += each.slots(experts) + array("q", [-1]) * (size - E)
        # Pageable memory: the call has taken its own copy of it when it returns.
        sent = torch.frombuffer(numbers, dtype=torch.int64).to(places[0].data.device, non_blocking=True)
        return [Pool(data=each.data, slot_of_E=sent[i * size : i * size + E]) for i, each in enumerate(places)]

    def _product(self, out: Tensor, x: Tensor, call: TritonCall, projection: Projection, up: bool) -> None:
        whole.product(
            out,
            x,
            call.ids_TA,
            call.weights_TA,
            call.schedule,
            projection,
            None,
            up=up,
            weighted=not up and self._is_weighted,
            call=call.shape,
            table=self._tiles(x),
        )
