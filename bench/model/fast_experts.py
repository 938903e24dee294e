"""Experts for training on a CPU: rows sorted by expert, one matrix product per expert, nothing padded.

Registered as an experts implementation of transformers, so the model, its parameters and its checkpoint stay
those of ``Qwen3MoeForCausalLM``.  All tensors are fp32 but the indices.

Letters: T tokens, A active experts per token, R = T * A routed rows, E experts, D model size, F expert size.

=================  ========  ===================================================
token_R            int64[R]  token of each row; rows are sorted by expert
place_TA           int64     where the row of each token's choice went
rows_of_E          list      rows per expert, in order
=================  ========  ===================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "fast_training"


class _Dispatch(torch.autograd.Function):
    """[T, D] -> [R, D]: each token's row once per choice; the gradient sums a token's A rows."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, place_TA: Tensor) -> Tensor:
        ctx.save_for_backward(place_TA)
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (place_TA,) = ctx.saved_tensors
        return F.embedding_bag(place_TA, grad_RD.contiguous(), mode="sum"), None, None


class _Combine(torch.autograd.Function):
    """[R, D] -> [T, D]: the sum of each token's A rows; the transpose of ``_Dispatch``."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, token_R: Tensor, place_TA: Tensor) -> Tensor:
        ctx.save_for_backward(token_R)
        return F.embedding_bag(place_TA, y_RD, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        (token_R,) = ctx.saved_tensors
        return grad_TD.index_select(0, token_R), None, None


class _GroupedLinear(torch.autograd.Function):
    """Rows [R, in] in E consecutive groups times weights [E, out, in] -> [R, out]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, rows_of_E: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.rows_of_E = rows_of_E
        out = rows.new_empty(len(rows), weight.shape[1])
        groups = zip(torch.split(rows, rows_of_E), weight, torch.split(out, rows_of_E), strict=True)
        for x, w, y in groups:
            torch.mm(x, w.t(), out=y)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        grad_rows, grad_weight = torch.empty_like(rows), torch.empty_like(weight)
        x_E, grad_E, grad_x_E = (torch.split(t, ctx.rows_of_E) for t in (rows, grad, grad_rows))
        for x, w, g, grad_x, grad_w in zip(x_E, weight, grad_E, grad_x_E, grad_weight, strict=True):
            torch.mm(g, w, out=grad_x)
            torch.mm(g.t(), x, out=grad_w)
        return grad_rows, grad_weight, None


dispatch: Callable[[Tensor, Tensor, Tensor], Tensor] = _Dispatch.apply
combine: Callable[[Tensor, Tensor, Tensor], Tensor] = _Combine.apply
grouped_linear: Callable[[Tensor, Tensor, list[int]], Tensor] = _GroupedLinear.apply


def fast_experts(self: Any, x_TD: Tensor, experts_TA: Tensor, weights_TA: Tensor) -> Tensor:
    """Run the chosen experts and sum their weighted outputs -> [T, D]; ``self`` is the experts module."""
    order_R = experts_TA.flatten().argsort()
    place_TA = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R))).view_as(experts_TA)
    token_R = order_R // experts_TA.shape[1]
    rows_of_E = torch.bincount(experts_TA.flatten(), minlength=self.num_experts).tolist()

    x_RD = dispatch(x_TD, token_R, place_TA)
    gate_RF, up_RF = grouped_linear(x_RD, self.gate_up_proj, rows_of_E).chunk(2, dim=-1)
    # weighted before the down projection, where a row is F wide instead of D
    inner_RF = F.silu(gate_RF) * up_RF * weights_TA.flatten()[order_R, None]
    y_RD = grouped_linear(inner_RF, self.down_proj, rows_of_E)
    return combine(y_RD, token_R, place_TA)


def register_fast_experts() -> str:
    """Make the implementation known to transformers; returns its name."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, fast_experts)
    return NAME
