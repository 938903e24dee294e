"""The slot table, driven in any legal order beside a plain model of what it should hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from promoe_triton.policies import Predicted, make_policy
from promoe_triton.protocols import ExpertKey
from promoe_triton.slots import SlotTable

KEYS = [ExpertKey(layer, expert) for layer in range(2) for expert in range(4)]
# Two ties, so that the order of admission decides between them; the last expert is not in the profile.
POPULARITY = {key: float(rank // 2) for rank, key in enumerate(KEYS[:-1])}


def lru_victim(history: list[tuple[str, ExpertKey]], free: set[ExpertKey]) -> ExpertKey:
    """The one whose last mention lies furthest back."""
    last = {key: time for time, (_, key) in enumerate(history)}
    return min(free, key=lambda key: last[key])


def lfru_victim(history: list[tuple[str, ExpertKey]], free: set[ExpertKey]) -> ExpertKey:
    """The one with the fewest uses since it was last admitted, over the events since its last use."""

    def score(key: ExpertKey) -> tuple[float, ExpertKey]:
        times = [time for time, (_, other) in enumerate(history) if other == key]
        admitted = max(time for time in times if history[time][0] == "admit")
        return sum(time >= admitted for time in times) / (len(history) - times[-1]), key

    return min(free, key=score)


def static_victim(history: list[tuple[str, ExpertKey]], free: set[ExpertKey]) -> ExpertKey:
    """The least popular, and the one admitted first among equals."""
    admitted = {key: time for time, (event, key) in enumerate(history) if event == "admit"}
    return min(free, key=lambda key: (POPULARITY.get(key, 0.0), admitted[key]))


def predicted_victim(history: list[tuple[str, ExpertKey]], free: set[ExpertKey]) -> ExpertKey:
    """The one with the least count, where every use counts 1 and makes all that was counted before it count less."""
    counts: dict[ExpertKey, float] = {}
    admitted = {key: time for time, (event, key) in enumerate(history) if event == "admit"}
    for event, key in history:
        counts[key] = counts.get(key, 0.0) + {"admit": 0.0, "use": 1.0, "expect": Predicted.NEARLY}[event]
        if event == "use":
            faded = 0.5 ** (1.0 / (Predicted.HALF_LIFE * len(counts)))
            counts = {key: count * faded for key, count in counts.items()}
    return min(free, key=lambda key: (round(counts.get(key, 0.0), 9), admitted[key]))


VICTIM = {"lru": lru_victim, "lfru": lfru_victim, "predicted": predicted_victim, "static": static_victim}


class Slots(RuleBasedStateMachine):
    """`leases` and `slot` say what the table should hold; `history` is all that a policy may know."""

    policy = "lru"

    @initialize(numbers=st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True))
    def open(self, numbers: list[int]) -> None:
        self.numbers = numbers
        self.table = SlotTable(numbers, make_policy(self.policy, POPULARITY))
        self.slot: dict[ExpertKey, int] = {}
        self.filling: set[ExpertKey] = set()
        self.leases: dict[ExpertKey, int] = {}
        self.history: list[tuple[str, ExpertKey]] = []

    def unleased(self) -> set[ExpertKey]:
        return self.slot.keys() - self.leases.keys()

    def ready(self) -> set[ExpertKey]:
        return self.slot.keys() - self.filling

    @rule(key=st.sampled_from(KEYS), kept=st.sets(st.sampled_from(KEYS), max_size=3))
    def admit(self, key: ExpertKey, kept: set[ExpertKey]) -> None:
        if key in self.slot:
            with pytest.raises(ValueError, match=f"already has slot {self.slot[key]}"):
                self.table.admit(key, kept)
            return
        full = len(self.slot) == len(self.numbers)
        if full and not self.unleased() - kept:
            assert self.table.admit(key, kept) is None
            return
        expected = VICTIM[self.policy](self.history, self.unleased() - kept) if full else None
        evictions = self.table.evictions
        slot = self.table.admit(key, kept)
        assert self.table.evictions == evictions + (expected is not None)
        if expected is not None:
            assert self.table.slot_of(expected) is None
            assert slot == self.slot.pop(expected)
        assert slot in self.numbers
        assert slot not in self.slot.values()
        self.slot[key] = slot
        self.filling.add(key)
        self.leases[key] = 1
        self.history.append(("admit", key))

    @rule(key=st.sampled_from(KEYS))
    def touch(self, key: ExpertKey) -> None:
        self.table.touch([key])
        self.note("use", key)

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=3, unique=True))
    def expect(self, keys: list[ExpertKey]) -> None:
        self.table.expect(keys)
        for key in keys:
            self.note("expect" if self.policy == "predicted" else "use", key)

    def note(self, event: str, key: ExpertKey) -> None:
        """Only one policy remembers what is in no slot."""
        if key in self.slot or self.policy == "predicted":
            self.history.append((event, key))

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def filled(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.filling)))
        self.table.filled(key)
        self.filling.remove(key)

    @rule(key=st.sampled_from(KEYS))
    def lease(self, key: ExpertKey) -> None:
        if key not in self.ready():
            with pytest.raises(ValueError, match="not ready"):
                self.table.lease([key])
            return
        self.table.lease([key])
        self.leases[key] = self.leases.get(key, 0) + 1

    @rule(key=st.sampled_from(KEYS))
    def release(self, key: ExpertKey) -> None:
        if key in self.filling or key not in self.leases:
            with pytest.raises(ValueError, match="no lease"):
                self.table.release([key])
            return
        self.table.release([key])
        self.leases[key] -= 1
        if not self.leases[key]:
            del self.leases[key]

    @precondition(lambda self: self.slot)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.slot)))
        self.table.drop(key)
        del self.slot[key]
        self.filling.discard(key)
        self.leases.pop(key, None)

    @invariant()
    def agrees(self) -> None:
        table = self.table
        table.check_integrity()
        assert len(table) == len(self.numbers)
        assert {key: table.slot_of(key) for key in KEYS if table.slot_of(key) is not None} == self.slot
        assert set(table.ready()) == {key for key in KEYS if table.is_ready(key)} == self.ready()
        assert table.available() == len(self.numbers) - len(self.leases)


def _machine(name: str) -> Any:
    machine = type(f"{name}Slots", (Slots,), {"policy": name})
    case = cast(Any, machine).TestCase
    case.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
    return case


TestLRU = _machine("lru")
TestLFRU = _machine("lfru")
TestPredicted = _machine("predicted")
TestStatic = _machine("static")


def test_no_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one slot"):
        SlotTable([], make_policy("lru", {}))


def test_slots_are_handed_out_in_order() -> None:
    table = SlotTable([5, 3, 9], make_policy("lru", {}))
    assert [table.admit(key) for key in KEYS[:3]] == [5, 3, 9]


def test_a_failed_admit_changes_nothing() -> None:
    table = SlotTable([0], make_policy("lru", {}))
    table.admit(KEYS[0])
    assert table.admit(KEYS[1]) is None
    table.check_integrity()
    assert table.slot_of(KEYS[1]) is None
    table.filled(KEYS[0])
    table.release([KEYS[0]])
    assert table.admit(KEYS[1], kept={KEYS[0]}) is None
    assert table.admit(KEYS[1]) == 0
    assert (table.slot_of(KEYS[0]), table.evictions) == (None, 1)


def test_a_dropped_slot_is_free_whatever_its_leases() -> None:
    table = SlotTable([0], make_policy("lru", {}))
    table.admit(KEYS[0])
    table.filled(KEYS[0])
    table.lease([KEYS[0]])
    assert table.available() == 0
    table.drop(KEYS[0])
    assert table.available() == 1
    assert (table.admit(KEYS[0]), table.evictions) == (0, 0)


def twice(table: SlotTable) -> None:
    table._slot_of[KEYS[5]] = 0


def lost(table: SlotTable) -> None:
    table._free.clear()


def ready_nowhere(table: SlotTable) -> None:
    table._ready[KEYS[5]] = None


def leased_nowhere(table: SlotTable) -> None:
    table._leases[KEYS[5]] = 1


def filling_unleased(table: SlotTable) -> None:
    table._leases.clear()


def no_lease_kept(table: SlotTable) -> None:
    table._leases[KEYS[0]] = 0


@pytest.mark.parametrize(
    "damage",
    [
        twice,  # one slot, two experts
        lost,  # a slot that is neither free nor taken
        ready_nowhere,
        leased_nowhere,
        filling_unleased,
        no_lease_kept,
    ],
    ids=lambda damage: damage.__name__,
)
def test_check_integrity_notices(damage: Callable[[SlotTable], None]) -> None:
    table = SlotTable(range(3), make_policy("lru", {}))
    table.admit(KEYS[0])
    table.check_integrity()
    damage(table)
    with pytest.raises(AssertionError):
        table.check_integrity()
