"""The link on a virtual clock, and what can be shown with it alone: how long an urgent copy waits."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from promoe_triton.chunking import Chunking, ChunkingName
from promoe_triton.core import Core
from promoe_triton.errors import PromoeError
from promoe_triton.links.fake import DryFiller, FakeLink, Wire
from promoe_triton.policies import make_policy
from promoe_triton.protocols import Cuts, ExpertKey, Part, Transfer
from promoe_triton.slots import SlotTable
from promoe_triton.timeline import Timeline
from promoe_triton.transfers import URGENT

MIB = 1 << 20
EXPERT, RANGE = 9 * MIB, 3 * MIB
BANDWIDTH = 1000.0 * MIB
DEPTH = 4


def cuts(transfer: Transfer) -> Cuts:
    return Cuts(ends=(RANGE, 2 * RANGE, EXPERT))


def make(wire: Wire, name: ChunkingName = "adaptive", slots: int = 16) -> tuple[FakeLink, Core]:
    chunking = Chunking(name=name, longest=MIB, latency=2e-3)
    link = FakeLink(DryFiller(cuts), wire, depth=DEPTH, chunking=chunking)
    tables = [SlotTable(range(slots), make_policy("lru", {})) for _ in range(2)]
    core = Core(tables, link.cuts, overtake=chunking.overtake)
    link.restart(core)
    return link, core


def fetch(link: FakeLink, core: Core, key: ExpertKey) -> None:
    transfer = link.tell(lambda: (core.gate(key.layer, [key.expert]), core.ask(key, Part.WHOLE))[1])
    link.wait([transfer])
    link.tell(lambda: core.release([key]))


def test_a_copy_takes_what_the_wire_says() -> None:
    link, core = make(Wire(bandwidth=BANDWIDTH, latency=1e-3))
    fetch(link, core, ExpertKey(0, 0))
    # Four chunks are asked for at once: only the first one's latency shows.
    assert link.now() == pytest.approx(EXPERT / BANDWIDTH + 1e-3)
    assert link.bytes_moved == EXPERT
    assert link.bandwidth == pytest.approx(EXPERT / link.now())
    assert link.arrivals([ExpertKey(0, 0)]) == {ExpertKey(0, 0): {}}
    assert not link.arrivals([ExpertKey(0, 0)]), "an arrival is told once"


def test_nothing_happens_while_no_time_passes() -> None:
    link, core = make(Wire(bandwidth=BANDWIDTH))
    transfer = link.tell(lambda: (core.gate(0, [1]), core.ask(ExpertKey(0, 1), Part.WHOLE))[1])
    assert not link.arrived([transfer])
    link.pass_time(EXPERT / BANDWIDTH / 2)
    assert not link.arrived([transfer])
    link.pass_time(EXPERT / BANDWIDTH / 2 + 1e-9)
    assert link.arrived([transfer]) == [transfer]


@pytest.mark.parametrize("pieces", [1, 7])
def test_computing_and_copying_slow_each_other(pieces: int) -> None:
    """A copy that takes `alone` seconds: half of it beside computing, at half the speed, and the rest by itself."""
    alone = EXPERT / BANDWIDTH
    link, core = make(Wire(bandwidth=BANDWIDTH))
    transfer = link.tell(lambda: (core.gate(0, [1]), core.ask(ExpertKey(0, 1), Part.WHOLE))[1])
    for _ in range(pieces):
        link.pass_time(alone / 3.0 / pieces, slowed=3.0, link_slowed=2.0)
    assert link.now() == pytest.approx(alone)
    link.wait([transfer])
    assert link.now() == pytest.approx(1.5 * alone)
    link.pass_time(alone, slowed=3.0, link_slowed=2.0)
    assert link.now() == pytest.approx(2.5 * alone), "nothing is in flight any more"
    fetch(link, core, ExpertKey(1, 2))
    assert link.now() == pytest.approx(3.5 * alone), "the wire's clock goes on from there"


def test_what_lands_within_a_computation_slows_only_what_is_before_it() -> None:
    alone = EXPERT / BANDWIDTH
    link, core = make(Wire(bandwidth=BANDWIDTH))
    link.tell(lambda: (core.gate(0, [1]), core.ask(ExpertKey(0, 1), Part.WHOLE)))
    link.pass_time(alone, slowed=4.0, link_slowed=2.0)
    # The copy takes twice its time, in which half of its time is computed; the other half goes at full speed.
    assert link.now() == pytest.approx(2.0 * alone + 0.5 * alone)


def test_waiting_for_what_cannot_come_is_an_error_and_no_hang() -> None:
    link, core = make(Wire())
    transfer = Transfer(key=ExpertKey(0, 3), part=Part.WHOLE)
    core.queue.push(transfer, [10], URGENT)
    core.queue.stop(transfer)
    with pytest.raises(PromoeError, match="nothing is in flight that expert 3 of MoE layer 0 could come with"):
        link.wait([transfer])


def test_a_copy_that_fails_is_told_to_who_waits_for_it() -> None:
    link, core = make(Wire(fault=lambda chunk: OSError("mine")))
    transfer = link.tell(lambda: (core.gate(0, [1]), core.ask(ExpertKey(0, 1), Part.WHOLE))[1])
    with pytest.raises(PromoeError, match="expert 1 of MoE layer 0 could not be read: mine"):
        link.wait([transfer])


def test_a_drain_has_the_patience_it_is_given() -> None:
    link, core = make(Wire(bandwidth=BANDWIDTH))
    link.tell(lambda: (core.gate(0, [1]), core.ask(ExpertKey(0, 1), Part.WHOLE)))
    assert not link.drain(0.5 * MIB / BANDWIDTH)
    assert link.drain(10.0)
    link.close()
    with pytest.raises(PromoeError, match="closed"):
        link.tell(lambda: None)


def test_lanes_do_one_thing_at_a_time() -> None:
    rng = random.Random(0)
    link, core = make(Wire(bandwidth=BANDWIDTH, latency=1e-4, jitter=lambda chunk: rng.random() * 1e-3))
    timeline = Timeline()
    link.record(timeline)
    for expert in range(8):
        fetch(link, core, ExpertKey(expert % 2, expert))
    lanes = {span.lane for span in timeline.spans}
    assert lanes == {f"copy {lane}" for lane in range(DEPTH)}
    for lane in lanes:
        mine = sorted((span.begin, span.end) for span in timeline.spans if span.lane == lane)
        assert all(before[1] <= after[0] for before, after in pairwise(mine))


def delays(name: ChunkingName) -> list[float]:
    """Seconds that urgent copies took longer than alone, each while a dozen experts are copied ahead."""
    rng = random.Random(1)
    link, core = make(Wire(bandwidth=BANDWIDTH), name)
    fetch(link, core, ExpertKey(1, 63))
    found = []
    for moment in range(40):
        absent = [key for e in range(64) if not core.tables[0].is_ready(key := ExpertKey(0, e))]
        link.tell(lambda: core.predict(core.position_of(0, 0), rng.sample(absent, 12), float("inf")))  # noqa: B023
        link.pass_time(rng.uniform(0.1, 0.9) * 12 * EXPERT / BANDWIDTH)
        began = link.now()
        fetch(link, core, ExpertKey(1, moment))
        found.append(link.now() - began - EXPERT / BANDWIDTH)
        link.pass_time(12 * EXPERT / BANDWIDTH)
        link.tell(lambda: core.release(core.gate(0, []).resident))
    return found


def test_an_urgent_copy_waits_for_what_is_in_flight_and_no_more() -> None:
    assert max(delays("adaptive")) <= 2e-3 + 1e-9, "the latency it was given"
    assert max(delays("fixed")) <= DEPTH * MIB / BANDWIDTH + 1e-9, "a chunk per lane"
    assert max(delays("tensor")) <= DEPTH * RANGE / BANDWIDTH + 1e-9, "a tensor per lane"
    assert max(delays("tensor")) > 2 * max(delays("adaptive"))
    assert max(delays("expert")) > EXPERT / BANDWIDTH / 2, "the rest of an expert that has begun"
