"""Which predictions are worth a copy: those that have come true often enough, by way, layer and rank.

What counts is the experts that a layer would have missed (accuracy over all of them flatters: most are in slots
anyway). A guess is judged whether it was copied or not, so that a predictor that was given up can win trust again.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass

PLACES = 8
"""Ranks of one prediction that are told apart; a longer one is cut into so many equal parts."""

WORTH = 0.4
"""The least share of guesses that must come true. A wrong one takes the slot of an expert that may be needed, and
part of the link; a right one saves a layer's waiting."""

KEPT = 63 / 64
"""How much older guesses count at each new one."""

PRIOR, PRIOR_GUESSES, SHARED_GUESSES = 0.6, 4.0, 8.0
"""What is believed before anything is known, as so many guesses; and how many those of all layers count for one."""


@dataclass(slots=True)
class _Record:
    guesses: float = 0.0
    right: float = 0.0

    def note(self, right: bool) -> None:
        self.guesses = self.guesses * KEPT + 1.0
        self.right = self.right * KEPT + right

    def rate(self, believed: float, weight: float) -> float:
        return (self.right + believed * weight) / (self.guesses + weight)


class Admission:
    """Judges predictions by rank. A *way* is where a prediction comes from: a seam, and how far ahead it looks."""

    def __init__(self, worth: float = WORTH) -> None:
        self._worth = worth
        self._all: dict[Hashable, list[_Record]] = {}
        self._own: dict[tuple[Hashable, int], list[_Record]] = {}
        self._worthy: dict[tuple[Hashable, int], list[bool]] = {}
        self._open: dict[int, dict[Hashable, list[tuple[int, int]]]] = {}

    def rate(self, way: Hashable, layer: int, place: int) -> float:
        """Return the share of guesses at this place that come true."""
        everywhere, own = self._records(way, layer)
        return own[place].rate(everywhere[place].rate(PRIOR, PRIOR_GUESSES), SHARED_GUESSES)

    def worthy(self, way: Hashable, layer: int) -> list[bool]:
        """Return by place whether a guess is worth a copy."""
        known = self._worthy.get((way, layer))
        if known is None:
            known = [self.rate(way, layer, place) >= self._worth for place in range(PLACES)]
            self._worthy[way, layer] = known
        return known

    def guessed(self, way: Hashable, layer: int, guesses: Iterable[tuple[int, int]]) -> None:
        """Note (expert, place) pairs that this way names for a layer, and that are not there yet."""
        self._open.setdefault(layer, {})[way] = list(guesses)

    def settle(self, layer: int, needed: Collection[int]) -> None:
        """The layer needs these experts: judge what was guessed."""
        for way, guesses in self._open.pop(layer, _NO_GUESSES).items():
            everywhere, own = self._records(way, layer)
            worthy = self.worthy(way, layer)
            for expert, place in guesses:
                right = expert in needed
                everywhere[place].note(right)
                own[place].note(right)
            for place in {place for _, place in guesses}:
                worthy[place] = self.rate(way, layer, place) >= self._worth

    def _records(self, way: Hashable, layer: int) -> tuple[list[_Record], list[_Record]]:
        """Return what is known of a way by place: over all layers, and of this one."""
        everywhere, own = self._all.get(way), self._own.get((way, layer))
        if everywhere is None:
            everywhere = self._all[way] = [_Record() for _ in range(PLACES)]
        if own is None:
            own = self._own[way, layer] = [_Record() for _ in range(PLACES)]
        return everywhere, own


_NO_GUESSES: dict[Hashable, list[tuple[int, int]]] = {}


@functools.cache
def places(ranked: int) -> tuple[int, ...]:
    """Return the place of each rank among so many."""
    return tuple(rank if ranked <= PLACES else rank * PLACES // ranked for rank in range(ranked))
