"""Slots per layer: never more than experts, never more than the memory, and every kind of expert has one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from promoe_triton import budget as budget_module
from promoe_triton.budget import Budget, LayerNeed, available_memory, plan_slots, spread
from promoe_triton.errors import PromoeError
from promoe_triton.protocols import ExpertSpec, Part, TensorSpec

PLENTY = 2**60


def spec(width: int) -> ExpertSpec:
    return ExpertSpec(tensors=(TensorSpec(name="w", part=Part.UP, shape=(width,), dtype=torch.float32),))


def need(experts: int, slot_bytes: int = 1, width: int = 1) -> LayerNeed:
    return LayerNeed(experts=experts, spec=spec(width), slot_bytes=slot_bytes)


def kinds(needs: list[LayerNeed]) -> int:
    return len({need.spec for need in needs})


needs_of_one_kind = st.builds(
    lambda experts, size: [need(n, size) for n in experts],
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 50),
)
# The size of a slot follows from the kind, but for alignment: layers of one kind differ by a little.
needs_of_any_kind = st.lists(
    st.builds(
        lambda experts, kind, padding: need(experts, 10 * kind + padding, kind),
        st.integers(1, 9),
        st.integers(1, 3),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=6,
)


class TestSpread:
    @given(needs_of_one_kind, st.integers(0, 60))
    def test_sums_and_bounds(self, needs: list[LayerNeed], count: int) -> None:
        shares = spread(count, needs)
        assert sum(shares) == min(count, sum(need.experts for need in needs))
        assert all(0 <= share <= need.experts for share, need in zip(shares, needs, strict=True))

    @given(needs_of_one_kind, st.integers(0, 60))
    def test_equal_shares_but_for_full_layers(self, needs: list[LayerNeed], count: int) -> None:
        shares = spread(count, needs)
        unfilled = [share for share, need in zip(shares, needs, strict=True) if share < need.experts]
        if unfilled:
            assert max(shares) - min(unfilled) <= 1

    @given(needs_of_one_kind, st.integers(0, 60))
    def test_one_more_slot_takes_none_away(self, needs: list[LayerNeed], count: int) -> None:
        fewer, more = spread(count, needs), spread(count + 1, needs)
        assert all(a <= b for a, b in zip(fewer, more, strict=True))

    @pytest.mark.parametrize(
        ("count", "shares"),
        [
            pytest.param(0, (0, 0, 0), id="none"),
            pytest.param(2, (1, 1, 0), id="fewer-than-layers"),
            pytest.param(7, (3, 2, 2), id="rest-to-the-first"),
            pytest.param(24, (8, 8, 8), id="all"),
            pytest.param(99, (8, 8, 8), id="more-than-all"),
        ],
    )
    def test_rows(self, count: int, shares: tuple[int, ...]) -> None:
        assert spread(count, [need(8)] * 3) == shares

    def test_what_a_small_layer_cannot_take_goes_to_the_others(self) -> None:
        assert spread(5, [need(1), need(5), need(5)]) == (1, 2, 2)


def check(budget: Budget, needs: list[LayerNeed]) -> None:
    assert len(budget.slots_of_layer) == len(budget.slot_bytes) == len(needs)
    assert all(0 <= share <= need.experts for share, need in zip(budget.slots_of_layer, needs, strict=True))
    assert budget.nbytes == sum(
        share * need.slot_bytes for share, need in zip(budget.slots_of_layer, needs, strict=True)
    )
    held: Counter[ExpertSpec] = Counter()
    for share, layer in zip(budget.slots_of_layer, needs, strict=True):
        held[layer.spec] += share
    assert all(held[layer.spec] >= 1 for layer in needs), "a kind of expert has no slot"
    if not budget.shared:
        assert min(budget.slots_of_layer) >= 1, "a layer has no slot"


def least(partition: Any, needs: list[LayerNeed]) -> int:
    """Bytes of the smallest plan: one slot for each kind of expert."""
    return plan_slots(kinds(needs), partition, needs, PLENTY).nbytes


class TestPlan:
    @given(needs_of_any_kind, st.integers(1, 60), st.sampled_from(["auto", "layer", "global"]))
    def test_counts(self, needs: list[LayerNeed], slots: int, partition: Any) -> None:
        total = sum(need.experts for need in needs)
        count = min(slots, total)
        assume(count >= kinds(needs))
        assume(partition != "layer" or count >= len(needs))
        budget = plan_slots(slots, partition, needs, PLENTY)
        check(budget, needs)
        assert budget.slots == count
        assert budget.shared == (partition == "global" or count < len(needs))

    @given(needs_of_any_kind, st.floats(0.01, 1.0))
    def test_shares(self, needs: list[LayerNeed], share: float) -> None:
        count = max(1, round(share * sum(need.experts for need in needs)))
        assume(count >= kinds(needs))
        budget = plan_slots(share, "auto", needs, PLENTY)
        check(budget, needs)
        assert budget.slots == count

    @settings(max_examples=300)
    @example([need(9, 10, 1), need(9, 10, 1), need(1, 30, 3)], 25, "auto")
    @given(needs_of_any_kind, st.integers(1, 200), st.sampled_from(["auto", "global"]))
    def test_sizes_are_kept_to(self, needs: list[LayerNeed], size: int, partition: Any) -> None:
        try:
            budget = plan_slots(f"{size}B", partition, needs, PLENTY)
        except ValueError:
            assert size < least(partition, needs)
            return
        check(budget, needs)
        assert budget.nbytes <= size

    @settings(max_examples=300)
    @example([need(9, 10, 1), need(9, 10, 1), need(1, 30, 3)], 25, "auto")
    @given(needs_of_any_kind, st.integers(1, 200), st.sampled_from(["auto", "global"]))
    def test_unset_fills_the_memory_and_no_more(self, needs: list[LayerNeed], memory: int, partition: Any) -> None:
        try:
            budget = plan_slots(None, partition, needs, memory)
        except (ValueError, PromoeError):
            assert memory < least(partition, needs)
            return
        check(budget, needs)
        assert budget.nbytes <= memory
        if budget.slots < sum(need.experts for need in needs):
            assert plan_slots(budget.slots + 1, partition, needs, PLENTY).nbytes > memory

    @given(needs_of_one_kind, st.integers(1, 1000), st.integers(1, 1000))
    def test_more_memory_never_gives_fewer_slots(self, needs: list[LayerNeed], size: int, more: int) -> None:
        assume(size >= needs[0].slot_bytes)
        fewer = plan_slots(f"{size}B", "auto", needs, PLENTY)
        greater = plan_slots(f"{size + more}B", "auto", needs, PLENTY)
        assert fewer.slots <= greater.slots
        assert fewer.slots == min(size // needs[0].slot_bytes, sum(need.experts for need in needs))

    @given(needs_of_any_kind, st.integers(1, 60), st.integers(0, 500))
    def test_never_above_the_memory(self, needs: list[LayerNeed], slots: int, memory: int) -> None:
        try:
            budget = plan_slots(slots, "auto", needs, memory)
        except PromoeError:
            assert plan_slots(slots, "auto", needs, PLENTY).nbytes > memory
        except ValueError:
            assert min(slots, sum(need.experts for need in needs)) < kinds(needs)
        else:
            assert budget.nbytes <= memory

    @pytest.mark.parametrize(
        ("slots", "partition", "error", "message"),
        [
            pytest.param(1, "auto", ValueError, "2 kinds of experts and needs as many slots, got 1", id="kinds"),
            pytest.param(2, "layer", ValueError, "at least one slot for each of 3 layers, got 2", id="layers"),
            pytest.param("9B", "auto", ValueError, "9 B hold no expert: one slot takes 20 B", id="size-too-small"),
            pytest.param(12, "auto", PromoeError, "12 slots take 160 B, but only 100 B .* are free", id="memory"),
            pytest.param("200B", "auto", PromoeError, "take .*, but only 100 B", id="size-above-memory"),
        ],
    )
    def test_refused(self, slots: Any, partition: Any, error: type[Exception], message: str) -> None:
        needs = [need(4, 10, 1), need(4, 10, 1), need(4, 20, 2)]
        with pytest.raises(error, match=message):
            plan_slots(slots, partition, needs, 100)

    def test_unset_without_memory_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"9 B of free memory hold no expert: one slot takes 10 B"):
            plan_slots(None, "auto", [need(4, 10)], 9)

    def test_every_kind_gets_a_slot_where_the_first_layers_would_take_all(self) -> None:
        needs = [need(4, 1, 1), need(4, 1, 1), need(4, 1, 2)]
        budget = plan_slots(2, "auto", needs, PLENTY)
        assert budget.shared
        assert sum(budget.slots_of_layer[:2]) == 1
        assert budget.slots_of_layer[2] == 1


class Group:
    """The files of one memory control group."""

    def __init__(self, folder: Path, limit: str, used: int, cache: str = "inactive_file 0") -> None:
        folder.mkdir()
        self.files = (folder / "limit", folder / "usage", folder / "memory.stat")
        for file, text in zip(self.files, (limit, str(used), f"anon 5\n{cache}\nslab 7"), strict=True):
            file.write_text(text + "\n")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes available on a machine whose process is in no control group."""
    monkeypatch.setattr(budget_module, "control_groups", list)
    return available_memory()


class TestAvailableMemory:
    def test_of_the_machine(self, machine: int) -> None:
        lines = Path("/proc/meminfo").read_text().splitlines()
        total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
        assert 0 < machine < total

    @pytest.mark.parametrize(
        ("limit", "used", "cache", "available"),
        [
            pytest.param("1000", 300, "inactive_file 0", 700, id="limit-less-usage"),
            pytest.param("1000", 300, "inactive_file 200", 900, id="page-cache-can-be-reclaimed"),
            # Version 1 tells both: the group's own, and with the groups below it, which its usage counts too.
            pytest.param("1000", 300, "inactive_file 150\ntotal_inactive_file 200", 900, id="page-cache-v1"),
            pytest.param("1000", 1000, "inactive_file 0", 0, id="full"),
            pytest.param("1000", 1200, "inactive_file 0", 0, id="above-the-limit"),
        ],
    )
    def test_of_a_control_group(
        self,
        machine: int,
        limit: str,
        used: int,
        cache: str,
        available: int,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        group = Group(tmp_path / "group", limit, used, cache)
        monkeypatch.setattr(budget_module, "control_groups", lambda: [group.files])
        assert available_memory() == available

    def test_the_tightest_group_counts_and_unlimited_or_hidden_ones_do_not(
        self, machine: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hidden = (tmp_path / "none", tmp_path / "none", tmp_path / "none")
        groups = [
            Group(tmp_path / "inner", "max", 10).files,
            hidden,
            Group(tmp_path / "middle", "5000", 1000).files,
            Group(tmp_path / "outer", "9000", 8000).files,
        ]
        monkeypatch.setattr(budget_module, "control_groups", lambda: groups)
        assert available_memory() == 1000
        monkeypatch.setattr(budget_module, "control_groups", lambda: groups[:2])
        assert abs(available_memory() - machine) < 2**30

    @pytest.mark.parametrize(
        ("lines", "expected"),
        [
            pytest.param(
                "0::/user.slice/session",
                ["/sys/fs/cgroup/user.slice/session", "/sys/fs/cgroup/user.slice", "/sys/fs/cgroup"],
                id="v2-and-all-above",
            ),
            pytest.param("0::/", ["/sys/fs/cgroup"], id="v2-root-of-a-container"),
            pytest.param("4:memory:/box", ["/sys/fs/cgroup/memory/box", "/sys/fs/cgroup/memory"], id="v1"),
            pytest.param("4:cpu,memory:/", ["/sys/fs/cgroup/memory"], id="v1-among-others"),
            pytest.param("3:cpuset:/box\n2:cpu:/box", [], id="no-memory-controller"),
        ],
    )
    def test_groups_of_a_process(self, lines: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        def read_text(path: Path) -> str:
            assert str(path) == "/proc/self/cgroup"
            return lines

        monkeypatch.setattr(Path, "read_text", read_text)
        groups = budget_module.control_groups()
        assert [str(limit.parent) for limit, _, _ in groups] == expected
        for limit, usage, stat in groups:
            v2 = lines.startswith("0::")
            assert limit.name == ("memory.max" if v2 else "memory.limit_in_bytes")
            assert usage.name == ("memory.current" if v2 else "memory.usage_in_bytes")
            assert stat.name == "memory.stat"

    def test_nocontrol_groups_at_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def read_text(path: Path) -> str:
            raise FileNotFoundError(path)

        monkeypatch.setattr(Path, "read_text", read_text)
        assert budget_module.control_groups() == []
