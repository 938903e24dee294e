"""The layer's stages in plain torch, bit for bit what the stock model computes on a CPU.

    h = activation(x W_up^T + b_up)          rows grouped by expert, one product per expert
    y = sum over a of weight_a * (h W_down^T + b_down)

Only routed experts are touched, where they lie: no weights are gathered. What makes the bits equal is that
every operation has the operands of transformers' own path: the same rows in one product, activation over the
same rows at once, the same order of summation. A product per expert rounds the same wherever the expert lies
and whenever it is computed, so the split into waves cannot be seen in the result.

| name    | shape           | meaning                                                         |
|---------|-----------------|-----------------------------------------------------------------|
| order_R | R               | the pair (t * A + a) that stands at each row, rows by expert     |
|         |                 | (None: one token, its rows in the order its experts were chosen) |
| rows    | expert -> range | first and last + 1 row of each needed expert                     |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_triton.layout import ExpertLayout
from promoe_triton.protocols import ExpertSpec, ExpertTensors, LayerKernels


class TorchBackend:
    """Plain torch: any dtype and device, exact on a CPU."""

    name = "torch"

    def layer(self, experts: nn.Module, layout: ExpertLayout, spec: ExpertSpec) -> LayerKernels[Any]:
        return ByExpert(experts, layout, spec) if layout.by_expert else Grouped(experts, layout, spec)


@dataclass(slots=True, kw_only=True, eq=False)
class Rows:
    """One call: its routing, and what the stages have computed so far."""

    x_TD: Tensor
    weights_TA: Tensor
    order_R: Tensor | None
    rows: dict[int, tuple[int, int]]
    x_RD: Tensor
    up_RN: Tensor
    h_RF: Tensor
    down_RD: Tensor

    @property
    def experts(self) -> list[int]:
        return list(self.rows)


class _Placed:
    """The tensors of the experts that are readable now: for each name a list over experts."""

    def __init__(self, experts: nn.Module, layout: ExpertLayout, spec: ExpertSpec) -> None:
        self.module: Any = experts
        self.layout = layout
        self.dtype = spec.tensors[0].dtype
        self.shapes = {tensor.name: tensor.shape for tensor in spec.tensors}
        self.tensors: dict[str, list[Any]] = {name: [None] * layout.experts for name in layout.names}
        # A product wants [K, N]; turning the view once when it is placed saves it at every use.
        self._turned = {*layout.up, *layout.down} - {*layout.transposed}

    def place(self, expert: int, tensors: ExpertTensors) -> None:
        for name, tensor in tensors.items():
            self.tensors[name][expert] = tensor.t() if name in self._turned else tensor

    def remove(self, expert: int) -> None:
        for column in self.tensors.values():
            column[expert] = None


class Grouped(_Placed):
    """Rounding as in transformers' grouped_mm, the default implementation of nearly all families."""

    def __init__(self, experts: nn.Module, layout: ExpertLayout, spec: ExpertSpec) -> None:
        super().__init__(experts, layout, spec)
        (self.up_name,), (self.down_name,) = layout.up, layout.down
        self.N = self.shapes[self.up_name][-1 if self.up_name in layout.transposed else 0]
        self.D = self.shapes[self.down_name][-1 if self.down_name in layout.transposed else 0]

    def begin(self, x_TD: Tensor, expert_ids_TA: Tensor, weights_TA: Tensor) -> Rows:
        T, A = expert_ids_TA.shape
        order_R = None
        chosen: dict[int, tuple[int, int]] = {}
        if T == 1:
            chosen = {e: (a, a + 1) for a, e in enumerate(expert_ids_TA.view(-1).tolist())}
        if len(chosen) < A:  # more than one token, or one expert chosen twice for it
            order_R, chosen = _group(*torch.sort(expert_ids_TA.reshape(-1)))
        needed = _needed(chosen, self.layout.experts, weights_TA, order_R)
        x = x_TD if x_TD.dtype == self.dtype else x_TD.to(self.dtype)
        # Rows nobody computes, of sentinels and zero weights, must read as zero.
        empty = x.new_empty if len(needed) == len(chosen) else x.new_zeros
        return Rows(
            x_TD=x_TD,
            weights_TA=weights_TA,
            order_R=order_R,
            rows=needed,
            x_RD=x.expand(A, -1) if order_R is None else x[order_R // A],
            up_RN=empty((T * A, self.N)),
            h_RF=x,
            down_RD=empty((T * A, self.D)),
        )

    def up(self, call: Rows, experts: Sequence[int] | None) -> None:
        self._products(call, call.x_RD, self.up_name, self.layout.up_bias, call.up_RN, experts)

    def activate(self, call: Rows) -> None:
        module = self.module
        call.h_RF = module._apply_gate(call.up_RN) if module.has_gate else module.act_fn(call.up_RN)

    def down(self, call: Rows, experts: Sequence[int] | None) -> None:
        self._products(call, call.h_RF, self.down_name, self.layout.down_bias, call.down_RD, experts)

    def combine(self, call: Rows) -> Tensor:
        T, A = call.weights_TA.shape
        y_RD = call.down_RD
        if self.module.has_post_expert_norm:
            y_RD = self.module.post_expert_norm(y_RD)
        if call.order_R is not None:
            y_RD = torch.empty_like(y_RD).index_copy_(0, call.order_R, y_RD)
        y_RD = y_RD * call.weights_TA.reshape(-1, 1)
        return y_RD.view(T, A, self.D).sum(dim=1).to(call.x_TD.dtype)

    def _products(
        self,
        call: Rows,
        in_RK: Tensor,
        weight: str,
        bias: str | None,
        out_RN: Tensor,
        experts: Sequence[int] | None,
    ) -> None:
        weights = self.tensors[weight]
        biases = self.tensors[bias] if bias else None
        rows = call.rows
        if call.order_R is None:
            in_rows, out_rows = torch.split(in_RK, 1), torch.split(out_RN, 1)
        for e in rows if experts is None else experts:
            first, last = rows[e]
            if call.order_R is None:
                x, out = in_rows[first], out_rows[first]
            else:
                x, out = in_RK[first:last], out_RN[first:last]
            torch.mm(x, weights[e], out=out)
            if biases is not None:
                out.add_(biases[e])


@dataclass(slots=True, kw_only=True, eq=False)
class Groups:
    """One call of `ByExpert`: the rows of each expert, and the states that replace them stage by stage."""

    x_TD: Tensor
    rows: dict[int, Tensor]
    weights: dict[int, Tensor]
    experts: list[int]
    states: dict[int, Any]


class ByExpert(_Placed):
    """Rounding as in a loop over experts, for families that transformers runs no other way.

    Experts without a down projection are a single product: their rows are returned as they come.
    """

    def __init__(self, experts: nn.Module, layout: ExpertLayout, spec: ExpertSpec) -> None:
        super().__init__(experts, layout, spec)
        last = (layout.down or layout.up)[-1]
        self.D = self.shapes[last][-1 if last in layout.transposed else 0]

    def begin(self, x_TD: Tensor, expert_ids_TA: Tensor, weights_TA: Tensor) -> Groups:
        # Pairs are enumerated position by position, the order in which a one-hot mask [A, T] yields them.
        order_R, chosen = _group(*torch.sort(expert_ids_TA.t().reshape(-1), stable=True))
        weights_R = weights_TA.t().reshape(-1)
        known = self.layout.experts + self.layout.identities
        needed = _needed(chosen, known, weights_R, order_R)
        token_R = order_R % max(x_TD.shape[0], 1)
        rows = {e: token_R[first:last] for e, (first, last) in needed.items()}
        return Groups(
            x_TD=x_TD,
            rows=rows,
            weights={e: weights_R[order_R[first:last]] for e, (first, last) in needed.items()},
            experts=[e for e in needed if e < self.layout.experts],
            states={e: x_TD[tokens] for e, tokens in rows.items()},
        )

    def up(self, call: Groups, experts: Sequence[int] | None) -> None:
        for e in call.experts if experts is None else experts:
            x = call.states[e]
            call.states[e] = [self._linear(x, name, self.layout.up_bias, e) for name in self.layout.up]

    def activate(self, call: Groups) -> None:
        for e in call.experts:
            call.states[e] = self._activate(*call.states[e])

    def _activate(self, up: Tensor, *more: Tensor) -> Tensor:
        if not self.layout.down:
            return up
        if not more and hasattr(self.module, "_apply_gate"):
            gated: Tensor = self.module._apply_gate(up)
            return gated
        gate, up = (up, *more) if more else up.chunk(2, dim=-1)
        activation = attrgetter(self.layout.activation)(self.module)
        activated: Tensor = activation(gate) * up
        return activated

    def down(self, call: Groups, experts: Sequence[int] | None) -> None:
        for e in call.experts if experts is None else experts:
            for name in self.layout.down:
                call.states[e] = self._linear(call.states[e], name, self.layout.down_bias, e)

    def combine(self, call: Groups) -> Tensor:
        dtype = torch.float32 if self.layout.single else call.x_TD.dtype
        out_TD = call.x_TD.new_zeros((call.x_TD.shape[0], self.D), dtype=dtype)
        for e, tokens in call.rows.items():
            y = call.states[e] * call.weights[e].unsqueeze(-1)
            out_TD.index_add_(0, tokens, y.to(dtype))
        return out_TD.to(call.x_TD.dtype)

    def _linear(self, x: Tensor, weight: str, bias: str | None, expert: int) -> Tensor:
        weight_NK = self.tensors[weight][expert].t()
        bias_N = self.tensors[bias][expert] if bias else None
        if self.layout.single:
            x, weight_NK = x.float(), weight_NK.float()
            bias_N = None if bias_N is None else bias_N.float()
        y = F.linear(x, weight_NK)
        return y if bias_N is None else y + bias_N


def _group(sorted_ids_R: Tensor, order_R: Tensor) -> tuple[Tensor, dict[int, tuple[int, int]]]:
    """Return the order and each expert's first and last + 1 row in it, by ascending expert."""
    ids, counts = torch.unique_consecutive(sorted_ids_R, return_counts=True)
    ends = list(accumulate(counts.tolist()))
    return order_R, dict(zip(ids.tolist(), zip([0, *ends], ends, strict=False), strict=True))


def _needed(
    chosen: dict[int, tuple[int, int]], experts: int, weights: Tensor, order_R: Tensor | None
) -> dict[int, tuple[int, int]]:
    """Leave out sentinels (ids of `experts` and more) and experts whose every weight is zero."""
    if chosen and (min(chosen) < 0 or max(chosen) >= experts):
        if min(chosen) < 0:
            raise ValueError(f"expert ids must be 0 or more, got {min(chosen)}")
        chosen = {e: rows for e, rows in chosen.items() if e < experts}
    flat = weights.reshape(-1)
    if (flat == 0).any():
        zero = (flat if order_R is None else flat[order_R]).eq(0).tolist()
        chosen = {e: (first, last) for e, (first, last) in chosen.items() if not all(zero[first:last])}
    return chosen
