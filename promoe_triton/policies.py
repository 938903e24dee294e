"""Replacement policies: which expert leaves when a slot is needed. Pure and deterministic."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Mapping

from promoe_triton.protocols import ExpertKey, Policy

POLICIES = ("lru", "lfru", "static")


def make_policy(name: str, popularity: Mapping[ExpertKey, float]) -> Policy:
    """Return a fresh policy. `popularity` (uses per expert, any unit) is what `static` ranks by."""
    match name:
        case "lru":
            return LRU()
        case "lfru":
            return LFRU()
        case "static":
            return Static(popularity)
    raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {name!r}")


class LRU:
    """The least recently used expert leaves (paper, section on the expert cache)."""

    def __init__(self) -> None:
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def admitted(self, key: ExpertKey, cold: bool = False) -> None:
        self._order[key] = None
        if cold:
            self._order.move_to_end(key, last=False)

    def used(self, key: ExpertKey) -> None:
        self._order.move_to_end(key)

    def evicted(self, key: ExpertKey) -> None:
        del self._order[key]

    def victim(self, kept: Container[ExpertKey]) -> ExpertKey | None:
        for key in self._order:
            if key not in kept:
                return key
        return None


class LFRU:
    """Frequency and recency together: the expert with the lowest uses / age leaves.

    Uses are counted while an expert is in a slot and age is the number of events since its last use, so that
    a popular expert survives a pause, but not for ever.
    """

    def __init__(self) -> None:
        self._uses: dict[ExpertKey, int] = {}
        self._last: dict[ExpertKey, int] = {}
        self._now = 0

    def _touch(self, key: ExpertKey) -> None:
        self._now += 1
        self._uses[key] = self._uses.get(key, 0) + 1
        self._last[key] = self._now

    def admitted(self, key: ExpertKey, cold: bool = False) -> None:
        self._touch(key)
        if cold:
            self._uses[key] = 0

    def used(self, key: ExpertKey) -> None:
        self._touch(key)

    def evicted(self, key: ExpertKey) -> None:
        del self._uses[key], self._last[key]

    def victim(self, kept: Container[ExpertKey]) -> ExpertKey | None:
        return min(
            (key for key in self._uses if key not in kept),
            key=lambda key: (self._uses[key] / (self._now - self._last[key] + 1), key),
            default=None,
        )


class Static:
    """The least popular expert leaves, by a profile fixed beforehand; unknown experts count as never used.

    The popular ones settle in the slots for good and the others pass through what is left.
    """

    def __init__(self, popularity: Mapping[ExpertKey, float]) -> None:
        self._popularity = popularity
        self._order: dict[ExpertKey, None] = {}

    def admitted(self, key: ExpertKey, cold: bool = False) -> None:
        self._order[key] = None

    def used(self, key: ExpertKey) -> None:
        pass

    def evicted(self, key: ExpertKey) -> None:
        del self._order[key]

    def victim(self, kept: Container[ExpertKey]) -> ExpertKey | None:
        # min() takes the first of equals, and the order is that of admission: first in, first out.
        return min(
            (key for key in self._order if key not in kept),
            key=lambda key: self._popularity.get(key, 0.0),
            default=None,
        )
