"""Which predictions are worth a copy."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from promoe_triton.admission import PLACES, PRIOR, WORTH, Admission, places


def judge(admission: Admission, way: str, layer: int, outcomes: list[bool], place: int = 0) -> None:
    for right in outcomes:
        admission.of(way, layer).open = [(7, place)]
        admission.settle(layer, [7] if right else [])


def test_what_is_not_known_yet_is_tried() -> None:
    assert PRIOR >= WORTH
    assert Admission().of("way", 0).worthy == [True] * PLACES


def test_each_rank_is_judged_for_itself() -> None:
    admission = Admission()
    judge(admission, "way", 0, [True] * 40, place=0)
    judge(admission, "way", 0, [False] * 40, place=1)
    assert admission.of("way", 0).worthy[:2] == [True, False]


def test_what_a_way_does_elsewhere_is_believed_until_a_layer_has_its_own_record() -> None:
    admission = Admission()
    for layer in range(1, 5):
        judge(admission, "way", layer, [False] * 20)
    assert not admission.of("way", 0).worthy[0]
    judge(admission, "way", 0, [True] * 40)
    assert admission.of("way", 0).worthy[0]
    assert admission.of("another", 4).worthy[0]


def test_trust_is_won_again() -> None:
    admission = Admission()
    judge(admission, "way", 0, [False] * 500)
    assert not admission.of("way", 0).worthy[0]
    judge(admission, "way", 0, [True] * 100)
    assert admission.of("way", 0).worthy[0]


def test_only_the_latest_guess_of_a_way_counts() -> None:
    admission = Admission()
    admission.of("way", 0).open = [(1, 0)]
    admission.of("way", 0).open = [(2, 0)]
    before = admission.of("way", 0).rate(0)
    admission.settle(0, [2])
    assert admission.of("way", 0).rate(0) > before
    after = admission.of("way", 0).rate(0)
    admission.settle(0, [])
    assert admission.of("way", 0).rate(0) == after, "a guess is settled once"


@given(ranked=st.integers(0, 300))
def test_places_keep_the_order_of_ranks(ranked: int) -> None:
    found = places(ranked)
    assert len(found) == ranked
    assert list(found) == sorted(found)
    assert {*found} == {*range(min(ranked, PLACES))}
