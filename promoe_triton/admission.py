"""Which predictions are worth a copy: those that have come true often enough, by way, layer and rank.

What counts is the experts that a layer would have missed (accuracy over all of them flatters: most are in slots
anyway). A guess is judged whether it was copied or not, so that a predictor that was given up can win trust again.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

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


def _records() -> list[_Record]:
    return [_Record() for _ in range(PLACES)]


@dataclass(slots=True)
class Standing:
    """What is known, by place, of the guesses that come one way for one layer.

    worthy: whether a guess is worth a copy. open: guesses that the layer has not settled yet, as (expert, place).
    """

    everywhere: list[_Record]
    own: list[_Record] = field(default_factory=_records)
    worthy: list[bool] = field(default_factory=list)
    open: Sequence[tuple[int, int]] = ()

    def rate(self, place: int) -> float:
        """Return the share of guesses at this place that come true."""
        believed = self.everywhere[place].rate(PRIOR, PRIOR_GUESSES)
        return self.own[place].rate(believed, SHARED_GUESSES)


class Admission:
    """Judges predictions by rank. A *way* is where a prediction comes from: a seam, and how far ahead it looks."""

    def __init__(self, worth: float = WORTH) -> None:
        self._worth = worth
        self._everywhere: dict[Hashable, list[_Record]] = {}
        self._standings: dict[int, dict[Hashable, Standing]] = {}

    def of(self, way: Hashable, layer: int) -> Standing:
        """Return what is known of a way for a layer; its open guesses are whoever predicts to set."""
        standings = self._standings.setdefault(layer, {})
        standing = standings.get(way)
        if standing is None:
            standing = standings[way] = Standing(self._everywhere.setdefault(way, _records()))
            standing.worthy = [standing.rate(place) >= self._worth for place in range(PLACES)]
        return standing

    def settle(self, layer: int, needed: Collection[int]) -> None:
        """The layer needs these experts: judge what was guessed."""
        for standing in self._standings.get(layer, _NONE).values():
            guesses, standing.open = standing.open, ()
            for expert, place in guesses:
                right = expert in needed
                standing.everywhere[place].note(right)
                standing.own[place].note(right)
            for place in {place for _, place in guesses}:
                standing.worthy[place] = standing.rate(place) >= self._worth


_NONE: Mapping[Hashable, Standing] = {}


@functools.cache
def places(ranked: int) -> tuple[int, ...]:
    """Return the place of each rank among so many."""
    return tuple(rank if ranked <= PLACES else rank * PLACES // ranked for rank in range(ranked))
