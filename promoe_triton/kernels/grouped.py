"""out[i] = gate(x[row i's token] W_e^T * scale_e + b_e) * weight_i: rows sorted by expert, one block of them at a time.

A block of rows of one expert meets a tile of its weights. Blocks of fewer than 64 rows put the weights on the M side
of the product ("swap AB"), where tensor cores want 64 rows and more; the weights of an expert are then read once
whatever its rows. Rows past the end repeat the last one and the last tile of columns is moved back until it is whole,
so that no load in the loop over K has a mask where BLOCK_K divides K: only such loads are pipelined 16 bytes at a time.

| name     | shape  | meaning                                                                        |
|----------|--------|--------------------------------------------------------------------------------|
| x        | M, K   | the tokens (DIVIDE = A), or sorted rows (DIVIDE = 0)                            |
| order, expert_of, first_of, end_of, blocks | | the schedule, see `schedule`                                |
| weights  | R      | routing weight of each pair                                                    |
| wave     | E      | not 0: this expert is computed in this launch                                  |
| out      | R, N   | result, in sorted order; rows that are not computed are not written            |
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from promoe_triton.kernels.activation import activate_gated, activate_one
from promoe_triton.kernels.checks import check_grouped
from promoe_triton.kernels.launching import launch
from promoe_triton.kernels.pool import Projection, begin_of_tile, is_due, is_own, rows_of_tile, slot_base
from promoe_triton.kernels.rounding import operand, rounded
from promoe_triton.kernels.schedule import PACKED, Schedule
from promoe_triton.kernels.tiles import Tile

GROUP = 8
"""Blocks of rows that take the same tile of weights one after the other, while it is in L2."""


@triton.jit
def load_x(x_ptrs, k, K: tl.constexpr, IS_TAIL: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns k ... of a block's rows: [BLOCK_M, BLOCK_K]."""
    cols = k + tl.arange(0, BLOCK_K)
    if IS_TAIL:
        return tl.load(x_ptrs[:, None] + cols[None, :], mask=(cols < K)[None, :], other=0.0)
    else:
        return tl.load(x_ptrs[:, None] + cols[None, :])


@triton.jit
def multiply(
    acc,
    x,
    w_ptr,
    rows,
    stride_wn,
    stride_wk,
    k,
    K: tl.constexpr,
    IS_TAIL: tl.constexpr,
    IS_SWAPPED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + x w^T, [BLOCK_M, rows]; [rows, BLOCK_M] where swapped."""
    cols = k + tl.arange(0, BLOCK_K)
    # The weights are loaded as the dot takes them: not every layout is pipelined through a transposition.
    if IS_SWAPPED:
        # [rows, BLOCK_K]
        offsets = rows[:, None] * stride_wn + cols[None, :] * stride_wk
        inside = (cols < K)[None, :]
    else:
        # [BLOCK_K, rows]
        offsets = cols[:, None] * stride_wk + rows[None, :] * stride_wn
        inside = (cols < K)[:, None]
    if IS_TAIL:
        w = tl.load(w_ptr + offsets, mask=inside, other=0.0)
    else:
        w = tl.load(w_ptr + offsets)
    w = operand(w.to(x.dtype))
    x = operand(x)
    if IS_SWAPPED:
        return tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    else:
        return tl.dot(x, w, acc, input_precision="ieee")


@triton.jit
def by_columns(values, IS_SWAPPED: tl.constexpr):
    """One value for every column of the weights, to go with acc."""
    if IS_SWAPPED:
        return values[:, None]
    else:
        return values[None, :]


@triton.jit
def finish(
    acc,
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
    IS_SWAPPED: tl.constexpr,
):
    """acc * scale + bias, for these rows of the weight."""
    if HAS_SCALE:
        scale = tl.load(slot_base(c_ptr, c_slot_ptr, e, stride_cs) + rows)
        acc = acc * by_columns(scale.to(tl.float32), IS_SWAPPED)
    if HAS_BIAS:
        bias = tl.load(slot_base(b_ptr, b_slot_ptr, e, stride_bs) + rows)
        acc = acc + by_columns(bias.to(tl.float32), IS_SWAPPED)
    return acc


@triton.jit
def split_turns(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_SWAPPED: tl.constexpr):
    """Take gate and up, which come by turns, apart."""
    if IS_SWAPPED:
        both = tl.permute(tl.reshape(acc, (BLOCK_N, 2, BLOCK_M)), (0, 2, 1))
    else:
        both = tl.reshape(acc, (BLOCK_M, BLOCK_N, 2))
    return tl.split(both)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=PACKED)
def grouped_kernel(
    out_ptr,
    stride_out,
    x_ptr,
    stride_x,
    order_ptr,
    expert_ptr,
    first_ptr,
    end_ptr,
    blocks_ptr,
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
    B,
    DIVIDE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    IS_WEIGHTED: tl.constexpr,
    HAS_WAVE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Grid: B * ceil(N / BLOCK_N), GROUP blocks of rows for every tile of weights."""
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    IS_SWAPPED: tl.constexpr = BLOCK_M < 64
    pid = tl.program_id(0)
    group = pid // (tiles * GROUP) * GROUP
    together = tl.minimum(B - group, GROUP)
    inside = pid % (tiles * GROUP)
    b = group + inside % together
    n = inside // together * BLOCK_N
    if b >= tl.load(blocks_ptr):
        return
    e = tl.load(expert_ptr + b)
    if not is_due(slot_ptr, wave_ptr, e, HAS_WAVE):
        return
    w_ptr = slot_base(w_ptr, slot_ptr, e, stride_ws)
    end = tl.load(end_ptr + b)
    i = tl.load(first_ptr + b) + tl.arange(0, BLOCK_M)
    real = tl.minimum(i, end - 1)
    pairs = real
    if DIVIDE > 0 or IS_WEIGHTED:
        pairs = tl.load(order_ptr + real)
    source = real
    if DIVIDE > 0:
        source = pairs // DIVIDE
    x_ptrs = x_ptr + source.to(tl.int64) * stride_x

    PAIRS: tl.constexpr = IS_GATED and not IS_INTERLEAVED
    ROWS: tl.constexpr = 2 * BLOCK_N if IS_INTERLEAVED else BLOCK_N
    ALL: tl.constexpr = 2 * N if IS_INTERLEAVED else N
    begin = begin_of_tile(n, N, BLOCK_N)
    rows = rows_of_tile(begin * 2 if IS_INTERLEAVED else begin, ROWS, ALL)
    if IS_SWAPPED:
        acc = tl.zeros([ROWS, BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, ROWS], tl.float32)
    acc_up = acc
    FULL: tl.constexpr = K // BLOCK_K * BLOCK_K
    for k in range(0, FULL, BLOCK_K):
        x = load_x(x_ptrs, k, K, False, BLOCK_K)
        acc = multiply(acc, x, w_ptr, rows, stride_wn, stride_wk, k, K, False, IS_SWAPPED, BLOCK_K)
        if PAIRS:
            acc_up = multiply(acc_up, x, w_ptr, rows + N, stride_wn, stride_wk, k, K, False, IS_SWAPPED, BLOCK_K)
    if FULL < K:
        x = load_x(x_ptrs, FULL, K, True, BLOCK_K)
        acc = multiply(acc, x, w_ptr, rows, stride_wn, stride_wk, FULL, K, True, IS_SWAPPED, BLOCK_K)
        if PAIRS:
            acc_up = multiply(acc_up, x, w_ptr, rows + N, stride_wn, stride_wk, FULL, K, True, IS_SWAPPED, BLOCK_K)

    y = finish(
        acc, e, rows, b_ptr, b_slot_ptr, stride_bs, c_ptr, c_slot_ptr, stride_cs, HAS_BIAS, HAS_SCALE, IS_SWAPPED
    )
    if PAIRS:
        up = finish(
            acc_up,
            e,
            rows + N,
            b_ptr,
            b_slot_ptr,
            stride_bs,
            c_ptr,
            c_slot_ptr,
            stride_cs,
            HAS_BIAS,
            HAS_SCALE,
            IS_SWAPPED,
        )
        y = activate_gated(y, up, alpha, limit, ACTIVATION)
    elif IS_INTERLEAVED:
        gate, up = split_turns(y, BLOCK_M, BLOCK_N, IS_SWAPPED)
        y = activate_gated(gate, up, alpha, limit, ACTIVATION)
    else:
        y = activate_one(y, ACTIVATION)
    if IS_SWAPPED:
        y = tl.trans(y)
    if IS_WEIGHTED:
        y = y * tl.load(weights_ptr + pairs).to(tl.float32)[:, None]
    cols = begin + tl.arange(0, BLOCK_N)
    own = is_own(cols, n, N, BLOCK_N)
    out_ptrs = out_ptr + i.to(tl.int64)[:, None] * stride_out + cols[None, :]
    tl.store(out_ptrs, rounded(y, out_ptr.dtype.element_ty), mask=(i < end)[:, None] & own[None, :])


def grouped_product(
    out_RN: Tensor,
    x_MK: Tensor,
    schedule: Schedule,
    weights_TA: Tensor,
    projection: Projection,
    wave_E: Tensor | None,
    *,
    gather: bool,
    weighted: bool,
    tile: Tile,
    check: bool = True,
) -> None:
    """Compute the sorted rows of the experts of one wave (None: of all) that are resident; others stay as they are.

    gather: x_MK are tokens; otherwise it is sorted as the result. weighted: multiply with the routing weights.
    The schedule's blocks have at most tile.rows rows. check: see `rows.rows_product`.
    """
    if check:
        check_grouped(out_RN, x_MK, schedule, weights_TA, projection, wave_E, gather=gather, rows=tile.rows)
    if schedule.R == 0:
        return
    args = (
        out_RN,
        out_RN.stride(0),
        x_MK,
        x_MK.stride(0),
        schedule.order_R,
        schedule.expert_of_B,
        schedule.first_of_B,
        schedule.end_of_B,
        schedule.blocks,
        weights_TA,
        wave_E if wave_E is not None else schedule.packed,
        *projection.arguments,
        schedule.B,
    )
    options = {
        "DIVIDE": weights_TA.shape[1] if gather else 0,
        "IS_WEIGHTED": weighted,
        "HAS_WAVE": wave_E is not None,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "GROUP": GROUP,
        **projection.constants,
        **tile.options,
    }
    launch(grouped_kernel, schedule.B * -(-projection.N // tile.columns), args, options)
