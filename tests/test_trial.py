"""Passes with and without predictions, compared: which of them get more turns, and how soon."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoe_triton.protocols import Seam
from promoe_triton.speculation import PROMPT, Place, Speculation
from promoe_triton.trial import BLOCK, INTERRUPTED, LEAST, MOST, WINDOW, Trial

MISS = 2e-3
"""Seconds that a pass of these tests takes for each expert that is absent, beside a tenth of a second."""


def passes(trial: Trial, number: int, factor: float, rng: random.Random, more: int = 0) -> int:
    """Let so many passes run; return how many had predictions.

    factor: how long those take compared to others. more: experts absent in them, beside those of any pass.
    """
    predicted = 0
    for _ in range(number):
        predicted += trial.predicting
        absent = rng.randint(0, 30) + more * trial.predicting
        seconds = (0.1 + MISS * absent) * rng.uniform(0.9, 1.1)
        trial.note(seconds * (factor if trial.predicting else 1.0), absent)
    return predicted


def test_the_first_passes_have_predictions_and_then_both_kinds_take_turns() -> None:
    trial, kinds = Trial(), []
    for _ in range(6 * BLOCK):
        kinds.append(trial.predicting)
        trial.note(1.0, 0)
    assert kinds[:BLOCK] == [True] * BLOCK
    assert kinds[BLOCK : 5 * BLOCK] == ([False] * BLOCK + [True] * BLOCK) * 2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("factor", "least", "most"), [(1.1, 0.0, 0.15), (0.9, 0.85, 1.0)])
def test_the_slower_kind_becomes_rare_within_a_hundred_passes(
    factor: float, least: float, most: float, seed: int
) -> None:
    trial, rng = Trial(), random.Random(seed)
    passes(trial, 100, factor, rng)
    assert least <= passes(trial, 400, factor, rng) / 400 <= most


@pytest.mark.parametrize("seed", range(5))
def test_over_all_passes_no_more_than_two_per_cent_are_lost(seed: int) -> None:
    """By a kind that is up to 15 % slower: what little it costs is seen late, what it costs much is seen at once."""
    for factor in (0.85, 0.93, 0.97, 1.03, 1.07, 1.15):
        trial, rng = Trial(), random.Random(seed)
        predicted = passes(trial, 1000, factor, rng) / 1000
        assert predicted * factor + 1.0 - predicted <= 1.02 * min(factor, 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_the_faster_kind_is_faster_though_chance_gives_it_more_misses(seed: int) -> None:
    trial, rng = Trial(), random.Random(seed)
    passes(trial, 100, 0.9, rng, more=15)
    assert passes(trial, 400, 0.9, rng, more=15) / 400 > 0.85


def test_what_has_changed_is_noticed() -> None:
    trial, rng = Trial(), random.Random(0)
    passes(trial, 400, 1.1, rng)
    assert passes(trial, 100, 1.1, rng) < 10
    passes(trial, 4 * WINDOW, 0.85, rng)
    assert passes(trial, 100, 0.85, rng) > 90


@pytest.mark.parametrize("kind", [True, False])
def test_an_interrupted_pass_does_not_count(kind: bool) -> None:
    """A person thinks for an hour, in a pass of either kind."""
    trial, rng = Trial(), random.Random(0)
    passes(trial, 100, 0.8, rng)
    before = trial.share()
    while trial.predicting is not kind:
        passes(trial, 1, 0.8, rng)
    trial.note(3600.0, 10)
    assert trial.share() == pytest.approx(before, abs=0.05)


def test_a_machine_that_has_become_much_slower_is_believed_in_the_end() -> None:
    trial, rng = Trial(), random.Random(0)
    passes(trial, 200, 0.9, rng)
    passes(trial, 200, 0.9 * 2 * INTERRUPTED, rng)
    assert trial.share() == LEAST


@given(st.lists(st.tuples(st.floats(0.0, 1e6), st.integers(0, 1000)), max_size=200))
def test_whatever_is_noted_both_kinds_keep_their_turns(noted: list[tuple[float, int]]) -> None:
    trial = Trial()
    for seconds, absent in noted:
        trial.note(seconds, absent)
        assert LEAST <= trial.share() <= 1.0 - LEAST


PLACE = Place(0, Seam.ROUTED)


def run(speculation: Speculation, number: int, seconds: Callable[[bool], float], tokens: int = 1) -> list[bool]:
    """Let passes of two layers run that take so long with predictions or without; return which were predicted."""
    now, predicted = 0.0, []
    for _ in range(number):
        speculation.routed(0, tokens, now, 0.0, 0)
        predicted.append(not speculation.leaves_out(PLACE))
        speculation.routed(1, tokens, now, 0.0, 0)
        assert predicted[-1] is not speculation.leaves_out(Place(1, Seam.ROUTED)), "a pass is of one kind"
        now += seconds(predicted[-1])
    return predicted


def slower(predicted: bool) -> float:
    return 1.1 if predicted else 1.0


def test_passes_are_told_apart_by_their_first_layer() -> None:
    speculation = Speculation()
    predicted = run(speculation, 200, slower)
    assert sum(predicted[100:]) <= 100 * 2 * MOST
    assert sum(predicted) == speculation.predicted


def test_always_is_always() -> None:
    assert all(run(Speculation(always=True), 100, slower))


def test_batches_of_another_size_are_tried_for_themselves() -> None:
    speculation = Speculation()
    run(speculation, 200, slower)
    assert sum(run(speculation, 40, slower, tokens=8)) >= 3 * BLOCK


def test_a_prompt_is_shown_to_the_predictor_and_counts_for_nothing() -> None:
    speculation = Speculation()
    run(speculation, 200, slower)
    before = speculation.predicted
    assert all(run(speculation, 10, slower, tokens=PROMPT))
    assert speculation.predicted == before
