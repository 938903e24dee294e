"""The order in which rows are computed: stable, ready experts first, the same from one program and from many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, draw

from promoe_triton.kernels import schedule as scheduling
from promoe_triton.kernels import twins
from promoe_triton.kernels.schedule import SMALL, Schedule, blocks_at_most, schedule


def lists(plan: Schedule) -> dict[str, Any]:
    """Everything a schedule says, without what is undefined."""
    blocks = int(plan.blocks)
    used = int((plan.row_of_R >= 0).sum())
    return {
        "order": plan.order_R[:used].tolist(),
        "row_of": plan.row_of_R.tolist(),
        "blocks": [
            *zip(*(t[:blocks].tolist() for t in (plan.expert_of_B, plan.first_of_B, plan.end_of_B)), strict=True)
        ],
    }


def both(ids: torch.Tensor, weights: torch.Tensor, rank: torch.Tensor | None, E: int, block: int) -> list[Any]:
    ids, weights = ids.to(DEVICE), weights.to(DEVICE)
    rank = None if rank is None else rank.to(DEVICE)
    return [lists(schedule(ids, weights, rank, experts=E, block=block, small=small)) for small in (SMALL, 0)]


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.data())
def test_equals_its_twin(data: st.DataObject) -> None:
    E, T, A = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 9)), data.draw(st.integers(1, 3))
    block = data.draw(st.sampled_from([1, 2, 16]))
    ids = torch.tensor(
        data.draw(st.lists(st.integers(0, E + 1), min_size=T * A, max_size=T * A)), dtype=torch.int64
    ).view(T, A)
    weights = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.5]), min_size=T * A, max_size=T * A))).view(T, A)
    rank = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=E, max_size=E)), dtype=torch.int32)
    rank_E = data.draw(st.sampled_from([None, rank]))
    want = lists(twins.schedule(ids, weights, rank_E, experts=E, block=block))
    assert both(ids, weights, rank_E, E, block) == [want, want]


@pytest.mark.parametrize(
    ("T", "A", "E", "block"),
    [
        (300, 2, 60, 16),  # several chunks of pairs, E no power of two
        (130, 3, 3, 16),  # several blocks of every expert
        (150, 1, 300, 32),  # more experts than pairs, more than one block of them
        (131, 1, 1, 1),  # as many blocks as there may be: one too many would lie in the next array
    ],
)
def test_many_pairs(T: int, A: int, E: int, block: int) -> None:
    ids, weights = draw(T, A, E), torch.ones(T, A)
    want = lists(twins.schedule(ids, weights, None, experts=E, block=block))
    assert both(ids, weights, None, E, block)[1] == want


@pytest.mark.parametrize("E", [1, 5])
def test_ids_below_zero_are_of_no_expert(E: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nobody looks at them before the launch."""
    monkeypatch.setattr(scheduling, "check_routing", lambda *args: None)
    ids, weights = torch.tensor([[0, -1], [-7, E - 1], [-1, 0]]), torch.ones(3, 2)
    want = lists(twins.schedule(ids.where(ids >= 0, E), weights, None, experts=E, block=16))
    assert both(ids, weights, None, E, 16) == [want, want]


def test_resident_experts_come_first() -> None:
    """In one launch: ranks are read on the device, and rows of an expert keep the order of their tokens."""
    ids = torch.tensor([[0, 2], [1, 2], [3, 1], [2, 0]])
    resident = torch.tensor([False, True, False, True])
    rank_E = (~resident).int()
    for plan in both(ids, torch.ones(4, 2), rank_E, E=4, block=16):
        assert [e for e, _, _ in plan["blocks"]] == [1, 3, 0, 2]
        assert plan["order"] == [2, 5, 4, 0, 7, 1, 3, 6]


@pytest.mark.parametrize(("R", "E"), [(1, 1), (7, 3), (64, 128), (1000, 7)])
@pytest.mark.parametrize("block", [1, 16, 64])
def test_blocks_suffice(R: int, E: int, block: int) -> None:
    """The worst routing: every expert that can have one has a block with a single row in it."""
    B = blocks_at_most(R, E, block)
    used = min(R, E)
    worst = sum(-(-rows // block) for rows in [R - used + 1] + [1] * (used - 1))
    assert worst <= B <= R


def test_nothing_is_read_on_the_host() -> None:
    """Shapes decide the size of a schedule, whatever the routing."""
    sizes = {
        schedule(ids.to(DEVICE), torch.ones(8, 2, device=DEVICE), None, experts=4, block=16).packed.shape
        for ids in (torch.zeros(8, 2, dtype=torch.int64), draw(8, 2, 4), torch.full((8, 2), 4))
    }
    assert len(sizes) == 1
