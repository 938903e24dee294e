"""How long a copy may be: of speculation as much as the latency allows, in as few pieces as that takes."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoe_triton.chunking import BUS_LATENCY, SHORTEST, UNMEASURED, Chunking
from promoe_triton.config import Config
from promoe_triton.links.meter import WINDOW, Meter
from promoe_triton.protocols import PAGE

MIB = 1 << 20
ADAPTIVE = Chunking(name="adaptive", longest=4 * MIB, latency=1e-3)


@pytest.mark.parametrize(
    ("bandwidth", "lanes", "speculating", "speculative"),
    [
        (0.0, 4, 0, UNMEASURED),  # nothing is known yet
        (2e9, 4, 0, 2 * 10**6 // PAGE * PAGE),  # a millisecond of it
        (2e9, 4, 1, 0),  # which is in flight already
        (6e9, 4, 1, 3_000_000 // PAGE * PAGE),  # more than the longest chunk: two halves
        (6e9, 4, 2, 0),
        (1e12, 4, 2, 4 * MIB),  # as many lanes as there are but one
        (1e12, 4, 3, 0),
        (1e12, 1, 0, 4 * MIB),  # the only lane: better than nothing
        (1e3, 4, 0, SHORTEST),  # a slow link: less would cost more than it saves
    ],
)
def test_speculation_in_flight_takes_no_longer_than_the_latency(
    bandwidth: float, lanes: int, speculating: int, speculative: int
) -> None:
    assert ADAPTIVE.budgets(bandwidth, lanes, speculating) == (4 * MIB, speculative)


@given(
    bandwidth=st.floats(1e6, 1e12), latency=st.floats(1e-4, 1e-1), lanes=st.integers(2, 8), pages=st.integers(1, 4096)
)
def test_the_sum_of_all_that_is_let_in_flight_is_bounded(
    bandwidth: float, latency: float, lanes: int, pages: int
) -> None:
    chunking = Chunking(name="adaptive", longest=pages * PAGE, latency=latency)
    speculating, in_flight = 0, 0
    while (budget := chunking.budgets(bandwidth, lanes, speculating).speculative) and speculating < lanes:
        assert budget % PAGE == 0 or budget == SHORTEST
        speculating += 1
        in_flight += budget
    assert 1 <= speculating <= lanes - 1, "one lane stays free"
    assert in_flight <= max(bandwidth * latency, SHORTEST)


@pytest.mark.parametrize(("name", "budget"), [("fixed", 4 * MIB), ("expert", 4 * MIB), ("tensor", sys.maxsize)])
def test_the_others_treat_speculation_as_any_copy(name: str, budget: int) -> None:
    chunking = Chunking(name=name, longest=4 * MIB, latency=1e-3)  # type: ignore[arg-type]
    assert chunking.budgets(1e9, 4, 4) == (budget, budget)
    assert chunking.overtake is (name != "expert")


def test_bandwidth_is_measured_while_anything_is_in_flight() -> None:
    meter = Meter()
    assert meter.rate == 0.0
    meter.begun(1.0)
    meter.begun(1.05)  # beside the first
    meter.ended(1.1, 100)
    meter.ended(1.2, 100)
    meter.begun(9.0)  # after a pause, which does not count
    meter.ended(9.2, 200)
    assert meter.busy_seconds == pytest.approx(0.4)
    assert meter.rate == pytest.approx(1000.0)


def test_a_link_that_has_become_slower_is_noticed() -> None:
    meter, now = Meter(), 0.0
    for rate in (1000, 100):
        for _ in range(int(8 * WINDOW / 0.1)):
            meter.begun(now)
            now += 0.1
            meter.ended(now, rate // 10)
        assert meter.rate == pytest.approx(rate, rel=0.02)


@pytest.mark.parametrize("bandwidth", [12e9, 25e9, 50e9], ids=["PCIe 3.0", "4.0", "5.0"])
def test_over_a_bus_speculation_in_flight_takes_a_quarter_of_a_millisecond(bandwidth: float) -> None:
    """With what a person gets who sets nothing: an urgent copy behind all of it starts that late, and no later."""
    in_flight = Config().cuts(BUS_LATENCY).in_flight(bandwidth)
    assert 0.99 * 2.5e-4 < in_flight / bandwidth <= 2.5e-4
