"""y[t] = sum over a of weight_ta * out[row of pair (t, a)], in fp32, a = 0, 1, ... A - 1: the same bits every time.

| name     | shape  | meaning                                                                             |
|----------|--------|-------------------------------------------------------------------------------------|
| out      | R, D   | rows of the last product, weighted already or not                                   |
| row_of_R | R      | the row of each pair; None: pair r is row r                                         |
| ids      | T, A   | experts; from E up to E + IDENTITIES the token's own x stands for the row; else none |
| x        | T, D   | the layer's input, read for identities only                                         |
| y        | T, D   | result; pairs of no expert and of weight 0 are not read                             |
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from promoe_triton.kernels.checks import check_device, check_matrix, check_routing, expect, expect_type
from promoe_triton.kernels.launching import launch
from promoe_triton.kernels.rounding import rounded
from promoe_triton.kernels.tiles import CONTRACTION, power_of_2


@triton.jit(do_not_specialize_on_alignment=["row_ptr"])
def combine_kernel(
    y_ptr,
    stride_y,
    out_ptr,
    stride_out,
    x_ptr,
    stride_x,
    row_ptr,
    ids_ptr,
    weights_ptr,
    A: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    IDENTITIES: tl.constexpr,
    IS_WEIGHTED: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: T * ceil(D / BLOCK_D)."""
    tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    t = tl.program_id(0) // tiles
    d = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    sums = tl.zeros([BLOCK_D], tl.float32)
    for a in range(A):
        r = t * A + a
        e = tl.load(ids_ptr + r)
        weight = tl.load(weights_ptr + r).to(tl.float32)
        if (e >= 0) & (e < E) & (weight != 0.0):
            row = r
            if HAS_ORDER:
                row = tl.load(row_ptr + r)
            out = tl.load(out_ptr + row.to(tl.int64) * stride_out + d, mask=d < D, other=0.0).to(tl.float32)
            if not IS_WEIGHTED:
                out = out * weight
            sums += out
        if IDENTITIES:
            if (e >= E) & (e < E + IDENTITIES) & (weight != 0.0):
                x = tl.load(x_ptr + t.to(tl.int64) * stride_x + d, mask=d < D, other=0.0).to(tl.float32)
                sums += x * weight
    tl.store(y_ptr + t.to(tl.int64) * stride_y + d, rounded(sums, y_ptr.dtype.element_ty), mask=d < D)


def combine(
    out_RD: Tensor,
    row_of_R: Tensor | None,
    x_TD: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor,
    *,
    experts: int,
    identities: int = 0,
    weighted: bool,
) -> Tensor:
    """Sum each token's rows, in the type of x_TD. weighted: the rows have their routing weight already."""
    check_routing(ids_TA, weights_TA)
    T, A = ids_TA.shape
    D = out_RD.shape[-1]
    check_matrix("rows", out_RD, D)
    expect(out_RD.shape[0] == T * A, "rows", f"{T * A} of them", out_RD.shape[0])
    expect(x_TD.shape[0] == T, "input", f"{T} rows", x_TD.shape[0])
    if row_of_R is not None:
        expect_type(row_of_R.dtype == torch.int32, "order", "int32", row_of_R.dtype)
        fits = row_of_R.shape == (T * A,) and row_of_R.is_contiguous()
        expect(fits, "order", f"contiguous [{T * A}]", list(row_of_R.shape))
    if identities:
        check_matrix("input", x_TD, D)
    tensors = {"rows": out_RD, "input": x_TD, "expert ids": ids_TA, "routing weights": weights_TA, "order": row_of_R}
    check_device(**tensors)
    y_TD = x_TD.new_empty((T, D))
    if T == 0:
        return y_TD
    block_D = min(power_of_2(D), 1024)
    args = (
        y_TD,
        y_TD.stride(0),
        out_RD,
        out_RD.stride(0),
        x_TD,
        x_TD.stride(0),
        row_of_R if row_of_R is not None else ids_TA,
        ids_TA,
        weights_TA,
    )
    options = {
        "A": A,
        "D": D,
        "E": experts,
        "IDENTITIES": identities,
        "IS_WEIGHTED": weighted,
        "HAS_ORDER": row_of_R is not None,
        "BLOCK_D": block_D,
        "num_warps": 4,
        **CONTRACTION,
    }
    launch(combine_kernel, T * -(-D // block_D), args, options)
    return y_TD
