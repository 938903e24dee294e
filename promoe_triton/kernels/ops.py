"""The stages as operations of torch, so that they can stand in compiled graphs: opaque, with their fakes.

The same calls as in `rows`, `schedule`, `grouped` and `combine`, with what they are given laid flat, as an operation's
arguments must be. A product writes into `out`, which is why two waves can share it.

| name      | meaning                                                    |
|-----------|------------------------------------------------------------|
| weight    | data of the pool [S, N, K], slot_of_E beside it             |
| gate      | activation, then "gated" or "interleaved" where it is so    |
| numbers   | alpha and limit                                            |
| tile      | rows, columns, depth, warps, stages                        |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from promoe_triton.kernels import combine as combining
from promoe_triton.kernels import grouped, rows, whole
from promoe_triton.kernels import schedule as scheduling
from promoe_triton.kernels.pool import Gate, Pool, Projection
from promoe_triton.kernels.schedule import Schedule, blocks_at_most
from promoe_triton.kernels.tiles import Tile, table_for, target_of


def _pool(data: Tensor | None, slot_of_E: Tensor | None) -> Pool | None:
    return None if data is None or slot_of_E is None else Pool(data=data, slot_of_E=slot_of_E)


def _projection(
    weight: Tensor,
    weight_slots: Tensor,
    bias: Tensor | None,
    bias_slots: Tensor | None,
    scale: Tensor | None,
    scale_slots: Tensor | None,
    gate: str,
    numbers: Sequence[float],
) -> Projection:
    activation, *kind = gate.split()
    alpha, limit = numbers
    gated, turns = bool(kind), kind == ["interleaved"]
    return Projection(
        weight=Pool(data=weight, slot_of_E=weight_slots),
        bias=_pool(bias, bias_slots),
        scale=_pool(scale, scale_slots),
        gate=Gate(activation=activation, gated=gated, interleaved=turns, alpha=alpha, limit=limit),
    )


def _tile(numbers: Sequence[int]) -> Tile:
    rows, columns, depth, warps, stages = numbers
    return Tile(rows=rows, columns=columns, depth=depth, warps=warps, stages=stages)


@torch.library.custom_op("promoe_triton::rows_product", mutates_args={"out"})
def rows_product(
    out: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    wave: Tensor | None,
    weight: Tensor,
    weight_slots: Tensor,
    bias: Tensor | None,
    bias_slots: Tensor | None,
    scale: Tensor | None,
    scale_slots: Tensor | None,
    gate: str,
    numbers: Sequence[float],
    weighted: bool,
    tile: Sequence[int],
) -> None:
    """See `rows.rows_product`."""
    projection = _projection(weight, weight_slots, bias, bias_slots, scale, scale_slots, gate, numbers)
    rows.rows_product(out, x, ids, weights, projection, wave, weighted=weighted, tile=_tile(tile))


@torch.library.custom_op("promoe_triton::grouped_product", mutates_args={"out"})
def grouped_product(
    out: Tensor,
    x: Tensor,
    schedule: Tensor,
    block: int,
    weights: Tensor,
    wave: Tensor | None,
    weight: Tensor,
    weight_slots: Tensor,
    bias: Tensor | None,
    bias_slots: Tensor | None,
    scale: Tensor | None,
    scale_slots: Tensor | None,
    gate: str,
    numbers: Sequence[float],
    gather: bool,
    weighted: bool,
    tile: Sequence[int],
) -> None:
    """See `grouped.grouped_product`; schedule: packed, in blocks of so many rows."""
    projection = _projection(weight, weight_slots, bias, bias_slots, scale, scale_slots, gate, numbers)
    R = weights.numel()
    plan = Schedule(packed=schedule, R=R, B=blocks_at_most(R, projection.experts, block), block=block)
    grouped.grouped_product(out, x, plan, weights, projection, wave, gather=gather, weighted=weighted, tile=_tile(tile))


@torch.library.custom_op("promoe_triton::schedule", mutates_args=())
def schedule(ids: Tensor, weights: Tensor, rank: Tensor | None, experts: int, block: int) -> Tensor:
    """See `schedule.schedule`; returned packed."""
    return scheduling.schedule(ids, weights, rank, experts=experts, block=block).packed


@torch.library.custom_op("promoe_triton::combine", mutates_args=())
def combine(
    out: Tensor,
    row_of: Tensor | None,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: int,
    identities: int,
    weighted: bool,
) -> Tensor:
    """See `combine.combine`."""
    return combining.combine(out, row_of, x, ids, weights, experts=experts, identities=identities, weighted=weighted)


@torch.library.custom_op("promoe_triton::layer", mutates_args=())
def layer(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    slots: Tensor,
    gate: str,
    numbers: Sequence[float],
    transposed: Sequence[bool],
    identities: int,
) -> Tensor:
    """See `whole.layer`: everything resident, weights stacked [S, N, K], or [S, K, N] where transposed (up, down).

    Its tiles are those shipped for the device. Nothing in it waits for the device, so graphs may capture it.
    """
    up, down = (w.transpose(1, 2) if turned else w for w, turned in zip((up, down), transposed, strict=True))
    # Weights and slots of the biases are the same.
    first = _projection(up, slots, up_bias, slots, None, None, gate, numbers)
    second = _projection(down, slots, down_bias, slots, None, None, "none", numbers)
    table = table_for(target_of(x.device))
    return whole.layer(x, ids, weights, first, second, table, identities=identities)


@layer.register_fake
def _(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    slots: Tensor,
    gate: str,
    numbers: Sequence[float],
    transposed: Sequence[bool],
    identities: int,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@schedule.register_fake
def _(ids: Tensor, weights: Tensor, rank: Tensor | None, experts: int, block: int) -> Tensor:
    R = ids.numel()
    return ids.new_empty(2 * R + 3 * blocks_at_most(R, experts, block) + 1, dtype=torch.int32)


@combine.register_fake
def _(
    out: Tensor,
    row_of: Tensor | None,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: int,
    identities: int,
    weighted: bool,
) -> Tensor:
    return x.new_empty((ids.shape[0], out.shape[1]))
