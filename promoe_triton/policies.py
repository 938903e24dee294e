"""Replacement policies: which expert leaves when a slot is needed. Pure and deterministic."""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping

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

    def used(self, keys: Iterable[ExpertKey]) -> None:
        for key in keys:
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

    def used(self, keys: Iterable[ExpertKey]) -> None:
        for key in keys:
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
        self._known, self._growth = 0, 1.0
        self._counts: dict[ExpertKey, float] = {}
        # Which admission brought it in.
        self._inside: dict[ExpertKey, int] = {}
        self._admissions = 0
        self._cold: dict[ExpertKey, None] = {}
        # Sorted by the count as it was when last looked at, and by admission: of equals the first to come in leaves.
        # Counts only grow, so that only what stands before the victim has to be looked at.
        self._order: list[tuple[float, int, ExpertKey]] = []

    def admitted(self, key: ExpertKey, cold: bool = False) -> None:
        count = self._counts.setdefault(key, 0.0)
        self._admissions += 1
        self._inside[key] = self._admissions
        if len(self._order) > 2 * len(self._inside):
            self._sort()
        else:
            insort(self._order, (count, self._admissions, key))
        if cold:
            self._cold[key] = None

    def _sort(self) -> None:
        self._order = sorted((self._counts[key], admission, key) for key, admission in self._inside.items())

    def used(self, keys: Iterable[ExpertKey]) -> None:
        counts, cold = self._counts, self._cold
        for key in keys:
            counts[key] = counts.get(key, 0.0) + self._one
            if cold:
                cold.pop(key, None)
            if self._known != len(counts):
                self._known = len(counts)
                self._growth = 2.0 ** (1.0 / (self.HALF_LIFE * self._known))
            self._one *= self._growth
        if self._one > 1e100:
            self._counts = {key: count / self._one for key, count in counts.items()}
            self._one = 1.0
            self._sort()

    def expected(self, keys: Iterable[ExpertKey]) -> None:
        counts, more = self._counts, self.NEARLY * self._one
        for key in keys:
            counts[key] = counts.get(key, 0.0) + more

    def evicted(self, key: ExpertKey) -> None:
        del self._inside[key]
        self._cold.pop(key, None)

    def victim(self, kept: Container[ExpertKey]) -> ExpertKey | None:
        for key in self._cold:
            if key not in kept:
                return key
        order, counts, inside = self._order, self._counts, self._inside
        at = 0
        while at < len(order):
            count, admission, key = order[at]
            if inside.get(key) != admission:
                del order[at]
            elif counts[key] != count:
                del order[at]
                insort(order, (counts[key], admission, key))
            elif key in kept:
                at += 1
            else:
                return key
        return None


class Static:
    """The least popular expert leaves, by a profile fixed beforehand; unknown experts count as never used.

    The popular ones settle in the slots for good and the others pass through what is left.
    """

    def __init__(self, popularity: Mapping[ExpertKey, float]) -> None:
        self._popularity = popularity
        self._order: dict[ExpertKey, None] = {}

    def admitted(self, key: ExpertKey, cold: bool = False) -> None:
        self._order[key] = None

    def used(self, keys: Iterable[ExpertKey]) -> None:
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
