"""What tests of the kernels share: layers in slots, routings, a float64 reference, tolerances, and where they run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from promoe_triton.kernels import combine, grouped, rows, schedule, twins
from promoe_triton.kernels.pool import Gate, Pool, Projection
from promoe_triton.kernels.tiles import Call, Shape, TileTable, table_for
from promoe_triton.kernels.trials import TOLERANCES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

KERNELS: Any = SimpleNamespace(
    rows_product=rows.rows_product,
    schedule=schedule.schedule,
    grouped_product=grouped.grouped_product,
    combine=combine.combine,
)
TWINS: Any = twins


def _entry(columns: int, depth: int) -> dict[str, int]:
    return {"columns": columns, "gated_columns": columns, "depth": depth, "warps": 4, "stages": 2}


# Fewer, larger programs than on a GPU: the interpreter takes its time per program.
_FORMS = {
    "rows": _entry(32, 64),
    "rows_transposed": _entry(32, 64),
    "grouped": {"16": _entry(32, 32), "64": _entry(32, 32)},
}
TABLE = TileTable(target="tests", entries={"16": _FORMS, "32": _FORMS})
SHIPPED = table_for("sm_80")


_SILU = Gate(activation="silu", gated=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A layout of HF.md, and what the experts are."""

    gate: Gate = _SILU
    transposed: bool = False
    bias: bool = False
    scale: bool = False


KINDS = {
    "halves": Kind(),
    "transposed": Kind(transposed=True),
    "interleaved": Kind(gate=Gate(activation="silu", gated=True, interleaved=True)),
    "biases": Kind(bias=True),
    "as gpt_oss": Kind(
        # Neither alpha nor limit is what a kernel might have for a default.
        gate=Gate(activation="clamped_swiglu", gated=True, interleaved=True, alpha=1.3, limit=0.7),
        transposed=True,
        bias=True,
    ),
    "as nemotron_h": Kind(gate=Gate(activation="relu2")),
    "gelu": Kind(gate=Gate(activation="gelu", gated=True)),
    "gelu by tanh": Kind(gate=Gate(activation="gelu_tanh", gated=True)),
    "gelu without a gate": Kind(gate=Gate(activation="gelu"), bias=True),
    "scales": Kind(scale=True, bias=True),
    "no activation": Kind(gate=Gate()),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Experts of one layer, dense and in slots whose free bytes are NaN."""

    up: Projection
    down: Projection
    D: int
    F: int

    @property
    def E(self) -> int:
        return self.up.experts

    def without(self, experts: Sequence[int]) -> Layer:
        """Return the layer with these experts not resident."""

        def hidden(pool: Pool | None) -> Pool | None:
            if pool is None:
                return None
            slot_of_E = pool.slot_of_E.clone()
            slot_of_E[list(experts)] = -1
            return Pool(data=pool.data, slot_of_E=slot_of_E)

        def gone(p: Projection) -> Projection:
            weight = hidden(p.weight)
            assert weight is not None
            return Projection(weight=weight, bias=hidden(p.bias), scale=hidden(p.scale), gate=p.gate)

        return dataclasses.replace(self, up=gone(self.up), down=gone(self.down))


def in_slots(tensors: dict[str, Tensor], slots: Sequence[int], spare: int) -> dict[str, Pool]:
    """Put stacked tensors [E, ...] into slots of one buffer [S, slot_bytes], expert e into slots[e]."""
    sizes = {name: -(-t[0].nbytes // 64) * 64 for name, t in tensors.items()}
    S = len(slots) + spare
    buffer = torch.full((S, sum(sizes.values()) + 128), 0xFF, dtype=torch.uint8, device=DEVICE)
    slot_of_E = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    pools, begin = {}, 0
    for name, tensor in tensors.items():
        flat = buffer[:, begin : begin + tensor[0].nbytes].view(tensor.dtype)
        shape, strides = tensor.shape[1:], tensor[0].contiguous().stride()
        view = flat.as_strided((S, *shape), (flat.stride(0), *strides), flat.storage_offset())
        view[slot_of_E.long()] = tensor.to(DEVICE)
        pools[name] = Pool(data=view, slot_of_E=slot_of_E)
        begin += sizes[name]
    return pools


def make_layer(
    kind: Kind,
    *,
    E: int,
    D: int,
    F: int,
    dtype: torch.dtype,
    seed: int = 0,
    slots: Sequence[int] | None = None,
    spare: int = 2,
) -> Layer:
    """Draw the experts of a layer; slots: where each lies, default in falling order."""
    generator = torch.Generator().manual_seed(seed)

    def projection(rows: int, K: int, gate: Gate) -> Projection:
        weight = torch.randn(E, rows, K, generator=generator) * K**-0.5
        tensors = {}
        if kind.scale:
            weight = (weight / weight.abs().max() * 127).round().to(torch.int8)
            tensors["scale"] = torch.rand(E, rows, generator=generator) * 0.02 + 0.01
        else:
            weight = weight.to(dtype)
        tensors["weight"] = weight.transpose(1, 2).contiguous() if kind.transposed else weight
        if kind.bias:
            tensors["bias"] = torch.randn(E, rows, generator=generator).to(dtype)
        pools = in_slots(tensors, list(range(E))[::-1] if slots is None else slots, spare)
        stored = pools["weight"]
        if kind.transposed:
            stored = Pool(data=stored.data.transpose(1, 2), slot_of_E=stored.slot_of_E)
        return Projection(weight=stored, bias=pools.get("bias"), scale=pools.get("scale"), gate=gate)

    return Layer(up=projection(2 * F if kind.gate.gated else F, D, kind.gate), down=projection(D, F, Gate()), D=D, F=F)


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """The input of one call."""

    x_TD: Tensor
    ids_TA: Tensor
    weights_TA: Tensor

    def rows(self, order: Tensor) -> Routed:
        return Routed(x_TD=self.x_TD[order], ids_TA=self.ids_TA[order], weights_TA=self.weights_TA[order])


def routed(layer: Layer, ids: Any, *, weights: Any = None, seed: int = 0, A: int = 1) -> Routed:
    """Draw tokens for given expert ids [T, A] (and routing weights)."""
    ids_TA = torch.as_tensor(ids, dtype=torch.int64).view(len(ids), -1 if len(ids) else A)
    T, A = ids_TA.shape
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(T, layer.D, generator=generator)
    weights_TA = torch.rand(T, A, generator=generator) + 0.1
    if weights is not None:
        weights_TA = torch.as_tensor(weights, dtype=torch.float32).view(T, A)
    dtype = layer.up.weight.data.dtype if layer.up.scale is None else torch.float32
    return Routed(x_TD=x_TD.to(dtype).to(DEVICE), ids_TA=ids_TA.to(DEVICE), weights_TA=weights_TA.to(DEVICE))


def draw(T: int, A: int, E: int, seed: int = 0) -> Tensor:
    """Return A distinct experts for each of T tokens; with more than E of them, each once and then again."""
    generator = torch.Generator().manual_seed(seed)
    picks = [torch.randperm(max(A, E), generator=generator)[:A] % E for _ in range(T)]
    return torch.stack(picks) if picks else torch.empty((0, A), dtype=torch.int64)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def run(
    layer: Layer,
    call: Routed,
    *,
    impl: Any = KERNELS,
    by_rows: bool | None = None,
    table: TileTable = TABLE,
    up_waves: Sequence[Sequence[int]] | None = None,
    down_waves: Sequence[Sequence[int]] | None = None,
    up_tables: Sequence[Layer] = (),
    down_tables: Sequence[Layer] = (),
    rank_E: Tensor | None = None,
    identities: int = 0,
    small: int = schedule.SMALL,
) -> Tensor:
    """Compute the layer into poisoned outputs: at once, in waves, or once for each state of the slots."""
    T, A = call.ids_TA.shape
    R = T * A
    shape = Call(T=T, A=A, E=layer.E, dtype=call.x_TD.dtype)
    by_rows = shape.by_rows if by_rows is None else by_rows
    plan = None
    if not by_rows:
        block = table.block(shape)
        plan = impl.schedule(call.ids_TA, call.weights_TA, rank_E, experts=layer.E, block=block, small=small)
    h_RF = poisoned(R, layer.F, dtype=call.x_TD.dtype)
    y_RD = poisoned(R, layer.D, dtype=torch.float32)
    for part, out, x, waves, tables in (
        ("up", h_RF, call.x_TD, up_waves, up_tables),
        ("down", y_RD, h_RF, down_waves, down_tables),
    ):
        up = part == "up"
        for wave, state in zip(
            waves or [None] * max(len(tables), 1), tables or [layer] * len(waves or [0]), strict=True
        ):
            projection = getattr(state, part)
            gate = projection.gate
            product = Shape(N=projection.N, K=projection.K, gated=gate.gated, transposed=projection.is_transposed)
            wave_E = None
            if wave is not None:
                wave_E = torch.zeros(layer.E, dtype=torch.int32, device=DEVICE)
                wave_E[list(wave)] = 1
            how: Any = {"weighted": not up}
            if plan is None:
                how |= {"tile": table.rows(shape, product)}
                impl.rows_product(out, x, call.ids_TA, call.weights_TA, projection, wave_E, **how)
            else:
                how |= {"tile": table.grouped(shape, product), "gather": up}
                impl.grouped_product(out, x, plan, call.weights_TA, projection, wave_E, **how)
    order = None if plan is None else plan.row_of_R
    result: Tensor = impl.combine(
        y_RD, order, call.x_TD, call.ids_TA, call.weights_TA, experts=layer.E, identities=identities, weighted=True
    )
    return result


def reference(layer: Layer, call: Routed, identities: int = 0) -> Tensor:
    """Compute the layer in float64, expert by expert, from the weights as they lie in slots."""
    y_TD = torch.zeros(call.x_TD.shape, dtype=torch.float64, device=DEVICE)
    for e in sorted(set(call.ids_TA.flatten().tolist())):
        for t, a in (call.ids_TA == e).nonzero().tolist():
            weight = float(call.weights_TA[t, a].double())
            if weight == 0 or e >= layer.E + identities:
                continue
            x_D = call.x_TD[t].double()
            y_D = x_D if e >= layer.E else twins.product(twins.product(x_D, e, layer.up), e, layer.down)
            y_TD[t] += weight * y_D
    return y_TD


def check(layer: Layer, call: Routed, got: Tensor, identities: int = 0) -> None:
    """Fail unless a result is as near to float64 as its type allows."""
    assert got.dtype == call.x_TD.dtype
    assert got.shape == call.x_TD.shape
    assert twins.error(got, reference(layer, call, identities)) <= TOLERANCES[got.dtype]
