"""Layers of a given shape: random experts in slots, calls of them, and what those give in float64.

What tuning and benchmarks compute with. Several sets of experts take turns, so that what a call reads lies in no cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from promoe_triton.kernels.pool import Gate, Pool, Projection
from promoe_triton.kernels.shapes import LayerShape

CACHES = 8
"""Calls that follow each other read this many times the L2 cache before one reads the same bytes again."""

UNIT = 64
"""Elements. Tensors in a slot begin at multiples of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """One set of experts in slots of one buffer, in no order. tensors: the same as stacked tensors [E, ...], by name.

    Names: gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias, in the layout of transformers' modules.
    """

    shape: LayerShape
    pools: dict[str, Pool]

    @property
    def up(self) -> Projection:
        return self._projection(self.pools, "gate_up_proj", self.shape.gate)

    @property
    def down(self) -> Projection:
        return self._projection(self.pools, "down_proj", Gate())

    def dense(self) -> dict[str, Tensor]:
        """Return copies of the tensors, stacked expert by expert."""
        stacked = {}
        for name, pool in self.pools.items():
            data = pool.data
            stacked[name] = torch.empty((self.shape.E, *data.shape[1:]), dtype=data.dtype, device=data.device)
            for e, slot in enumerate(pool.slot_of_E.tolist()):
                stacked[name][e] = data[slot]
        return stacked

    def without_slots(self, dense: dict[str, Tensor]) -> tuple[Projection, Projection]:
        """Return both projections over stacked tensors, whose table is the identity."""
        slot_of_E = torch.arange(self.shape.E, dtype=torch.int32, device=dense["down_proj"].device)
        pools = {name: Pool(data=tensor, slot_of_E=slot_of_E) for name, tensor in dense.items()}
        return (
            self._projection(pools, "gate_up_proj", self.shape.gate),
            self._projection(pools, "down_proj", Gate()),
        )

    def _projection(self, pools: dict[str, Pool], name: str, gate: Gate) -> Projection:
        weight = pools[name]
        if self.shape.transposed:
            weight = Pool(data=weight.data.transpose(1, 2), slot_of_E=weight.slot_of_E)
        return Projection(weight=weight, bias=pools.get(f"{name}_bias"), gate=gate)


def draw_experts(shape: LayerShape, dtype: torch.dtype, generator: torch.Generator) -> Experts:
    """Draw experts whose products keep the size of their input, on the generator's device."""
    device = generator.device

    def stored(rows: int, K: int) -> tuple[int, ...]:
        return (K, rows) if shape.transposed else (rows, K)

    parts = {"gate_up_proj": stored(shape.up_rows, shape.D), "down_proj": stored(shape.D, shape.F)}
    if shape.biased:
        parts |= {"gate_up_proj_bias": (shape.up_rows,), "down_proj_bias": (shape.D,)}
    sizes = {name: -(-torch.Size(part).numel() // UNIT) * UNIT for name, part in parts.items()}
    slot = sum(sizes.values())
    buffer = torch.empty(shape.E * slot, dtype=dtype, device=device)
    slot_of_E = torch.randperm(shape.E, generator=generator, device=device).to(torch.int32)
    spread = {"gate_up_proj": shape.D**-0.5, "down_proj": shape.F**-0.5}
    pools, begin = {}, 0
    for name, part in parts.items():
        strides = tuple(torch.empty(part, device="meta").stride())
        data = buffer.as_strided((shape.E, *part), (slot, *strides), begin)
        data.normal_(0.0, spread.get(name, 0.1), generator=generator)
        pools[name] = Pool(data=data, slot_of_E=slot_of_E)
        begin += sizes[name]
    return Experts(shape=shape, pools=pools)


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """The input of one call."""

    x_TD: Tensor
    ids_TA: Tensor
    weights_TA: Tensor

    @property
    def experts(self) -> int:
        """How many distinct experts it needs."""
        return int(self.ids_TA.unique().numel())


def draw_call(shape: LayerShape, T: int, dtype: torch.dtype, generator: torch.Generator) -> Routed:
    """Draw T tokens that choose their experts evenly: real routers repeat experts more, which reads fewer bytes."""
    device = generator.device
    x_TD = torch.randn(T, shape.D, generator=generator, device=device).to(dtype)
    ids_TA = torch.rand(T, shape.E, generator=generator, device=device).topk(shape.A, dim=1).indices
    weights_TA = torch.randn(T, shape.A, generator=generator, device=device).softmax(1).to(dtype)
    return Routed(x_TD=x_TD, ids_TA=ids_TA.contiguous(), weights_TA=weights_TA)


def sets_needed(shape: LayerShape, T: int, dtype: torch.dtype, cache_bytes: int) -> int:
    """Return how many sets of experts must take turns, for calls of T tokens to read CACHES times the cache."""
    least = min(shape.E, shape.A) * shape.expert_bytes(dtype)
    if T > 1:
        # Of E experts, A of them for each of T tokens leave out (1 - A / E) ** T on average; a bound is enough here.
        least = int(shape.E * (1.0 - (1.0 - shape.A / shape.E) ** T) * shape.expert_bytes(dtype) * 0.9)
    return max(-(-CACHES * cache_bytes // max(least, 1)), 1)


ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda g: g,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu2": lambda g: g.clamp(min=0).square(),
}


def activated(y_RN: Tensor, gate: Gate) -> Tensor:
    """Return what becomes of the columns of a product, in the type of the rows."""
    if not gate.gated:
        return ONE[gate.activation](y_RN)
    g, u = (y_RN[:, ::2], y_RN[:, 1::2]) if gate.interleaved else y_RN.chunk(2, dim=1)
    if gate.activation == "clamped_swiglu":
        g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
        return g * torch.sigmoid(gate.alpha * g) * (u + 1)
    return ONE[gate.activation](g) * u


def product_in_float64(x_RK: Tensor, expert_of_R: Tensor, projection: Projection) -> Tensor:
    """Return every row's product with its own expert, activated, in float64: one expert after the other."""
    out_RN = torch.empty((x_RK.shape[0], projection.N), dtype=torch.float64, device=x_RK.device)

    def tensor(pool: Pool, e: int) -> Tensor:
        return pool.data[int(pool.slot_of_E[e])].double()

    for e in expert_of_R.unique().tolist():
        rows = (expert_of_R == e).nonzero()[:, 0]
        y_RN = x_RK[rows].double() @ tensor(projection.weight, e).T
        if projection.bias is not None:
            y_RN += tensor(projection.bias, e)
        out_RN[rows] = activated(y_RN, projection.gate)
    return out_RN


def layer_in_float64(experts: Experts, call: Routed) -> Tensor:
    """Return the layer's output [T, D] in float64, nothing rounded between the stages."""
    T, A = call.ids_TA.shape
    expert_of_R = call.ids_TA.flatten()
    h_RF = product_in_float64(call.x_TD.repeat_interleave(A, 0), expert_of_R, experts.up)
    y_RD = product_in_float64(h_RF, expert_of_R, experts.down)
    return (y_RD * call.weights_TA.double().view(-1, 1)).view(T, A, -1).sum(1)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the relative error in the L2 norm; infinite where anything is not a finite number."""
    difference = float((got.double() - want).norm()) / max(float(want.norm()), 1e-30)
    return difference if difference < float("inf") else float("inf")
