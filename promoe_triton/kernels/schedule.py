"""order = stable sort of the pairs by (rank of expert, expert); blocks = each expert's rows in steps of BLOCK.

| name        | shape | meaning                                                                        |
|-------------|-------|--------------------------------------------------------------------------------|
| ids         | R     | expert of each pair r = t * A + a; outside of 0 ... E - 1: of none             |
| weights     | R     | routing weight of each pair; pairs of weight 0 are left out                    |
| rank        | E     | when the expert is ready: lower ranks come first                               |
| order_R     | R     | the pair that stands at each sorted row; undefined past the last row in use    |
| row_of_R    | R     | the sorted row of each pair, -1: left out                                      |
| expert_of_B | B     | the expert of each block of rows                                               |
| first_of_B  | B     | its first sorted row                                                           |
| end_of_B    | B     | its last sorted row + 1                                                        |
| blocks      | 1     | how many of the B blocks there are; the others are undefined                   |
| count_EC    | E, C  | rows of each expert in each chunk of CHUNK pairs; then where they begin        |
| total_E     | E     | rows of each expert                                                            |

B = min(R, ceil(R / BLOCK) + min(E, R)) follows from shapes, so that no host reads the routing. A counting sort: up
to SMALL pairs one program compares all with all; beyond that one kernel counts, one sums, one scatters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from promoe_triton.kernels.checks import check_device, check_routing, expect, expect_type
from promoe_triton.kernels.launching import launch
from promoe_triton.kernels.tiles import CONTRACTION, power_of_2

SMALL = 128
CHUNK = 128

# Arrays of one schedule lie in one tensor, at distances that follow from R: were their alignment a matter of the
# compiler, every other number of tokens would compile the kernels again.
PACKED = ["order_ptr", "row_ptr", "expert_ptr", "first_ptr", "end_ptr", "blocks_ptr"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The rows of one call, grouped by expert: views of one int32 tensor, as `schedule` fills it.

    block: how many rows a block has at most.
    """

    packed: Tensor
    R: int
    B: int
    block: int

    @property
    def order_R(self) -> Tensor:
        return self.packed[: self.R]

    @property
    def row_of_R(self) -> Tensor:
        return self.packed[self.R : 2 * self.R]

    @property
    def expert_of_B(self) -> Tensor:
        return self._block(0)

    @property
    def first_of_B(self) -> Tensor:
        return self._block(1)

    @property
    def end_of_B(self) -> Tensor:
        return self._block(2)

    @property
    def blocks(self) -> Tensor:
        return self.packed[-1:]

    def _block(self, index: int) -> Tensor:
        begin = 2 * self.R + index * self.B
        return self.packed[begin : begin + self.B]


def blocks_at_most(R: int, E: int, block: int) -> int:
    """Return how many blocks of rows there can be, whatever the routing."""
    return min(R, -(-R // block) + min(E, R))


@triton.jit
def load_pairs(ids_ptr, weights_ptr, r, R, E: tl.constexpr):
    """The expert of each pair, E where it is left out."""
    ids = tl.load(ids_ptr + r, mask=r < R, other=E)
    weights = tl.load(weights_ptr + r, mask=r < R, other=0.0).to(tl.float32)
    return tl.where((ids >= 0) & (ids < E) & (weights != 0.0), ids, E).to(tl.int32)


@triton.jit
def key_of(e, rank_ptr, E: tl.constexpr, HAS_RANK: tl.constexpr):
    """What experts are sorted by; pairs of none (E) come last."""
    if HAS_RANK:
        rank = tl.load(rank_ptr + e, mask=e < E, other=0).to(tl.int64)
        return tl.where(e < E, rank * E + e, 0x7FFFFFFFFFFFFFFF)
    else:
        return e


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=PACKED)
def schedule_small_kernel(
    order_ptr,
    row_ptr,
    expert_ptr,
    first_ptr,
    end_ptr,
    blocks_ptr,
    ids_ptr,
    weights_ptr,
    rank_ptr,
    R,
    E: tl.constexpr,
    HAS_RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Grid: 1. Compares all pairs with all, so that nothing has to be counted first."""
    r = tl.arange(0, SIZE)
    e = load_pairs(ids_ptr, weights_ptr, r, R, E)
    used = e < E
    key = key_of(e, rank_ptr, E, HAS_RANK)
    row = tl.zeros([SIZE], tl.int32)
    within = row
    count = row
    # In steps, as all with all at once does not fit the registers.
    for first in range(0, SIZE, STEP):
        other = first + tl.arange(0, STEP)
        others = key_of(load_pairs(ids_ptr, weights_ptr, other, R, E), rank_ptr, E, HAS_RANK)
        same = others[None, :] == key[:, None]
        twin = same & (other[None, :] < r[:, None])
        row += tl.sum(((others[None, :] < key[:, None]) | twin).to(tl.int32), 1)
        within += tl.sum(twin.to(tl.int32), 1)
        count += tl.sum(same.to(tl.int32), 1)
    tl.store(order_ptr + row, r, mask=used)
    tl.store(row_ptr + r, tl.where(used, row, -1), mask=r < R)
    opens = (used & (within % BLOCK == 0)).to(tl.int32)
    block = tl.sum(opens[None, :] * (row[None, :] < row[:, None]).to(tl.int32), 1)
    tl.store(expert_ptr + block, e, mask=opens != 0)
    tl.store(first_ptr + block, row, mask=opens != 0)
    tl.store(end_ptr + block, tl.minimum(row + BLOCK, row - within + count), mask=opens != 0)
    tl.store(blocks_ptr, tl.sum(opens, 0))


@triton.jit(do_not_specialize=["R", "C"])
def count_kernel(
    count_ptr,
    total_ptr,
    ids_ptr,
    weights_ptr,
    R,
    C,
    E: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Grid: C, one program for each chunk of pairs. The additions are of integers: their order does not show."""
    c = tl.program_id(0)
    ids = load_pairs(ids_ptr, weights_ptr, c * CHUNK + tl.arange(0, CHUNK), R, E)
    for first in range(0, E, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        count = tl.sum((ids[:, None] == e[None, :]).to(tl.int32), 0)
        tl.store(count_ptr + e.to(tl.int64) * C + c, count, mask=e < E)
        tl.atomic_add(total_ptr + e, count, mask=(e < E) & (count > 0), sem="relaxed")


@triton.jit(do_not_specialize=["C"], do_not_specialize_on_alignment=PACKED)
def begin_kernel(
    count_ptr,
    total_ptr,
    expert_ptr,
    first_ptr,
    end_ptr,
    blocks_ptr,
    rank_ptr,
    C,
    E: tl.constexpr,
    HAS_RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: E. Each expert finds where its rows and its blocks begin, and where those of each chunk do."""
    e = tl.program_id(0)
    others = tl.arange(0, SIZE_E)
    total = tl.load(total_ptr + others, mask=others < E, other=0)
    key = key_of(others, rank_ptr, E, HAS_RANK)
    mine = tl.sum(tl.where(others == e, key, 0), 0)
    earlier = (key < mine) & (others < E)
    count = tl.sum(tl.where(others == e, total, 0), 0)
    begin = tl.sum(tl.where(earlier, total, 0), 0)
    steps = (total + BLOCK - 1) // BLOCK
    block = tl.sum(tl.where(earlier, steps, 0), 0)
    if e == 0:
        tl.store(blocks_ptr, tl.sum(steps, 0))
    for step in range(0, count, BLOCK * BLOCK_C):
        first = step + tl.arange(0, BLOCK_C) * BLOCK
        here = block + first // BLOCK
        tl.store(expert_ptr + here, tl.zeros([BLOCK_C], tl.int32) + e, mask=first < count)
        tl.store(first_ptr + here, begin + first, mask=first < count)
        tl.store(end_ptr + here, begin + tl.minimum(first + BLOCK, count), mask=first < count)
    counts_ptr = count_ptr + e.to(tl.int64) * C
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        counts = tl.load(counts_ptr + c, mask=c < C, other=0)
        tl.store(counts_ptr + c, begin + tl.cumsum(counts, 0) - counts, mask=c < C)
        begin += tl.sum(counts, 0)


@triton.jit(do_not_specialize=["R", "C"], do_not_specialize_on_alignment=PACKED)
def scatter_kernel(order_ptr, row_ptr, count_ptr, ids_ptr, weights_ptr, R, C, E: tl.constexpr, CHUNK: tl.constexpr):
    """Grid: C. Each pair's row: where its expert's rows of this chunk begin, and the pairs before it in the chunk."""
    c = tl.program_id(0)
    here = tl.arange(0, CHUNK)
    r = c * CHUNK + here
    e = load_pairs(ids_ptr, weights_ptr, r, R, E)
    used = e < E
    within = tl.sum(((e[None, :] == e[:, None]) & (here[None, :] < here[:, None])).to(tl.int32), 1)
    row = tl.load(count_ptr + e.to(tl.int64) * C + c, mask=used, other=0) + within
    tl.store(order_ptr + row, r, mask=used)
    tl.store(row_ptr + r, tl.where(used, row, -1), mask=r < R)


def schedule(
    ids_TA: Tensor, weights_TA: Tensor, rank_E: Tensor | None, *, experts: int, block: int, small: int = SMALL
) -> Schedule:
    """Group the pairs of a call by expert, in blocks of at most `block` rows, without reading them on the host.

    rank_E: int32, when each expert is ready, or None. small: up to how many pairs one program does it all.
    """
    check_routing(ids_TA, weights_TA)
    check_device(**{"expert ids": ids_TA, "routing weights": weights_TA, "ranks": rank_E})
    if rank_E is not None:
        expect_type(rank_E.dtype == torch.int32, "ranks", "int32", rank_E.dtype)
        expect(rank_E.shape == (experts,), "ranks", f"[{experts}]", list(rank_E.shape))
    R, E = ids_TA.numel(), experts
    B = blocks_at_most(R, E, block)
    result = Schedule(packed=ids_TA.new_empty(2 * R + 3 * B + 1, dtype=torch.int32), R=R, B=B, block=block)
    if R == 0:
        result.blocks.zero_()
        return result
    rank = rank_E if rank_E is not None else ids_TA
    rows = result.order_R, result.row_of_R
    blocks = result.expert_of_B, result.first_of_B, result.end_of_B, result.blocks
    known = {"E": E, "HAS_RANK": rank_E is not None, "BLOCK": block}
    if small >= R:
        size = power_of_2(max(R, 16))
        one = {**known, "SIZE": size, "STEP": min(size, 64), "num_warps": 16, **CONTRACTION}
        launch(schedule_small_kernel, 1, (*rows, *blocks, ids_TA, weights_TA, rank, R), one)
        return result
    C = -(-R // CHUNK)
    count_EC = ids_TA.new_empty((E, C), dtype=torch.int32)
    total_E = ids_TA.new_zeros(E, dtype=torch.int32)
    block_E, block_C = min(power_of_2(E), 64), min(power_of_2(C), 1024)
    count = {"E": E, "CHUNK": CHUNK, "BLOCK_E": block_E, "num_warps": 8, **CONTRACTION}
    launch(count_kernel, C, (count_EC, total_E, ids_TA, weights_TA, R, C), count)
    begin = {**known, "SIZE_E": power_of_2(E), "BLOCK_C": block_C, "num_warps": 4, **CONTRACTION}
    launch(begin_kernel, E, (count_EC, total_E, *blocks, rank, C), begin)
    scatter = {"E": E, "CHUNK": CHUNK, "num_warps": 16, **CONTRACTION}
    launch(scatter_kernel, C, (*rows, count_EC, ids_TA, weights_TA, R, C), scatter)
    return result
