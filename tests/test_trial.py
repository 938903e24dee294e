"""Passes with and without predictions, compared: which of them get more turns, and how soon."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoe_triton.speculation import PROMPT, Speculation
from promoe_triton.trial import BLOCK, INTERRUPTED, LEAST, MOST, WINDOW, GhostCache, Trial

MISS = 2e-3
"""Seconds that a pass of these tests takes for each expert that is absent, beside a tenth of a second."""


def passes(trial: Trial, number: int, factor: float, rng: random.Random) -> int:
    """Let so many passes run; return how many had predictions. factor: how long those take compared to others."""
    predicted = 0
    for _ in range(number):
        predicted += trial.predicting
        absent = rng.randint(0, 30)
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


def test_chance_that_gives_one_kind_more_misses_decides_nothing() -> None:
    """Of equal kinds: what is certain is not the difference, and what is uncertain keeps both at their turns."""
    shares = []
    for seed in range(200):
        trial, rng = Trial(), random.Random(seed)
        for _ in range(5 * BLOCK):
            absent = rng.randint(10, 13) + 3 * trial.predicting
            trial.note(0.1 + MISS * absent + rng.gauss(0.0, 0.01), absent)
        shares.append(trial.share())
    assert sum(0.1 < share < 0.9 for share in shares) > 0.65 * len(shares)


def test_an_interruption_at_the_very_beginning_is_no_measure() -> None:
    for moment in range(1, 6 * BLOCK):
        trial, rng = Trial(), random.Random(moment)
        passes(trial, moment, 1.15, rng)
        trial.note(3600.0, 10)
        passes(trial, 100, 1.15, rng)
        assert passes(trial, 200, 1.15, rng) < 30, moment


def test_what_has_changed_is_noticed() -> None:
    trial, rng = Trial(), random.Random(0)
    passes(trial, 400, 1.1, rng)
    assert passes(trial, 100, 1.1, rng) < 10
    passes(trial, 4 * WINDOW, 0.85, rng)
    assert passes(trial, 100, 0.85, rng) > 90


@pytest.mark.parametrize(("kind", "factor"), [(True, 0.8), (False, 1.25)])
def test_an_interrupted_pass_does_not_count(kind: bool, factor: float) -> None:
    """A person thinks for an hour, in a pass of the kind that is faster."""
    trial, rng = Trial(), random.Random(0)
    passes(trial, 100, factor, rng)
    before = trial.share()
    while trial.predicting is not kind:
        passes(trial, 1, factor, rng)
    trial.note(3600.0, 10)
    assert trial.share() == pytest.approx(before, abs=0.05)


def test_a_kind_that_has_become_much_slower_is_believed_at_once() -> None:
    trial, rng = Trial(), random.Random(0)
    passes(trial, 200, 0.9, rng)
    assert passes(trial, 200, 0.9 * 2 * INTERRUPTED, rng) < 8 * BLOCK


@given(st.lists(st.tuples(st.floats(0.0, 1e6), st.integers(0, 1000)), max_size=200))
def test_whatever_is_noted_neither_kind_is_given_up(noted: list[tuple[float, int]]) -> None:
    trial = Trial()
    for seconds, absent in noted:
        trial.note(seconds, absent)
        assert LEAST <= trial.share() <= 1.0 - LEAST


def run(speculation: Speculation, number: int, seconds: Callable[[bool], float], tokens: int = 1) -> list[bool]:
    """Let passes of two layers run that take so long with predictions or without; return which were predicted."""
    now, predicted = 0.0, []
    for _ in range(number):
        speculation.routed(0, tokens, now, 0.0, 0)
        predicted.append(speculation.predicting)
        speculation.routed(1, tokens, now, 0.0, 0)
        assert predicted[-1] is speculation.predicting, "a pass is of one kind"
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


def test_sizes_that_change_from_pass_to_pass_are_judged_as_well() -> None:
    speculation, now = Speculation(), 0.0
    for index in range(300):
        speculation.routed(0, 5 + index % 3, now, 0.0, 0)
        now += slower(speculation.predicting)
    assert speculation.predicted < 60


def test_passes_of_two_threads_that_come_between_each_other_are_not_timed() -> None:
    """Each thread's layers in order, the other's in between: what is between two first layers is no pass."""
    speculation = Speculation()
    run(speculation, 40, slower)
    trial = speculation._trials[1]
    before = trial._passes
    for step in range(50):
        for layer in (0, 0, 1, 1):
            speculation.routed(layer, 1, 100.0 + step, 0.0, 0)
    assert trial._passes <= before + 1


def test_a_pause_between_two_passes_is_no_layer_that_takes_long() -> None:
    """What is copied ahead is held to what the link brings until the layer comes, also after a person has thought."""
    speculation, now = Speculation(), 0.0
    for step in range(40):
        for layer in range(4):
            now += 60.0 if layer == 0 and step % 4 == 3 else 1e-3
            speculation.routed(layer, 1, now, 0.0, 0)
            if step > 10:
                assert 0.9e-3 < speculation._layer_seconds < 1.5e-3
    for _ in range(60):
        now += 1e-2
        speculation.routed(0, 1, now, 0.0, 0)
    assert speculation._layer_seconds == pytest.approx(1e-2, rel=0.1), "but what lasts is believed"


def test_a_ghost_cache_misses_what_an_lru_cache_would() -> None:
    ghost = GhostCache(2)
    assert [ghost.misses([key]) for key in "abacbca"] == [1, 1, 0, 1, 1, 0, 1]
    assert ghost.misses("ca") == 0
    assert len(ghost._order) == 2
