"""Every stage once more in plain torch and double precision, with the signatures of the kernels.

What the kernels are compared with; nothing in the package computes with it. Here the host reads everything.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from promoe_triton.kernels.pool import Gate, Pool, Projection
from promoe_triton.kernels.schedule import SMALL, Schedule, blocks_at_most
from promoe_triton.kernels.tiles import Tile


def at(pool: Pool, e: int) -> Tensor:
    """Return expert e's tensor."""
    return pool.data[int(pool.slot_of_E[e])].double()


def activate_one(g: Tensor, activation: str) -> Tensor:
    match activation:
        case "silu":
            g = g * torch.sigmoid(g)
        case "gelu":
            g = F.gelu(g)
        case "gelu_tanh":
            g = F.gelu(g, approximate="tanh")
        case "relu2":
            g = g.clamp(min=0).square()
    return g


def activate(y_N: Tensor, gate: Gate) -> Tensor:
    """Return what becomes of the columns of one row's product."""
    if not gate.gated:
        return activate_one(y_N, gate.activation)
    g, u = (y_N[::2], y_N[1::2]) if gate.interleaved else y_N.chunk(2)
    if gate.activation == "clamped_swiglu":
        g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
        return g * torch.sigmoid(gate.alpha * g) * (u + 1)
    return activate_one(g, gate.activation) * u


def product(x_K: Tensor, e: int, projection: Projection) -> Tensor:
    y_N = at(projection.weight, e) @ x_K.double()
    if projection.scale is not None:
        y_N = y_N * at(projection.scale, e)
    if projection.bias is not None:
        y_N = y_N + at(projection.bias, e)
    return activate(y_N, projection.gate)


def is_due(e: int, projection: Projection, wave_E: Tensor | None) -> bool:
    return int(projection.weight.slot_of_E[e]) >= 0 and (wave_E is None or bool(wave_E[e]))


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
) -> None:
    """See `rows.rows_product`; the tile makes no difference."""
    divide = max(ids_TA.numel() // max(x_MK.shape[0], 1), 1)
    for r, (e, weight) in enumerate(zip(ids_TA.flatten().tolist(), weights_TA.flatten().double(), strict=True)):
        if 0 <= e < projection.experts and weight != 0 and is_due(e, projection, wave_E):
            y_N = product(x_MK[r // divide], e, projection)
            out_RN[r] = (y_N * weight if weighted else y_N).to(out_RN.dtype)


def schedule(
    ids_TA: Tensor, weights_TA: Tensor, rank_E: Tensor | None, *, experts: int, block: int, small: int = SMALL
) -> Schedule:
    """See `schedule.schedule`; how many pairs are few makes no difference."""
    R = ids_TA.numel()
    result = Schedule(packed=ids_TA.new_empty(0), R=R, B=blocks_at_most(R, experts, block), block=block)
    ids, weights = ids_TA.flatten().tolist(), weights_TA.flatten().tolist()
    ranks = [0] * experts if rank_E is None else rank_E.tolist()
    used = [r for r, (e, weight) in enumerate(zip(ids, weights, strict=True)) if 0 <= e < experts and weight != 0]
    order = sorted(used, key=lambda r: (ranks[ids[r]], ids[r]))  # stable
    row_of = [-1] * R
    blocks: list[tuple[int, int, int]] = []
    for row, r in enumerate(order):
        row_of[r] = row
        if blocks and blocks[-1][0] == ids[r] and row - blocks[-1][1] < block:
            blocks[-1] = (ids[r], blocks[-1][1], row + 1)
        else:
            blocks.append((ids[r], row, row + 1))
    columns = [[b[i] for b in blocks] + [-1] * (result.B - len(blocks)) for i in range(3)]
    packed = [*order, *[-1] * (R - len(order)), *row_of, *columns[0], *columns[1], *columns[2], len(blocks)]
    return replace(result, packed=torch.tensor(packed, dtype=torch.int32, device=ids_TA.device))


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
) -> None:
    """See `grouped.grouped_product`; the tile makes no difference."""
    order = schedule.order_R.tolist()
    A = weights_TA.shape[1]
    weights_R = weights_TA.flatten().double()
    blocks = zip(*(t.tolist() for t in (schedule.expert_of_B, schedule.first_of_B, schedule.end_of_B)), strict=True)
    for _, (e, first, end) in zip(range(int(schedule.blocks)), blocks, strict=False):
        if not is_due(e, projection, wave_E):
            continue
        for i in range(first, end):
            y_N = product(x_MK[order[i] // A if gather else i], e, projection)
            out_RN[i] = (y_N * weights_R[order[i]] if weighted else y_N).to(out_RN.dtype)


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
    """See `combine.combine`."""
    T, A = ids_TA.shape
    y_TD = x_TD.new_zeros((T, out_RD.shape[1]), dtype=torch.float64)
    for t in range(T):
        for a in range(A):
            e, weight = int(ids_TA[t, a]), float(weights_TA[t, a])
            row = t * A + a if row_of_R is None else int(row_of_R[t * A + a])
            if 0 <= e < experts and weight != 0:
                y_TD[t] += out_RD[row].double() * (1.0 if weighted else weight)
            elif experts <= e < experts + identities and weight != 0:
                y_TD[t] += x_TD[t].double() * weight
    return y_TD.to(x_TD.dtype)


def error(got: Tensor, want: Tensor) -> float:
    """Return the relative error in the L2 norm; infinite where anything is not finite."""
    difference = float((got.double() - want.double()).norm())
    return difference / max(float(want.double().norm()), 1e-30) if math.isfinite(difference) else math.inf
