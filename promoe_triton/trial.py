"""Whether decoding is faster with predictions than without: passes of both kinds, compared while the model runs.

Hiding a wait need not shorten a pass: where computing and copying share a processor, what is copied ahead slows what
is computed meanwhile, and by how much cannot be known beforehand. So it is tried. Pure: told the time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from statistics import NormalDist

BLOCK = 4
"""Passes of one kind in a row: the first of them still has what the kind before has copied, or lacks it."""

LEAST, MOST, LOSS = 1 / 64, 1 / 16, 0.005
"""The share of passes that the kind which seems slower gets at any rate, so that what has changed is noticed: as many
as lose this share of the time, within limits."""

WINDOW = 256
"""How many passes, of both kinds, the comparison looks back on: each weighs so much less than the one after it."""

ENOUGH = 4
"""Turns of the two kinds before they are compared. The one before them does not count: first passes make plans."""

INTERRUPTED = 4.0
"""A pass that takes so many times the usual was interrupted by something else, and does not count, unless the one
before took as long."""


class GhostCache:
    """What an LRU cache of so many slots would hold, without the slots: nothing that is copied ahead changes it."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._order: OrderedDict[Hashable, None] = OrderedDict()

    def misses(self, keys: Sequence[Hashable]) -> int:
        """Use these keys, and return how many of them were absent."""
        order, absent = self._order, 0
        for key in keys:
            if key in order:
                order.move_to_end(key)
                continue
            absent += 1
            order[key] = None
            if len(order) > self._slots:
                order.popitem(last=False)
        return absent


@dataclass(slots=True)
class _Sums:
    """Sums over the passes of one kind, with their weights: of misses x and seconds y."""

    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0

    def fade(self, kept: float) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) * kept)

    def add(self, x: float, y: float) -> None:
        self.n += 1.0
        self.x += x
        self.y += y
        self.xx += x * x
        self.xy += x * y
        self.yy += y * y

    def within(self) -> tuple[float, float, float]:
        """Return the sums of squares and products of deviations from the means: xx, xy, yy."""
        x, y = self.x / self.n, self.y / self.n
        return self.xx - x * self.x, self.xy - x * self.y, self.yy - y * self.y


class Trial:
    """Gives passes with and without predictions their turns: the more sure it is which are faster, the fewer others.

    How long a pass takes depends most on how many experts it needs that were not used lately, which chance gives one
    kind or the other; so seconds are compared at equal numbers of them (analysis of covariance): the misses of a
    `GhostCache`, as those of the true one are partly what predictions do.
    """

    def __init__(self) -> None:
        self.predicting = True
        self._kinds = {True: _Sums(), False: _Sums()}
        self._passes = 0
        self._due = 0.0
        self._shortest = inf
        self._was_slow = False

    def note(self, seconds: float, absent: int) -> None:
        """A pass has taken so long. absent: experts it needed that a `GhostCache` had not."""
        self._passes += 1
        self._shortest = min(self._shortest, seconds)
        on, off = self._kinds[True], self._kinds[False]
        noted = on.n + off.n
        is_slow = seconds > INTERRUPTED * ((on.y + off.y) / noted if noted >= BLOCK else self._shortest)
        if self._passes > BLOCK and (self._was_slow or not is_slow):
            for kind in (on, off):
                kind.fade(1.0 - 1.0 / WINDOW)
            self._kinds[self.predicting].add(absent, seconds)
        self._was_slow = is_slow
        if self._passes % BLOCK == 0:
            self._due += self.share()
            self.predicting = self._due >= 1.0
            self._due -= self.predicting

    def share(self) -> float:
        """Return which share of the passes should have predictions: how likely it is that they are faster."""
        on, off = self._kinds[True], self._kinds[False]
        if self._passes < (1 + ENOUGH) * BLOCK or min(on.n, off.n) < 1.0:
            return 0.5
        xx, xy, yy = (a + b for a, b in zip(on.within(), off.within(), strict=True))
        slope = xy / xx if xx > 0.0 else 0.0
        usual = off.y / off.n
        more = off.x / off.n - on.x / on.n
        saved = usual - on.y / on.n - slope * more
        spread = max(yy - slope * xy, 0.0) / max(on.n + off.n - 3.0, 1.0)
        error = sqrt(spread * (1.0 / on.n + 1.0 / off.n + (more * more / xx if xx > 0.0 else 0.0)))
        likely = NormalDist().cdf(saved / error) if error > 0.0 else float(saved >= 0.0)
        least = max(min(LOSS * usual / abs(saved), MOST), LEAST) if saved else MOST
        return min(max(likely, least), 1.0 - least)
