"""Bookkeeping of slots: which expert is where, what is leased, who leaves next. No memory, no copies.

Pure and deterministic: the same calls give the same slots, so that a real link, a simulator and a property
test drive one and the same code.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Sequence, Set
from dataclasses import dataclass

from promoe_triton.protocols import ExpertKey, Policy


@dataclass(frozen=True, slots=True)
class _Either:
    """What is in one of two: no set of all of it is made, as few of those are asked for."""

    one: Container[ExpertKey]
    other: Container[ExpertKey]

    def __contains__(self, key: object) -> bool:
        return key in self.one or key in self.other


@dataclass(frozen=True, slots=True)
class _AllBut:
    """What is in none of these."""

    keys: Container[ExpertKey]

    def __contains__(self, key: object) -> bool:
        return key not in self.keys


class SlotTable:
    """The slots of one partition, a layer's own or one shared by several.

    An expert is absent, filling (its slot is taken, its bytes are not there yet) or ready. Filling experts are
    always leased; ready ones may be.
    """

    def __init__(self, slots: Iterable[int], policy: Policy) -> None:
        self._all = tuple(slots)
        if not self._all:
            raise ValueError("a slot table needs at least one slot")
        self.evictions = 0
        self._free = list(reversed(self._all))
        self._policy = policy
        self._slot_of: dict[ExpertKey, int] = {}
        self._ready: dict[ExpertKey, None] = {}
        self._leases: dict[ExpertKey, int] = {}

    def __len__(self) -> int:
        return len(self._all)

    def slot_of(self, key: ExpertKey) -> int | None:
        return self._slot_of.get(key)

    def is_ready(self, key: ExpertKey) -> bool:
        return key in self._ready

    def holds(self, keys: Sequence[ExpertKey]) -> bool:
        """Whether all these experts are ready, in slots enough for all of them."""
        return len(self) >= len(keys) and all(map(self.is_ready, keys))

    def ready(self) -> Set[ExpertKey]:
        """Return the experts that are ready; a view, longest ready first."""
        return self._ready.keys()

    def available(self) -> int:
        """Slots that `admit` could give out now: free ones and those of experts nobody leases."""
        return len(self._free) + len(self._slot_of) - len(self._leases)

    def lease(self, keys: Iterable[ExpertKey]) -> None:
        """Promise not to evict ready experts until as many `release` calls have come for each."""
        ready, leases = self._ready, self._leases
        for key in keys:
            if key not in ready:
                raise ValueError(f"{key} is not ready and cannot be leased")
            leases[key] = leases.get(key, 0) + 1

    def release(self, keys: Iterable[ExpertKey]) -> None:
        """Give back one lease of each."""
        ready, leases = self._ready, self._leases
        for key in keys:
            count = leases.get(key)
            if count is None or key not in ready:
                raise ValueError(f"{key} has no lease to release")
            if count == 1:
                del leases[key]
            else:
                leases[key] = count - 1

    def touch(self, keys: Iterable[ExpertKey]) -> None:
        """Count experts as used, one after the other, in slots or not."""
        self._policy.used(keys)

    def expect(self, keys: Iterable[ExpertKey]) -> None:
        """Count experts as predicted, the likeliest last, in slots or not."""
        self._policy.expected(keys)

    def admit(self, key: ExpertKey, kept: Container[ExpertKey] | None = None, cold: bool = False) -> int | None:
        """Take a slot for an absent expert and lease it; None where all others are leased or `kept`.

        cold: it is not needed again soon, and the first to leave.
        """
        if key in self._slot_of:
            raise ValueError(f"{key} already has slot {self._slot_of[key]}")
        if not self._free and not self._evict(kept):
            return None
        slot = self._free.pop()
        self._slot_of[key] = slot
        self._leases[key] = 1
        self._policy.admitted(key, cold)
        return slot

    def least(self, keys: Collection[ExpertKey]) -> ExpertKey:
        """Return which of these ready experts would be the first to leave if they were all there is, leases aside."""
        victim = self._policy.victim(_AllBut({*keys}))
        assert victim is not None
        return victim

    def make_room(self, slots: int) -> None:
        """Evict experts until so many slots are free, or all that are left are leased."""
        while len(self._free) < slots and self._evict():
            pass

    def _evict(self, kept: Container[ExpertKey] | None = None) -> bool:
        if len(self._leases) == len(self._slot_of):
            return False
        victim = self._policy.victim(self._leases if kept is None else _Either(self._leases, kept))
        if victim is None:
            return False
        self._vacate(victim)
        self.evictions += 1
        return True

    def filled(self, key: ExpertKey) -> None:
        """The bytes of a filling expert have landed: it is ready, and still leased by who admitted it."""
        if key not in self._slot_of:
            raise ValueError(f"{key} has no slot that could be filled")
        self._ready[key] = None

    def drop(self, key: ExpertKey) -> None:
        """Take an expert out whatever its state, leases included. Nothing may be in flight for its slot."""
        self._leases.pop(key, None)
        self._vacate(key)

    def _vacate(self, key: ExpertKey) -> None:
        self._ready.pop(key, None)
        self._free.append(self._slot_of.pop(key))
        self._policy.evicted(key)

    def check_integrity(self) -> None:
        """Raise AssertionError unless the table keeps its promises."""
        taken = list(self._slot_of.values())
        assert sorted(taken + self._free) == sorted(self._all), "each slot holds one expert or is free"
        assert self._ready.keys() <= self._slot_of.keys(), "what is ready has a slot"
        assert self._leases.keys() <= self._slot_of.keys(), "what is leased has a slot"
        assert self._slot_of.keys() - self._ready.keys() <= self._leases.keys(), "what is filling is leased"
        assert all(count > 0 for count in self._leases.values()), "no lease count below one is kept"
        assert 0 <= self.available() <= len(self._all)
