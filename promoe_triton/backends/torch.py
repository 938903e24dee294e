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
| rows    | expert -> index | which of the groups of rows, cut from arrays of R rows, is its own |
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from promoe_triton.layout import ExpertLayout
from promoe_triton.protocols import ExpertSpec, ExpertTensors, LayerKernels

VECTOR, PLAIN = 0, 1
"""Ways to compute the product of one row (see `row_parts`) that do not cut it."""


class TorchBackend:
    """Plain torch: any dtype and device, exact on a CPU."""

    name = "torch"

    def layer(self, experts: nn.Module, layout: ExpertLayout, spec: ExpertSpec) -> LayerKernels[Any]:
        return ByExpert(experts, layout, spec) if layout.by_expert else Grouped(experts, layout, spec)


@dataclass(slots=True, kw_only=True, eq=False)
class Rows:
    """One call: its routing, and what the stages have computed so far.

    Every group of rows also comes as a view of its own, in lists: slicing anew for every product would cost as much
    as the rest of the bookkeeping.
    """

    x_TD: Tensor
    weights_TA: Tensor
    order_R: Tensor | None
    rows: dict[int, int]
    sizes: Sequence[int]
    up_RN: Tensor
    down_RD: Tensor
    x_groups: Sequence[Tensor]
    up_groups: Sequence[Tensor]
    down_groups: Sequence[Tensor]
    h_groups: Sequence[Tensor] = ()
    up_parts: int = PLAIN
    down_parts: int = PLAIN

    @property
    def asked(self) -> Tensor | None:
        return None

    @property
    def experts(self) -> Collection[int]:
        return self.rows.keys()

    def of(self, experts: Sequence[int] | None) -> Iterable[tuple[int, int]]:
        """Return these experts (None: all) with the indices of their groups of rows."""
        return self.rows.items() if experts is None else [(e, self.rows[e]) for e in experts]


class OneToken(Rows):
    """The call of one token. Its arrays, with a view of every row, are kept from call to call.

    up_RN and down_RD receive the products. Where gate and up are the halves of up_RN and combined in the usual
    way, h_RF receives the activation. Rows are as `row_parts` has them.
    """

    def __init__(self, A: int, N: int, D: int, like: Tensor, usual_gate: bool, parts: tuple[int, int]) -> None:
        up_RN, down_RD = like.new_empty((A, N)), like.new_empty((A, D))
        super().__init__(
            x_TD=like,
            weights_TA=like,
            order_R=None,
            rows={},
            sizes=(1,) * A,
            up_RN=up_RN,
            down_RD=down_RD,
            x_groups=(),
            up_groups=rows_out(up_RN, parts[0]),
            down_groups=rows_out(down_RD, parts[1]),
            up_parts=parts[0],
            down_parts=parts[1],
        )
        self.sorted_A: list[int] = []
        self.gate_RF, self.up_RF = up_RN[:, : N // 2], up_RN[:, N // 2 :]
        self.h_RF = like.new_empty((A, N // 2)) if usual_gate else None
        if self.h_RF is not None:
            self.h_groups = rows_in(self.h_RF, self.down_parts)
        self.down_1AD = down_RD.unsqueeze(0)


def row_parts(weight_NK: Tensor) -> int:
    """Return how the product of a single row is computed: into how many parts it is cut along N, or `VECTOR`.

    The CPU library runs the fp32 product of one row on one thread. Cut into a batch of smaller products, one for
    each thread, it uses all of them. In half precision a matrix-vector product takes less time than a matrix product
    with one row. Neither must change a bit, which depends on the processor, the library and the shape: so it is tried,
    and left alone (`PLAIN`) where anything differs.
    """
    N, K = weight_NK.shape
    threads, parts = torch.get_num_threads(), VECTOR
    if weight_NK.dtype == torch.float32:
        parts = threads
        if N % parts or (N // parts * K) % 16:
            return PLAIN
    return parts if _sums_alike(N, K, weight_NK.dtype, weight_NK.device, parts, threads) else PLAIN


@functools.cache
def _sums_alike(N: int, K: int, dtype: torch.dtype, device: torch.device, parts: int, threads: int) -> bool:
    """Whether a product in these parts adds up in the order in which `torch.mm` does, with so many threads.

    Of random numbers another order changes some results in thousands. Here every sum is zero: what is computed is what
    rounding has left, all of which depends on the order.
    """
    generator = torch.Generator().manual_seed(0)
    half = K // 2
    # Far enough from one that what is left is no denormal number of half precision.
    x_1K, weight_NK = (32 * torch.randn((rows, K), generator=generator).to(device, dtype) for rows in (1, N))
    order = torch.randperm(half, generator=generator).to(device)
    x_1K[:, half] = 0.0  # has no partner where K is odd
    x_1K[:, K - half :] = x_1K[:, :half][:, order]
    weight_NK[:, K - half :] = -weight_NK[:, :half][:, order]
    out_1N = x_1K.new_empty((1, N))
    products(parts, rows_in(x_1K, parts), [row_operand(weight_NK, parts)], None, rows_out(out_1N, parts), [(0, 0)])
    return torch.equal(out_1N, torch.mm(x_1K, weight_NK.t()))


def row_operand(weight_NK: Tensor, parts: int) -> Tensor:
    """Return the view of a weight that `products` takes."""
    if parts == VECTOR:
        return weight_NK
    N, K = weight_NK.shape
    return weight_NK.t() if parts == PLAIN else weight_NK.view(parts, N // parts, K).transpose(1, 2)


def rows_in(in_AK: Tensor, parts: int) -> Sequence[Tensor]:
    """Return each row as `products` takes it: [K], [1, K] or [parts, 1, K] without a copy."""
    if parts == VECTOR:
        return in_AK.unbind()
    rows = torch.split(in_AK, 1)
    return rows if parts == PLAIN else [row.expand(parts, 1, -1) for row in rows]


def rows_out(out_AN: Tensor, parts: int) -> Sequence[Tensor]:
    """Return each row as `products` fills it: [N], [1, N] or [parts, 1, N / parts]."""
    if parts == VECTOR:
        return out_AN.unbind()
    rows = torch.split(out_AN, 1)
    return rows if parts == PLAIN else [row.view(parts, 1, -1) for row in rows]


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
            self.dtype = tensor.dtype

    def remove(self, expert: int) -> None:
        for column in self.tensors.values():
            column[expert] = None

    def graph_form(self) -> None:
        """There is none: which rows go together follows from what the host has read."""


class Grouped(_Placed):
    """Rounding as in transformers' grouped_mm, the default implementation of nearly all families."""

    def __init__(self, experts: nn.Module, layout: ExpertLayout, spec: ExpertSpec) -> None:
        super().__init__(experts, layout, spec)
        (self.up_name,), (self.down_name,) = layout.up, layout.down
        self.N = self.shapes[self.up_name][-1 if self.up_name in layout.transposed else 0]
        self.D = self.shapes[self.down_name][-1 if self.down_name in layout.transposed else 0]
        self._one: dict[int, OneToken] = {}
        self._parts: dict[str, int] = {}
        self._row_operands: dict[str, list[Any]] = {}
        # act(gate) * up: known to be that, it can be computed in place of the same two operations on a copy.
        kind: Any = type(experts)
        self._norm: Any = experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None
        self._usual_gate = bool(experts.has_gate) and kind._apply_gate is _default_apply_gate and self._norm is None
        activation: Any = getattr(experts, "act_fn", None)
        # The function itself, where it is known: calling a module costs as much as activating one token's rows.
        self._activation = F.silu if isinstance(activation, nn.SiLU | SiLUActivation) else activation

    def place(self, expert: int, tensors: ExpertTensors) -> None:
        if any(tensor.dtype != self.dtype for tensor in tensors.values()):
            self._parts.clear()  # resident weights were cast
            self._one.clear()
        super().place(expert, tensors)
        for name in (self.up_name, self.down_name):
            if name not in tensors:
                continue
            if name not in self._parts:
                plain = self.layout.up_bias or name not in self._turned
                self._parts[name] = PLAIN if plain else row_parts(tensors[name])
                self._row_operands[name] = [None] * self.layout.experts
                self._one.clear()
            if (parts := self._parts[name]) != PLAIN:
                self._row_operands[name][expert] = row_operand(tensors[name], parts)

    def remove(self, expert: int) -> None:
        super().remove(expert)
        for column in self._row_operands.values():
            column[expert] = None

    def begin(self, x_TD: Tensor, expert_ids_TA: Tensor, weights_TA: Tensor) -> Rows:
        T, A = expert_ids_TA.shape
        x = x_TD if x_TD.dtype == self.dtype else x_TD.to(self.dtype)
        if T == 1:
            (ids,) = expert_ids_TA.tolist()
            if len(set(ids)) == A:
                return self._begin_one(x_TD, x, ids, weights_TA)
        order_R, chosen = _group(*torch.sort(expert_ids_TA.reshape(-1)))
        weights_R = weights_TA.reshape(-1)
        zero = weights_R[order_R].eq(0).tolist() if (weights_R == 0).any() else None
        needed = _needed(chosen, self.layout.experts, zero)
        x_RD = x.index_select(0, order_R // A)
        if len(needed) == len(chosen) and x.shape[1] == self.D:
            # What goes in is not needed any more when the first row of the second product comes out.
            up_RN, down_RD = x.new_empty((T * A, self.N)), x_RD
        else:
            # Rows nobody computes, of sentinels and zero weights, must read as zero.
            up_RN, down_RD = x.new_zeros((T * A, self.N)), x.new_zeros((T * A, self.D))
        sizes = [last - first for first, last in chosen.values()]
        return Rows(
            x_TD=x_TD,
            weights_TA=weights_TA,
            order_R=order_R,
            rows={e: index for index, e in enumerate(chosen) if e in needed},
            sizes=sizes,
            up_RN=up_RN,
            down_RD=down_RD,
            x_groups=x_RD.split_with_sizes(sizes),
            up_groups=up_RN.split_with_sizes(sizes),
            down_groups=down_RD.split_with_sizes(sizes),
        )

    def _begin_one(self, x_TD: Tensor, x: Tensor, ids: list[int], weights_TA: Tensor) -> Rows:
        A = len(ids)
        one = self._one.get(A)
        if one is None:
            parts = (self._parts.get(self.up_name, PLAIN), self._parts.get(self.down_name, PLAIN))
            one = self._one[A] = OneToken(A, self.N, self.D, x, self._usual_gate, parts)
        rows = dict(zip(ids, range(A), strict=True))
        (weights,) = weights_TA.tolist()
        if 0.0 in weights or max(ids) >= self.layout.experts or min(ids) < 0:
            zero = [weight == 0.0 for weight in weights]
            needed = _needed({e: (a, a + 1) for e, a in rows.items()}, self.layout.experts, zero)
            rows = {e: rows[e] for e in needed}
            one.up_RN.zero_()
            one.down_RD.zero_()
        one.x_TD, one.weights_TA, one.rows = x_TD, weights_TA, rows
        one.sorted_A = sorted(range(A), key=ids.__getitem__)
        one.x_groups = [*rows_in(x, one.up_parts)] * A
        return one

    def up(self, call: Rows, experts: Sequence[int] | None) -> None:
        weights, biases = self._operands(self.up_name, self.layout.up_bias, call.up_parts)
        products(call.up_parts, call.x_groups, weights, biases, call.up_groups, call.of(experts))

    def activate(self, call: Rows) -> None:
        if self._usual_gate:
            if isinstance(call, OneToken) and call.h_RF is not None:
                if self._activation is F.silu:
                    silu: Any = torch._C._nn.silu  # what F.silu calls, which takes no `out`
                    silu(call.gate_RF, out=call.h_RF).mul_(call.up_RF)
                else:
                    torch.mul(self._activation(call.gate_RF), call.up_RF, out=call.h_RF)
                return
            gate_RF, up_RF = call.up_RN.chunk(2, dim=-1)
            h_RF = self._activation(gate_RF).mul_(up_RF)
        elif isinstance(call, OneToken):
            # In the order in which grouped_mm has them: the last elements of an array that fill no vector register
            # go through another exp.
            order_A = torch.tensor(call.sorted_A)
            sorted_RF = self._own_gate(call.up_RN[order_A])
            h_RF = torch.empty_like(sorted_RF).index_copy_(0, order_A, sorted_RF)
        else:
            h_RF = self._own_gate(call.up_RN)
        call.h_groups = (
            h_RF.split_with_sizes(call.sizes) if call.order_R is not None else rows_in(h_RF, call.down_parts)
        )

    def _own_gate(self, up_RN: Tensor) -> Tensor:
        module = self.module
        h_RF: Tensor = module._apply_gate(up_RN) if module.has_gate else module.act_fn(up_RN)
        return h_RF

    def down(self, call: Rows, experts: Sequence[int] | None) -> None:
        weights, biases = self._operands(self.down_name, self.layout.down_bias, call.down_parts)
        products(call.down_parts, call.h_groups, weights, biases, call.down_groups, call.of(experts))

    def _operands(self, weight: str, bias: str | None, parts: int) -> tuple[Sequence[Tensor], Sequence[Tensor] | None]:
        weights = self.tensors[weight] if parts == PLAIN else self._row_operands[weight]
        return weights, self.tensors[bias] if bias else None

    def combine(self, call: Rows) -> Tensor:
        T, A = call.weights_TA.shape
        if isinstance(call, OneToken) and self._usual_gate and call.weights_TA.dtype == self.dtype == call.x_TD.dtype:
            call.down_RD.mul_(call.weights_TA.t())
            return call.down_1AD.sum(dim=1)
        y_RD, weights_R1 = call.down_RD, call.weights_TA.reshape(-1, 1)
        if self._norm is not None:
            y_RD = self._norm(y_RD)
        if call.order_R is not None:
            y_RD = torch.empty_like(y_RD).index_copy_(0, call.order_R, y_RD)
        # In place where the type stays: the array is not needed any more.
        y_RD = y_RD.mul_(weights_R1) if weights_R1.dtype == y_RD.dtype else y_RD * weights_R1
        y_TD = y_RD.view(T, A, self.D).sum(dim=1)
        return y_TD if y_TD.dtype == call.x_TD.dtype else y_TD.to(call.x_TD.dtype)


def products(
    parts: int,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    outputs: Sequence[Tensor],
    rows: Iterable[tuple[int, int]],
) -> None:
    """Compute one product for each expert and the index of its group of rows; `parts` as in `row_parts`."""
    if parts == VECTOR:
        for e, group in rows:
            torch.mv(weights[e], inputs[group], out=outputs[group])
        return
    product = torch.mm if parts == PLAIN else torch.bmm
    for e, group in rows:
        product(inputs[group], weights[e], out=outputs[group])
        if biases is not None:
            outputs[group].add_(biases[e])


@dataclass(slots=True, kw_only=True, eq=False)
class Groups:
    """One call of `ByExpert`: the rows of each expert, and the states that replace them stage by stage."""

    x_TD: Tensor
    rows: dict[int, Tensor]
    weights: dict[int, Tensor]
    experts: list[int]
    states: dict[int, Any]

    @property
    def asked(self) -> Tensor | None:
        return None


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
        zero = weights_R[order_R].eq(0).tolist() if (weights_R == 0).any() else None
        needed = _needed(chosen, known, zero)
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
    chosen: dict[int, tuple[int, int]], experts: int, zero: Sequence[bool] | None
) -> dict[int, tuple[int, int]]:
    """Leave out sentinels (ids of `experts` and more) and experts whose every row has weight zero.

    zero: for each row whether its weight is; None where none is.
    """
    if chosen and (min(chosen) < 0 or max(chosen) >= experts):
        if min(chosen) < 0:
            raise ValueError(f"expert ids must be 0 or more, got {min(chosen)}")
        chosen = {e: rows for e, rows in chosen.items() if e < experts}
    if zero is not None:
        chosen = {e: (first, last) for e, (first, last) in chosen.items() if not all(zero[first:last])}
    return chosen
