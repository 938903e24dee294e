"""out[r] = gate(x[r // DIVIDE] W_e^T * scale_e + b_e) * weight_r: one row after the other, for a few tokens.

Decoding one to four tokens reads every weight once and computes little: no rows are grouped, nothing is sorted. A
program multiplies one row with a tile of the expert's weights, 128 bits a load, and sums in fp32.

| name      | shape  | meaning                                                             |
|-----------|--------|---------------------------------------------------------------------|
| x         | M, K   | rows of the input: tokens (DIVIDE = A) or pairs (DIVIDE = 1)        |
| ids       | R      | expert of each pair r = t * A + a; outside of 0 ... E - 1: of none  |
| weights   | R      | routing weight of each pair; pairs of weight 0 are left out         |
| wave      | E      | not 0: this expert is computed in this launch                       |
| out       | R, N   | result; rows of pairs that are left out are not written             |
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from promoe_triton.kernels.activation import activate_gated, activate_one
from promoe_triton.kernels.checks import check_rows
from promoe_triton.kernels.launching import launch
from promoe_triton.kernels.pool import Projection, begin_of_tile, is_due, is_own, rows_of_tile, slot_base
from promoe_triton.kernels.rounding import rounded
from promoe_triton.kernels.tiles import Tile


@triton.jit
def weigh(x_ptr, w_ptr, rows, stride_wn, stride_wk, k, K: tl.constexpr, IS_TAIL: tl.constexpr, BLOCK_K: tl.constexpr):
    """x[k] * w[rows, k], in fp32: [rows, BLOCK_K]."""
    cols = k + tl.arange(0, BLOCK_K)
    offsets = rows[:, None] * stride_wn + cols[None, :] * stride_wk
    if IS_TAIL:
        x = tl.load(x_ptr + cols, mask=cols < K, other=0.0)
        w = tl.load(w_ptr + offsets, mask=(cols < K)[None, :], other=0.0)
    else:
        x = tl.load(x_ptr + cols)
        w = tl.load(w_ptr + offsets)
    return x[None, :].to(tl.float32) * w.to(tl.float32)


@triton.jit
def finish(
    sums,
    e,
    rows,
    b_ptr,
    b_slot_ptr,
    stride_bs,
    c_ptr,
    c_slot_ptr,
    stride_cs,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """sums * scale + bias, for these rows of the weight."""
    if HAS_SCALE:
        sums = sums * tl.load(slot_base(c_ptr, c_slot_ptr, e, stride_cs) + rows).to(tl.float32)
    if HAS_BIAS:
        sums = sums + tl.load(slot_base(b_ptr, b_slot_ptr, e, stride_bs) + rows).to(tl.float32)
    return sums


@triton.jit
def rows_kernel(
    out_ptr,
    stride_out,
    x_ptr,
    stride_x,
    ids_ptr,
    weights_ptr,
    wave_ptr,
    w_ptr,
    slot_ptr,
    stride_ws,
    stride_wn,
    stride_wk,
    b_ptr,
    b_slot_ptr,
    stride_bs,
    c_ptr,
    c_slot_ptr,
    stride_cs,
    alpha,
    limit,
    DIVIDE: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    IS_WEIGHTED: tl.constexpr,
    HAS_WAVE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: R * ceil(N / BLOCK_N); the tiles of a pair come one after the other."""
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    r = tl.program_id(0) // tiles
    n = tl.program_id(0) % tiles * BLOCK_N
    e = tl.load(ids_ptr + r)
    weight = tl.load(weights_ptr + r).to(tl.float32)
    if (e < 0) | (e >= E) | (weight == 0.0):
        return
    if not is_due(slot_ptr, wave_ptr, e, HAS_WAVE):
        return
    w_ptr = slot_base(w_ptr, slot_ptr, e, stride_ws)
    x_ptr += (r // DIVIDE).to(tl.int64) * stride_x

    PAIRS: tl.constexpr = IS_GATED and not IS_INTERLEAVED
    ROWS: tl.constexpr = 2 * BLOCK_N if IS_INTERLEAVED else BLOCK_N
    ALL: tl.constexpr = 2 * N if IS_INTERLEAVED else N
    begin = begin_of_tile(n, N, BLOCK_N)
    rows = rows_of_tile(begin * 2 if IS_INTERLEAVED else begin, ROWS, ALL)
    FULL: tl.constexpr = K // BLOCK_K * BLOCK_K
    acc = tl.zeros([ROWS, BLOCK_K], tl.float32)
    acc_up = acc
    for k in range(0, FULL, BLOCK_K):
        acc += weigh(x_ptr, w_ptr, rows, stride_wn, stride_wk, k, K, False, BLOCK_K)
        if PAIRS:
            acc_up += weigh(x_ptr, w_ptr, rows + N, stride_wn, stride_wk, k, K, False, BLOCK_K)
    if FULL < K:
        acc += weigh(x_ptr, w_ptr, rows, stride_wn, stride_wk, FULL, K, True, BLOCK_K)
        if PAIRS:
            acc_up += weigh(x_ptr, w_ptr, rows + N, stride_wn, stride_wk, FULL, K, True, BLOCK_K)

    y = finish(tl.sum(acc, 1), e, rows, b_ptr, b_slot_ptr, stride_bs, c_ptr, c_slot_ptr, stride_cs, HAS_BIAS, HAS_SCALE)
    if PAIRS:
        up = tl.sum(acc_up, 1)
        up = finish(up, e, rows + N, b_ptr, b_slot_ptr, stride_bs, c_ptr, c_slot_ptr, stride_cs, HAS_BIAS, HAS_SCALE)
        y = activate_gated(y, up, alpha, limit, ACTIVATION)
    elif IS_INTERLEAVED:
        gate, up = tl.split(tl.reshape(y, (BLOCK_N, 2)))
        y = activate_gated(gate, up, alpha, limit, ACTIVATION)
    else:
        y = activate_one(y, ACTIVATION)
    if IS_WEIGHTED:
        y = y * weight
    cols = begin + tl.arange(0, BLOCK_N)
    own = is_own(cols, n, N, BLOCK_N)
    tl.store(out_ptr + r.to(tl.int64) * stride_out + cols, rounded(y, out_ptr.dtype.element_ty), mask=own)


def rows_product(
    out_RN: Tensor,
    x_MK: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor,
    projection: Projection,
    wave_E: Tensor | None,
    *,
    weighted: bool,
    tile: Tile,
    check: bool = True,
) -> None:
    """Compute the rows of the experts of one wave (None: of all) that are resident; the other rows stay as they are.

    x_MK: one row for each token, or one for each pair. weighted: multiply with the routing weights. check: raise where
    an argument is wrong; False where all are known to be right, as that takes the host longer than the launch.
    """
    if check:
        check_rows(out_RN, x_MK, ids_TA, weights_TA, projection, wave_E)
    R = ids_TA.numel()
    if R == 0:
        return
    args = (
        out_RN,
        out_RN.stride(0),
        x_MK,
        x_MK.stride(0),
        ids_TA,
        weights_TA,
        wave_E if wave_E is not None else ids_TA,
        *projection.arguments,
    )
    options = {
        "DIVIDE": R // x_MK.shape[0],
        "E": projection.experts,
        "IS_WEIGHTED": weighted,
        "HAS_WAVE": wave_E is not None,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        **projection.constants,
        **tile.options,
    }
    launch(rows_kernel, R * -(-projection.N // tile.columns), args, options)
