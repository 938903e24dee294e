"""The link that issues copies to a stream and goes on, over a stream that does its work when the test says so."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

import promoe_triton
from promoe_triton import runtime
from promoe_triton.chunking import SHORTEST, UNMEASURED, Chunking, ChunkingName
from promoe_triton.core import Core
from promoe_triton.errors import PromoeError
from promoe_triton.links.device import DeviceFiller
from promoe_triton.links.issued import TOGETHER, IssuedLink
from promoe_triton.links.sources import HostSource
from promoe_triton.links.streams import HostStreams
from promoe_triton.memory import DeviceMemory
from promoe_triton.policies import make_policy
from promoe_triton.protocols import Chunk, ExpertKey, ExpertSpec, Part, TensorSpec, Transfer
from promoe_triton.slots import SlotTable
from promoe_triton.stores.host import HostStore
from promoe_triton.timeline import Timeline

EXPERTS, SLOTS = 24, 12
ROWS = SHORTEST // 4  # of one number: an expert is twice as many bytes as may be in flight at least
UP, DOWN = 2 * SHORTEST, SHORTEST // 2
EXPERT = UP + DOWN
RATE = 4e9


class Event:
    """Comes when the stream gets there, at its time."""

    def __init__(self) -> None:
        self.when: float | None = None


class Stream(HostStreams):
    """Is lane and streams in one. `go` does what it was told, so many steps; a copy takes as long as it is large."""

    def __init__(self) -> None:
        self.todo: list[Callable[[], None]] = []
        self.clock = 0.0
        self.waits: list[Event] = []
        self.paused: list[float] = []
        self.broken = self.is_open = False
        self.opened = self.marked = self.awaited = 0

    def lane(self) -> Any:
        return self

    def here(self) -> bool:
        return self.is_open

    def own(self) -> None:
        self.opened += not self.is_open
        self.is_open = True

    def back(self, here: bool) -> None:
        self.is_open = here

    def after(self, event: Event) -> None:
        self.awaited += 1

        def work() -> None:
            assert event.when is not None, "a stream that waits for ever"

        self.todo.append(work)

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert self.is_open
        if self.broken:
            raise RuntimeError("the device is lost")

        def work() -> None:
            target.copy_(source)
            self.clock += target.nbytes / RATE

        self.todo.append(work)

    def pause(self, seconds: float) -> None:
        assert self.is_open
        self.paused.append(seconds)

        def work() -> None:
            self.clock += seconds

        self.todo.append(work)

    def mark(self, timed: bool = False) -> Any:
        """Of the lane; `timed`: of what computes, which is done but for what it waits for."""
        event = Event()
        self.marked += not timed
        if timed and all(waited.when is not None for waited in self.waits):
            event.when = self.clock
            return event

        def work() -> None:
            event.when = self.clock

        self.todo.append(work)
        return event

    def finish(self) -> None:
        self.go()

    def settle(self, event: Event) -> None:
        self.go()
        assert event.when is not None

    def wait(self, event: Event) -> None:
        self.waits.append(event)

    def has_come(self, event: Event) -> bool:
        return event.when is not None

    def seconds(self, begin: Event, end: Event) -> float:
        assert begin.when is not None
        assert end.when is not None
        return end.when - begin.when

    def go(self, steps: int | None = None) -> None:
        for _ in range(len(self.todo) if steps is None else steps):
            self.todo.pop(0)()


class Rig:
    """A link, its core, and one layer of experts whose every number is that of the expert."""

    def __init__(self, name: ChunkingName = "adaptive", latency: float = 1e-3, **options: Any) -> None:
        spec = ExpertSpec(
            tensors=(
                TensorSpec(name="up", part=Part.UP, shape=(UP // 4,), dtype=torch.float32),
                TensorSpec(name="down", part=Part.DOWN, shape=(DOWN // 4,), dtype=torch.float32),
            )
        )
        numbers = torch.arange(float(EXPERTS))[:, None]
        weights = {"up": numbers.repeat(1, UP // 4), "down": -numbers.repeat(1, DOWN // 4)}
        layout: Any = type("Layout", (), {"cut": staticmethod(lambda tensor, e: tensor[e])})
        self.stream = Stream()
        store = HostStore([spec], [layout], [weights])
        memory = DeviceMemory(SLOTS, store.slot_bytes(0, EXPERTS), torch.device("cpu"))
        filler = DeviceFiller(HostSource(store, self.stream), [memory], self.stream)
        chunking = Chunking(name=name, longest=1 << 19, latency=latency)
        self.link = IssuedLink(filler, self.stream, depth=2, chunking=chunking, timeout=0.2, **options)
        self.core = Core([SlotTable(range(SLOTS), make_policy("lru", {}))], self.link.cuts)
        self.link.restart(self.core)
        self.stream.go()  # whoever had the memory before is done with it

    def need(self, *experts: int) -> list[Transfer]:
        keys = [ExpertKey(0, expert) for expert in experts]

        def gate() -> list[Transfer]:
            needs = self.core.gate(0, experts)
            return [self.core.ask(key, Part.WHOLE) for key in keys if key in needs.missing]

        return self.link.tell(gate)

    def expect(self, *experts: int) -> None:
        keys = [ExpertKey(0, expert) for expert in experts]
        self.link.tell(lambda: self.core.predict(self.core.position_of(0, 0), keys, float("inf")))

    def ahead(self) -> int:
        """Bytes of speculation that the stream has been given and has not done."""
        return sum(copy.chunk.end - copy.chunk.begin for copy in self.link._in_flight if copy.chunk.speculative)

    def measured(self) -> None:
        """Let the link know how fast it is."""
        self.link.wait(self.need(0))
        self.stream.go()
        assert self.link.busy_seconds == pytest.approx(EXPERT / RATE)
        assert self.link.bandwidth == pytest.approx(RATE)
        self.link.tell(lambda: self.core.release([ExpertKey(0, 0)]))


def test_the_host_goes_on_and_the_device_waits() -> None:
    rig = Rig()
    (transfer,) = rig.need(3)
    assert rig.link.wait([transfer]) == [transfer]
    tensors = rig.link.arrivals([ExpertKey(0, 3)]).get(ExpertKey(0, 3))
    assert tensors is not None
    assert not rig.link.arrivals([ExpertKey(0, 3)]), "told once"
    (event,) = rig.stream.waits
    assert event.when is None
    assert rig.link.bytes_moved == 0
    rig.stream.go()
    assert event.when == pytest.approx(EXPERT / RATE)
    assert tensors["up"].eq(3.0).all()
    assert tensors["down"].eq(-3.0).all()
    assert rig.link.bytes_moved == EXPERT
    assert rig.link.waited_seconds == pytest.approx(EXPERT / RATE)


def test_nobody_waits_for_what_has_come() -> None:
    rig = Rig()
    rig.link.wait(rig.need(3))
    rig.stream.go()
    assert rig.link.arrivals([ExpertKey(0, 3)])
    assert not rig.stream.waits
    assert rig.link.waited_seconds == 0.0


def test_what_is_issued_together_costs_the_host_little() -> None:
    """The stream is changed once, each copy ends with an event, the first begins with one; nothing is awaited twice."""
    rig = Rig()
    stream = rig.stream
    stream.opened = stream.marked = stream.awaited = 0
    transfers = rig.need(3, 4, 5)
    assert (stream.opened, stream.marked, stream.awaited) == (1, 4, 1), "the last: whoever had the memory before"
    keys = [transfer.key for transfer in transfers]
    assert rig.link.arrivals(keys[:2]).keys() == {*keys[:2]}
    assert len(stream.waits) == 1, "for the later of both"
    assert rig.link._in_flight[1].end is stream.waits[0]
    stream.go()
    rig.link.fence(0, [0, 1])
    rig.link.fence(0, [2])
    rig.link.tell(lambda: rig.core.release(keys))
    stream.opened = stream.marked = stream.awaited = 0
    after = stream.after

    def wait_long(event: Event) -> None:
        after(event)
        stream.pause(1.0)

    stream.after = wait_long  # type: ignore[method-assign]
    rig.need(*range(6, 6 + SLOTS))
    assert (stream.opened, stream.awaited) == (1, 2), "once for each fence"
    rig.need()
    assert stream.opened == 1, "there is nothing to issue"
    stream.go()
    assert rig.link.busy_seconds == pytest.approx(rig.link.bytes_moved / RATE), "waiting for readers is no copying"


def test_a_fence_is_awaited_unless_a_later_one_has_been() -> None:
    rig, awaited = Rig(), list[Event]()
    fences: list[Event] = []
    mark = rig.stream.mark

    def marked(timed: bool = False) -> Event:
        fences.append(mark(timed))
        return fences[-1]

    rig.stream.mark = marked  # type: ignore[method-assign]
    for slot in range(3):
        rig.link.fence(0, [slot])
    rig.link.fence(0, [1])
    rig.stream.mark = mark  # type: ignore[method-assign]
    filler: Any = rig.link._filler
    rig.stream.after = awaited.append  # type: ignore[assignment]
    chunks = [Chunk(Transfer(key=ExpertKey(0, 0), part=Part.WHOLE, slot=slot), 0, EXPERT) for slot in (0, 2, 1, 0, 5)]
    assert [filler.await_readers(chunk, rig.stream) for chunk in chunks] == [True, True, True, False, False]
    assert awaited == [fences[0], fences[2], fences[3]]
    rig.link.fence(0, None)
    assert [filler.await_readers(chunk, rig.stream) for chunk in chunks[:2]] == [True, False]


def test_so_many_are_computed_together() -> None:
    rig = Rig()
    transfers = rig.need(*range(TOGETHER + 3))
    assert rig.link.wait(transfers) == transfers[:TOGETHER]
    assert rig.link.wait(transfers[TOGETHER:]) == transfers[TOGETHER:]


def test_who_has_other_things_to_compute_is_told_what_is_there() -> None:
    rig = Rig()
    transfers = rig.need(1, 2)
    assert not rig.link.arrived(transfers)
    while not (arrived := rig.link.arrived(transfers)):
        rig.stream.go(1)
    assert arrived == transfers[:1]
    rig.stream.go()
    assert rig.link.arrived(transfers) == transfers


def test_what_passes_through_slots_is_computed_one_by_one() -> None:
    """So that the next is copied meanwhile: they would wait for each other's slots."""
    rig = Rig()

    def ask(part: Part, *experts: int) -> list[Transfer]:
        rig.core.gate(0, experts)
        return [rig.core.ask(ExpertKey(0, expert), part) for expert in experts]

    passing = rig.link.tell(lambda: ask(Part.UP, 1, 2))
    staying = rig.link.tell(lambda: ask(Part.WHOLE, 3, 4))
    assert rig.link.wait([*passing, *staying]) == passing[:1]
    assert rig.link.wait([*staying, *passing]) == staying


@pytest.mark.parametrize("slow", [0.5, 3.0])
def test_a_pause_that_takes_another_time(slow: float) -> None:
    rig = Rig(limit=RATE / 2)
    pause = rig.stream.pause
    rig.stream.pause = lambda seconds: pause(slow * seconds)  # type: ignore[method-assign]
    for expert in range(10):
        before = rig.stream.clock
        rig.link.wait(rig.need(expert))
        rig.stream.go()
        rig.link.tell(lambda: None)
    assert rig.stream.clock - before == pytest.approx(2 * EXPERT / RATE, rel=0.02)


@pytest.mark.parametrize("measured", [False, True])
def test_speculation_in_flight_is_bounded(measured: bool) -> None:
    """And more follows when a layer tells anything; what a layer waits for is not held back by it."""
    rig = Rig(latency=1e-3)
    if measured:
        rig.measured()
    most = int(RATE * 1e-3) if measured else UNMEASURED
    rig.expect(*range(10, 18))
    assert 0 < rig.ahead() <= most
    seen = []
    for _ in range(200):
        rig.stream.go(min(3, len(rig.stream.todo)))
        rig.link.tell(lambda: None)
        seen.append(rig.ahead())
        assert seen[-1] <= max(most, int(rig.link.bandwidth * 1e-3))
    assert max(seen) > 0.5 * most
    rig.stream.go()
    assert rig.link.bytes_moved == (8 + measured) * EXPERT


def test_what_a_layer_waits_for_is_issued_at_once() -> None:
    rig = Rig(latency=1e-3)
    rig.measured()
    rig.expect(*range(10, 18))
    ahead = rig.ahead()
    transfers = rig.need(1, 2, 3, 11)  # the last has begun
    assert len(rig.link.wait(transfers)) == TOGETHER
    events = [rig.link._arrivals[t.key].event for t in transfers]
    before = rig.stream.clock
    rig.stream.go()
    assert max(event.when for event in events) - before <= (4 * EXPERT + ahead) / RATE * (1 + 1e-9)
    assert rig.core.tallies()[0].dropped > 0, "the layer did not need the others"


@pytest.mark.parametrize("name", ["fixed", "tensor", "expert"])
def test_chunks_of_fixed_size(name: ChunkingName) -> None:
    rig = Rig(name)
    rig.expect(*range(10, 18))
    assert len(rig.link._in_flight) == 2, "as many as its depth"
    assert {copy.chunk.end - copy.chunk.begin for copy in rig.link._in_flight} == (
        {UP, DOWN} if name == "tensor" else {1 << 19}
    )


@pytest.mark.parametrize("limit", [RATE / 2, RATE / 10, RATE * 2])
def test_a_limit_of_bandwidth(limit: float) -> None:
    """A quicker link does not become quicker."""
    rig = Rig(limit=limit)
    rig.link.wait(rig.need(0))
    rig.stream.go()
    rig.link.tell(lambda: None)  # now it is known how fast the link is by itself
    before = rig.stream.clock
    rig.link.wait(rig.need(1))
    rig.stream.go()
    assert rig.stream.clock - before == pytest.approx(EXPERT / min(limit, RATE))


def test_a_timeline_has_the_times_of_the_device() -> None:
    rig, timeline = Rig(), Timeline()
    rig.stream.clock = 100.0
    rig.link.record(timeline)
    now = rig.link.now()
    rig.link.wait(rig.need(5))
    rig.stream.go()
    rig.link.record(None)
    spans = list(timeline.spans)
    assert sum(span.nbytes for span in spans) == EXPERT
    assert spans[0].begin == pytest.approx(now, abs=1.0)
    assert spans[-1].end - spans[0].begin == pytest.approx(EXPERT / RATE)
    assert {span.lane for span in spans} == {"copy"}


def test_a_drain() -> None:
    rig = Rig()
    transfers = rig.need(1, 2)
    rig.expect(7)
    assert not rig.link.drain(0.001)
    issued = len(rig.stream.todo)
    assert not rig.link.drain(0.001), "again until it is true"
    rig.link.tell(lambda: rig.core.predict(rig.core.position_of(0, 0), [ExpertKey(0, 8)], float("inf")))
    assert len(rig.stream.todo) == issued, "nothing is begun any more"
    rig.stream.go()
    assert rig.link.drain(0.001)
    assert not rig.link.arrivals([transfers[0].key])
    rig.link.restart(Core([SlotTable(range(SLOTS), make_policy("lru", {}))], rig.link.cuts))


def test_a_copy_that_fails() -> None:
    rig = Rig()
    rig.stream.broken = True
    transfers = rig.need(1)
    with pytest.raises(PromoeError, match=r"expert 1 of MoE layer 0 could not be read: the device is lost"):
        rig.link.wait(transfers)
    rig.stream.broken = False
    rig.link.wait(rig.need(2))
    tensors = rig.link.arrivals([ExpertKey(0, 2)]).get(ExpertKey(0, 2))
    rig.stream.go()
    assert tensors is not None
    assert tensors["up"].eq(2.0).all()


@pytest.mark.parametrize(
    ("call", "moment"),
    [
        ("own", 0),
        ("after", 0),
        *(("mark", n) for n in range(4)),
        *(("copy", n) for n in range(4)),
        *(("pause", n) for n in range(3)),
    ],
)
def test_whatever_the_device_refuses(call: str, moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told of what could not be copied; the next copies are as they should be."""
    rig = Rig(limit=RATE / 2)
    rig.core.gate(0, [])
    count, do = [0], getattr(rig.stream, call)

    def refuse(*args: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == moment + 1:
            raise RuntimeError("the device is out of something")
        return do(*args, **options)

    monkeypatch.setattr(rig.stream, call, refuse)
    with contextlib.suppress(PromoeError):
        transfers = rig.need(1, 2, 3)
        while transfers:
            for transfer in rig.link.wait(transfers):
                transfers.remove(transfer)
    assert count[0] > moment
    assert not rig.stream.is_open, "whoever computes has its stream back"
    monkeypatch.undo()
    rig.stream.go()
    rig.link.wait(rig.need(9))
    tensors = rig.link.arrivals([ExpertKey(0, 9)]).get(ExpertKey(0, 9))
    rig.stream.go()
    assert tensors is not None
    assert tensors["up"].eq(9.0).all()
    assert tensors["down"].eq(-9.0).all()


def test_a_device_that_is_lost_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    transfers = rig.need(1)

    def lost(event: Event) -> bool:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(rig.stream, "has_come", lost)
    with pytest.raises(PromoeError, match=r"copies to the device have failed.*illegal memory access"):
        rig.link.tell(lambda: None)
    with pytest.raises(PromoeError, match="copies to the device have failed"):
        rig.link.drain(0.01)
    assert transfers


def test_an_interruption_between_two_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while copies are issued: after a drain all begins anew."""
    for moment in range(5):
        rig = Rig()
        count, copy = [0], rig.stream.copy

        def interrupt(target: Tensor, source: Tensor) -> None:
            count[0] += 1  # noqa: B023
            if count[0] == moment + 1:  # noqa: B023
                raise KeyboardInterrupt
            copy(target, source)  # noqa: B023

        monkeypatch.setattr(rig.stream, "copy", interrupt)
        with pytest.raises(KeyboardInterrupt):
            rig.need(1, 2, 3)
        assert not rig.stream.is_open
        monkeypatch.undo()
        rig.stream.go()
        assert rig.link.drain(0.1)
        rig.core = Core([SlotTable(range(SLOTS), make_policy("lru", {}))], rig.link.cuts)
        rig.link.restart(rig.core)
        for expert in (1, 4):
            rig.link.wait(rig.need(expert))
            tensors = rig.link.arrivals([ExpertKey(0, expert)]).get(ExpertKey(0, expert))
            rig.stream.go()
            assert tensors is not None
            assert tensors["up"].eq(float(expert)).all()


def test_a_wait_is_bounded() -> None:
    """All slots are leased: nothing can come."""
    rig = Rig()
    rig.link.wait(rig.need(*range(SLOTS)))

    def one_more() -> Sequence[Transfer]:
        return [rig.core.ask(ExpertKey(0, EXPERTS - 1), Part.WHOLE)]

    transfers = rig.link.tell(one_more)
    with pytest.raises(PromoeError, match=r"no byte arrived for 0\.2 s while waiting for expert 23 of MoE layer 0"):
        rig.link.wait(transfers)


def test_closed() -> None:
    rig = Rig()
    rig.link.wait(rig.need(1))
    rig.link.close()
    assert not rig.stream.todo, "what was in flight is done"
    with pytest.raises(PromoeError, match="closed by unpatch"):
        rig.link.tell(lambda: None)
    rig.link.close()


def test_a_link_that_is_lost_ends_what_it_has_begun() -> None:
    rig = Rig()
    rig.link.wait(rig.need(1))
    stream, link = rig.stream, weakref.ref(rig.link)
    assert stream.todo
    del rig
    gc.collect()
    assert link() is None
    assert not stream.todo


class Clocks(HostStreams):
    """A clock for the lane and one for what computes; an event is a time. Copying a byte takes `per_byte`."""

    def __init__(self, per_byte: float) -> None:
        self.per_byte = per_byte
        self.copying = self.computing = self.busy = 0.0

    def mark(self, timed: bool = False) -> Any:
        return self.computing

    def wait(self, event: Any) -> None:
        self.computing = max(self.computing, event)

    def has_come(self, event: Any) -> bool:
        return bool(event <= self.computing)

    def lane(self) -> Any:
        return ClockedLane(self)


class ClockedLane:
    def __init__(self, clocks: Clocks) -> None:
        self._clocks = clocks

    def here(self) -> None:
        pass

    def own(self) -> None:
        pass

    def back(self, here: None) -> None:
        pass

    def after(self, event: Any) -> None:
        self._clocks.copying = max(self._clocks.copying, event)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)
        taken = target.nbytes * self._clocks.per_byte
        self._clocks.copying += taken
        self._clocks.busy += taken

    def mark(self) -> Any:
        return self._clocks.copying

    def finish(self) -> None:
        self._clocks.computing = max(self._clocks.computing, self._clocks.copying)


@pytest.mark.parametrize("compute", [0.25, 0.5, 1.0, 2.0])
def test_a_prompt_of_more_experts_than_slots_copies_while_it_computes(
    compute: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """compute: what an expert takes, in units of what its copy takes."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=32,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    clocks, computed = Clocks(1 / (3 * 48 * 40 * 4)), [0.0]
    monkeypatch.setattr(runtime, "streams_of", lambda _: clocks)
    work = runtime.LayerRuntime._compute

    def timed(layer: Any, product: Any, call: Any, wave: Any) -> None:
        clocks.computing += compute / 2 * len(wave)
        computed[0] += compute / 2 * len(wave)
        work(layer, product, call, wave)

    monkeypatch.setattr(runtime.LayerRuntime, "_compute", timed)
    model = MixtralForCausalLM(config).eval()
    promoe_triton.patch(model, device="cpu", store="memory", slots=4, predictor="none")
    began, busy = max(clocks.copying, clocks.computing), clocks.busy
    clocks.copying = clocks.computing = began
    with torch.no_grad():
        model(torch.randint(0, 64, (1, 200)))
    taken, copied = max(clocks.copying, clocks.computing) - began, clocks.busy - busy
    assert copied > 25
    # Both halves begin with a copy and end with a product, and between them all must have come.
    assert taken <= 1.1 * max(copied, computed[0]) + 2 * (1 + compute)
