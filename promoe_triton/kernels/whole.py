"""y = sum over a of weight_a * (gate(x W_up^T + b_up) W_down^T + b_down): one call from its rows to its sum.

Which kernel computes a product, and with which tile, follows from the shape of the whole call.
"""

from __future__ import annotations

from torch import Tensor

from promoe_triton.kernels.checks import check_device, check_routing
from promoe_triton.kernels.combine import combine
from promoe_triton.kernels.grouped import grouped_product
from promoe_triton.kernels.pool import Projection
from promoe_triton.kernels.rows import rows_product
from promoe_triton.kernels.schedule import Schedule, schedule
from promoe_triton.kernels.tiles import Call, Shape, TileTable


def plan(
    ids_TA: Tensor, weights_TA: Tensor, call: Call, table: TileTable, rank_E: Tensor | None = None
) -> Schedule | None:
    """Group the rows of a call by expert (in the order of `rank_E`); None where they are computed one by one."""
    if call.by_rows:
        check_routing(ids_TA, weights_TA)
        check_device(**{"expert ids": ids_TA, "routing weights": weights_TA})
        return None
    return schedule(ids_TA, weights_TA, rank_E, experts=call.E, block=table.block(call))


def product(
    out: Tensor,
    x: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor,
    rows: Schedule | None,
    projection: Projection,
    wave_E: Tensor | None,
    *,
    up: bool,
    weighted: bool,
    call: Call,
    table: TileTable,
) -> None:
    """Compute a product of the experts of one wave (None: of all). rows: as `plan` has grouped them.

    Only `plan` has looked at what it was given: that all else is right is up to the caller.
    """
    gated = projection.gate.gated
    small = projection.weight.data.dtype.itemsize == 1
    shape = Shape(N=projection.N, K=projection.K, gated=gated, transposed=projection.is_transposed, small=small)
    if rows is None:
        tile = table.rows(call, shape)
        rows_product(out, x, ids_TA, weights_TA, projection, wave_E, weighted=weighted, tile=tile, check=False)
    else:
        tile = table.grouped(call, shape)
        grouped_product(
            out, x, rows, weights_TA, projection, wave_E, gather=up, weighted=weighted, tile=tile, check=False
        )


def layer(
    x_TD: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor,
    up: Projection,
    down: Projection,
    table: TileTable,
    *,
    identities: int = 0,
) -> Tensor:
    """Compute a layer whose experts are all resident, in the type of x_TD, which is that of the weights."""
    T, A = ids_TA.shape
    call = Call(T=T, A=A, E=up.experts, dtype=x_TD.dtype)
    rows = plan(ids_TA, weights_TA, call, table)
    h_RF = x_TD.new_empty((T * A, up.N))
    y_RD = x_TD.new_empty((T * A, down.N), dtype=call.sum_dtype)
    product(h_RF, x_TD, ids_TA, weights_TA, rows, up, None, up=True, weighted=False, call=call, table=table)
    product(y_RD, h_RF, ids_TA, weights_TA, rows, down, None, up=False, weighted=True, call=call, table=table)
    order_R = None if rows is None else rows.row_of_R
    return combine(y_RD, order_R, x_TD, ids_TA, weights_TA, experts=up.experts, identities=identities, weighted=True)
