"""Who leaves next. The policies as the slot table drives them are in test_slots.py."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promoe_triton.policies import LFRU, LRU, POLICIES, Predicted, Static, make_policy
from promoe_triton.protocols import ExpertKey, Policy

A, B, C, D = (ExpertKey(0, expert) for expert in range(4))


def play(policy: Policy, events: str) -> Policy:
    """Tell a policy of events: "a" admits expert a, or uses it where it is in already; "-a" evicts it."""
    inside: set[str] = set()
    for event in events.split():
        key = ExpertKey(0, ord(event[-1]) - ord("a"))
        if event.startswith("-"):
            policy.evicted(key)
            inside.remove(event[-1])
        elif event in inside:
            policy.used([key])
        else:
            policy.admitted(key)
            inside.add(event)
    return policy


@pytest.mark.parametrize(
    ("events", "victim"),
    [
        pytest.param("", None, id="nobody-in"),
        pytest.param("a b c", A, id="never-used"),
        pytest.param("a b c a", B, id="first-used-again"),
        pytest.param("a b c a b c", A, id="all-used-again"),
        pytest.param("a b -a", B, id="first-evicted"),
        pytest.param("a b -a a", B, id="back-after-eviction"),
    ],
)
def test_lru(events: str, victim: ExpertKey | None) -> None:
    assert play(LRU(), events).victim(set()) == victim


@pytest.mark.parametrize(
    ("events", "victim"),
    [
        pytest.param("", None, id="nobody-in"),
        pytest.param("a b", A, id="as-often-but-longer-ago"),
        pytest.param("a a a b c", B, id="popular-survives-a-pause"),
        pytest.param("a a b b b b b b b c c c", A, id="but-not-for-ever"),
        pytest.param("a a a -a b c a", B, id="uses-forgotten-with-eviction"),
        # uses / age: b 2/4, a 1/2, c 2/1
        pytest.param("b b c a c", A, id="equal-scores-lower-key"),
    ],
)
def test_lfru(events: str, victim: ExpertKey | None) -> None:
    assert play(LFRU(), events).victim(set()) == victim


@pytest.mark.parametrize(
    ("events", "victim"),
    [
        pytest.param("", None, id="nobody-in"),
        pytest.param("a b c", B, id="least-popular"),
        pytest.param("a b c b b b", B, id="uses-do-not-count"),
        pytest.param("d b a", D, id="unknown-counts-as-never-used"),
        pytest.param("c a", C, id="equals-first-in-first-out"),
        pytest.param("a c", A, id="equals-first-in-first-out-turned"),
        pytest.param("a c -a a", C, id="order-of-the-last-admission"),
    ],
)
def test_static(events: str, victim: ExpertKey | None) -> None:
    popularity = {A: 5.0, B: 2.0, C: 5.0}
    assert play(Static(popularity), events).victim(set()) == victim


def test_what_was_counted_of_an_expert_outlives_its_slot() -> None:
    policy = Predicted()
    for key in (A, B, C):
        policy.used([key])
        policy.admitted(key)
    policy.used([A])
    policy.evicted(A)
    policy.used([B])
    policy.admitted(A)
    assert policy.victim(set()) == C
    assert policy.victim({C}) == A, "both were used twice, B later"


def test_predictions_count_for_less_than_uses() -> None:
    policy = Predicted()
    for key in (A, B, C):
        policy.admitted(key)
    policy.used([C])
    policy.expected([B])
    assert [policy.victim(set()), policy.victim({A}), policy.victim({A, B})] == [A, B, C]
    for _ in range(5):
        policy.expected([B])
    assert policy.victim({A}) == C


def test_what_is_cold_leaves_first_until_it_is_used() -> None:
    policy = Predicted()
    for key in (A, B):
        policy.used([key])
        policy.used([key])
    policy.admitted(A)
    policy.admitted(B, cold=True)
    policy.expected([B])
    assert policy.victim(set()) == B
    policy.used([B])
    assert policy.victim(set()) == A


def test_counts_stay_finite() -> None:
    policy = Predicted()
    policy.admitted(A)
    for _ in range(20_000):
        policy.used([A])
    policy.admitted(B)
    policy.used([B])
    assert policy.victim(set()) == B
    for _ in range(60):
        policy.used([B])
    assert policy.victim(set()) == A


@settings(deadline=None)
@given(data=st.data())
def test_the_least_used_and_predicted_leaves_of_equals_the_first_to_come(data: st.DataObject) -> None:
    """By definition: everything is counted and weighed anew for every question."""
    keys = [ExpertKey(0, expert) for expert in range(8)]
    policy, counts, inside = Predicted(), dict[ExpertKey, float](), list[ExpertKey]()
    one = 1.0
    for event in data.draw(st.lists(st.sampled_from("aaeuuxv"), max_size=80)):
        key = data.draw(st.sampled_from(keys))
        if event == "a" and key not in inside:
            policy.admitted(key)
            counts.setdefault(key, 0.0)
            inside.append(key)
        elif event == "e" and key in inside:
            policy.evicted(key)
            inside.remove(key)
        elif event == "u":
            policy.used([key])
            counts[key] = counts.get(key, 0.0) + one
            one *= 2.0 ** (1.0 / (Predicted.HALF_LIFE * len(counts)))
        elif event == "x":
            policy.expected([key])
            counts[key] = counts.get(key, 0.0) + Predicted.NEARLY * one
        elif event == "v":
            kept = data.draw(st.sets(st.sampled_from(keys)))
            may_leave = [key for key in inside if key not in kept]
            assert policy.victim(kept) == min(may_leave, key=counts.__getitem__, default=None)


def test_what_has_left_is_forgotten_though_nobody_asks() -> None:
    policy = Predicted()
    policy.admitted(B)
    for _ in range(1_000):
        policy.admitted(A)
        policy.evicted(A)
    assert len(pickle.dumps(policy)) < 1_000


@pytest.mark.parametrize("name", POLICIES)
def test_the_kept_stay(name: str) -> None:
    policy = play(make_policy(name, {A: 1.0, B: 2.0, C: 3.0}), "a b c")
    assert policy.victim(set()) == A
    assert policy.victim({A}) == B
    assert policy.victim({A, B, D}) == C
    assert policy.victim({A, B, C}) is None


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None)
@given(data=st.data())
def test_asking_changes_nothing_and_the_same_events_name_the_same_victim(name: str, data: st.DataObject) -> None:
    uses = data.draw(st.lists(st.sampled_from([A, B, C]), max_size=20))
    kept = data.draw(st.sets(st.sampled_from([A, B, C, D])))
    popularity = dict(zip([A, B, C], data.draw(st.tuples(*[st.floats(0, 9)] * 3)), strict=True))
    asked, silent = make_policy(name, popularity), make_policy(name, popularity)
    for policy in (asked, silent):
        for key in (C, A, B):
            policy.admitted(key)
    for key in uses:
        asked.victim(kept)
        asked.used([key])
        silent.used([key])
    victim = silent.victim(kept)
    assert asked.victim(kept) == victim
    assert victim in {A, B, C} - kept if {A, B, C} - kept else victim is None


@pytest.mark.parametrize("name", POLICIES)
def test_each_call_makes_a_fresh_policy(name: str) -> None:
    make_policy(name, {}).admitted(A)
    assert make_policy(name, {}).victim(set()) is None


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match=r"one of lru, lfru, predicted, static, got 'fifo'"):
        make_policy("fifo", {})
