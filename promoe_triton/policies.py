"""Replacement policies: which expert leaves when a slot is needed. Pure and deterministic."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Mapping

from promoe_triton.protocols import ExpertKey, Policy

POLICIES = ("lru", "lfru", "predicted", "static")


def make_policy(name: str, popularity: Mapping[ExpertKey, float]) -> Policy:
    """Return a fresh policy. `popularity` (uses per expert, any unit) is what `static` ranks by."""
    match name:
        case "lru":
            return LRU()
        case "lfru":
            return LFRU()
        case "predicted":
            return Predicted()
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
        if key in self._order:
            self._order.move_to_end(key)

    expected = used

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
        if key in self._uses:
            self._touch(key)

    expected = used

    def evicted(self, key: ExpertKey) -> None:
        del self._uses[key], self._last[key]

    def victim(self, kept: Container[ExpertKey]) -> ExpertKey | None:
        return min(
            (key for key in self._uses if key not in kept),
            key=lambda key: (self._uses[key] / (self._now - self._last[key] + 1), key),
            default=None,
        )


class Predicted:
    """The expert leaves that was used and predicted least, both fading: the one least likely to be used again.

    A frequency that halves with time holds more than recency does (LRFU, Lee et al. 2001), and here it also knows of
    experts that are in no slot. An expert that a predictor named, and the layer then did not choose, came near to it:
    it counts too, for less.
    """

    HALF_LIFE = 8.0
    """Uses of an average expert until what was counted before counts half."""

    NEARLY = 0.2
    """What being named by a predictor counts, where being used counts 1."""

    def __init__(self) -> None:
        # What counts grows instead of what was counted shrinking: no event touches more than one expert.
        self._one = 1.0
        self._counts: dict[ExpertKey, float] = {}
        self._inside: dict[ExpertKey, None] = {}
        self._cold: dict[ExpertKey, None] = {}

    def admitted(self, key: ExpertKey, cold: bool = False) -> None:
        self._counts.setdefault(key, 0.0)
        self._inside[key] = None
        if cold:
            self._cold[key] = None

    def used(self, key: ExpertKey) -> None:
        self._counts[key] = self._counts.get(key, 0.0) + self._one
        self._cold.pop(key, None)
        self._one *= 2.0 ** (1.0 / (self.HALF_LIFE * len(self._counts)))
        if self._one > 1e100:
            self._counts = {key: count / self._one for key, count in self._counts.items()}
            self._one = 1.0

    def expected(self, key: ExpertKey) -> None:
        self._counts[key] = self._counts.get(key, 0.0) + self.NEARLY * self._one

    def evicted(self, key: ExpertKey) -> None:
        del self._inside[key]
        self._cold.pop(key, None)

    def victim(self, kept: Container[ExpertKey]) -> ExpertKey | None:
        for key in self._cold:
            if key not in kept:
                return key
        # Of equals the first is taken, and the order is that of admission: first in, first out. To ask what is kept
        # takes longer than to sort, and mostly the very least may leave.
        count = self._counts.__getitem__
        least = min(self._inside, key=count, default=None)
        if least is None or least not in kept:
            return least
        return next((key for key in sorted(self._inside, key=count) if key not in kept), None)


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

    expected = used

    def evicted(self, key: ExpertKey) -> None:
        del self._order[key]

    def victim(self, kept: Container[ExpertKey]) -> ExpertKey | None:
        # min() takes the first of equals, and the order is that of admission: first in, first out.
        return min(
            (key for key in self._order if key not in kept),
            key=lambda key: self._popularity.get(key, 0.0),
            default=None,
        )
