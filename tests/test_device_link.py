"""Slots in the memory of a device, filled from the host's memory or from disk, without a device.

RAM stands in for the device's memory, and `Device` for its streams: what was issued there is done a while later, in
order, on a thread of its own.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

import promoe_triton
from promoe_triton import PromoeError, runtime
from promoe_triton.links import choice
from promoe_triton.links.device import DeviceFiller
from promoe_triton.links.issued import IssuedLink
from promoe_triton.links.sources import DiskSource, HostSource, Rings
from promoe_triton.links.streams import CudaLane, CudaStreams, HostStreams, Lane, Order
from promoe_triton.memory import DeviceMemory, Slots
from promoe_triton.prefetch import Prefetcher
from promoe_triton.protocols import PAGE, Chunk, ExpertKey, ExpertSpec, Part, TensorSpec, Transfer
from promoe_triton.runtime import LayerRuntime
from promoe_triton.stores import registration
from promoe_triton.stores.host import HostStore
from promoe_triton.stores.registration import Release

PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
NEW = 5
BOUND = 20.0


def build(dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=6,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    model = MixtralForCausalLM(config).eval()
    for parameter in model.parameters():  # not the buffers, which from_pretrained leaves in single precision
        parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def logits(model: Any) -> list[Tensor]:
    out = model(PROMPT, use_cache=True)
    found = [out.logits]
    for _ in range(NEW):
        out = model(found[-1][:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return found


@pytest.fixture(scope="module")
def want() -> list[Tensor]:
    return logits(build())


def equal(found: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


class Device:
    """Does what it is told in order, each a moment later, on its own thread."""

    def __init__(self, delay: Callable[[], float]) -> None:
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._delay = delay
        self.failures: list[str] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def issue(self, work: Callable[[], None]) -> None:
        self._todo.put(work)

    @property
    def is_done(self) -> bool:
        return self._todo.empty()

    def _run(self) -> None:
        while (work := self._todo.get()) is not None:
            time.sleep(self._delay())
            work()

    def close(self) -> None:
        self._todo.put(None)
        self._thread.join(BOUND)


class Traffic:
    """Bytes of copies that lanes have begun and not finished. most: at any time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = self.most = 0

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._now += nbytes
            self.most = max(self.most, self._now)


class Event(threading.Event):
    """Knows when it came."""

    when = 0.0

    def set(self) -> None:
        self.when = time.perf_counter()
        super().set()


class AsyncLane:
    """A stream: does what it is told in order, each a moment later. pinned: see `DeviceLane`."""

    is_owned = False

    def __init__(self, device: Device, traffic: Traffic, pinned: Collection[int]) -> None:
        self._device, self._traffic, self._pinned = device, traffic, pinned

    def here(self) -> bool:
        return self.is_owned

    def own(self) -> None:
        self.is_owned = True

    def back(self, here: bool) -> None:
        self.is_owned = here

    def after(self, event: Any) -> None:
        self._device.issue(lambda: arrived(event))

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert self.is_owned
        check_registered(source, self._pinned)
        if not any(page in self._pinned for page in pages_of(source)):
            source = source.clone()  # the driver has taken a copy of it

        def work() -> None:
            target.copy_(source)
            self._traffic.add(-target.nbytes)

        self._traffic.add(target.nbytes)
        self._device.issue(work)

    def pause(self, seconds: float) -> None:
        assert self.is_owned
        self._device.issue(lambda: time.sleep(seconds))

    def mark(self) -> Any:
        event = Event()
        self._device.issue(event.set)
        return event

    def finish(self) -> None:
        arrived(self.mark())


def arrived(event: threading.Event) -> None:
    assert event.wait(BOUND), "an event that never came"


def pages_of(data: Tensor) -> range:
    return range(data.data_ptr() // PAGE * PAGE, data.data_ptr() + data.nbytes, PAGE)


def check_registered(source: Tensor, pinned: Collection[int]) -> None:
    """As the driver does for every copy."""
    assert len({page in pinned for page in pages_of(source)}) == 1, "invalid argument: memory registered in part"


class DeviceLane:
    """Copies when it is asked to finish, and waits for events then, as a stream would.

    pinned: the pages that are registered; a copy from some of them and from others is refused.
    """

    is_owned = False

    def __init__(self, traffic: Traffic | None = None, pinned: Collection[int] = ()) -> None:
        self._todo: list[Callable[[], None]] = []
        self._traffic = traffic or Traffic()
        self._pinned = pinned
        self._nbytes = 0

    def here(self) -> bool:
        return self.is_owned

    def own(self) -> None:
        self.is_owned = True

    def back(self, here: bool) -> None:
        self.is_owned = here

    def after(self, event: Any) -> None:
        def wait() -> None:
            assert event.wait(BOUND), "an event that never came"

        self._todo.append(wait)

    def copy(self, target: Tensor, source: Tensor) -> None:
        def work() -> None:
            target.copy_(source)

        assert self.is_owned
        check_registered(source, self._pinned)
        self._todo.append(work)
        self._nbytes += target.nbytes
        self._traffic.add(target.nbytes)

    def finish(self) -> None:
        todo, self._todo = self._todo, []
        for work in todo:
            work()
        self._traffic.add(-self._nbytes)
        self._nbytes = 0


class DeviceStreams(HostStreams):
    """Events come when the device has got to them. current: the stream of whoever calls."""

    def __init__(self, device: Device, can_pin: bool = True) -> None:
        self.current, self._can_pin = device, can_pin
        self.pinned: set[int] = set()
        self.traffic = Traffic()
        self._lanes: list[Device] = []

    def mark(self, timed: bool = False) -> Any:
        event = Event()
        self.current.issue(event.set)
        return event

    def wait(self, event: Any) -> None:
        arrived(event)  # what is computed here is computed at once

    def has_come(self, event: Any) -> bool:
        return bool(event.is_set())

    def seconds(self, begin: Any, end: Any) -> float:
        return float(end.when - begin.when)

    def settle(self, event: Any) -> None:
        arrived(event)

    def follow(self, last: Any) -> Any:
        stream = self.current
        if last is not None and last is not stream:
            before = threading.Event()
            last.issue(before.set)
            stream.issue(lambda: self.settle(before))
        return stream

    def lane(self) -> Lane:
        chance = random.Random(len(self._lanes))
        self._lanes.append(Device(lambda: chance.choice([0.0, 0.0, 0.0, 0.002])))
        return AsyncLane(self._lanes[-1], self.traffic, self.pinned)

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()

    def pin(self, address: int, nbytes: int) -> Release | None:
        assert not address % PAGE, "whole pages"
        assert not nbytes % PAGE, "whole pages"
        pages = set(range(address, address + nbytes, PAGE))
        # As the driver does, where a part of them is registered already.
        if not self._can_pin or pages & self.pinned:
            return None
        self.pinned |= pages

        def release() -> None:
            assert pages <= self.pinned, "registered still"
            self.pinned -= pages

        return release


class Watched(DeviceFiller):
    """Fails where a slot changes before the work that reads it is done: the device looks at it when it gets there."""

    _streams: DeviceStreams

    def fence(self, layer: int, slots: Iterable[int] | None) -> None:
        memory = self._memory_of_layer[layer]
        slots = None if slots is None else list(slots)
        for slot in slots or ():
            held, before = memory.slot(slot), memory.slot(slot).clone()

            stream = self._streams.current

            def check(held: Tensor = held, before: Tensor = before, slot: int = slot, stream: Device = stream) -> None:
                if not torch.equal(held, before):
                    stream.failures.append(f"slot {slot} of layer {layer} was written while it was read")

            stream.issue(check)
        super().fence(layer, slots)


@pytest.fixture
def device() -> Iterator[Device]:
    chance = random.Random(0)
    made = Device(lambda: chance.choice([0.0, 0.0, 0.001]))
    yield made
    made.close()
    assert not made.failures, made.failures[:3]


@pytest.fixture
def streams(device: Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceStreams]:
    """Every link made from now on runs on the stand-in."""
    made = DeviceStreams(device)
    monkeypatch.setattr(runtime, "streams_of", lambda _: made)
    monkeypatch.setattr(choice, "DeviceFiller", Watched)
    monkeypatch.setattr(registration, "LARGE", 1)
    yield made
    gc.collect()
    made.close()


@pytest.fixture
def from_disk(streams: DeviceStreams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disk to RAM goes the way of disk to a device."""

    def filler(store: Any, memory_of_layer: Sequence[Slots], direct: bool) -> DeviceFiller:
        return Watched(DiskSource(store, streams, direct), memory_of_layer, streams)

    monkeypatch.setattr(choice, "SlotFiller", filler)


OPTIONS = [
    pytest.param({"slots": 12}, id="all"),
    pytest.param({"slots": 7}, id="most"),
    pytest.param({"slots": 4, "predictor": "gate"}, id="two-a-layer"),
    pytest.param({"slots": 2, "chunk": 4096}, id="one-a-layer"),
    pytest.param({"slots": 1, "depth": 1}, id="one"),
    pytest.param({"slots": 5, "partition": "global", "chunking": "tensor"}, id="shared"),
    pytest.param({"slots": 4, "ablation": "lru"}, id="on-demand"),
    pytest.param({"slots": 4, "ablation": "layer"}, id="whole-layers"),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.usefixtures("streams")
def test_from_memory(options: dict[str, Any], want: list[Tensor]) -> None:
    model = promoe_triton.patch(build(), device="cpu", store="memory", **options)
    assert equal(logits(model), want)
    assert equal(logits(model), want)
    assert promoe_triton.stats(model).store == "the host's memory"
    assert promoe_triton.stats(model).hits + promoe_triton.stats(model).misses > 0
    promoe_triton.unpatch(model)


@pytest.mark.usefixtures("streams")
def test_patched_in_inference_mode(want: list[Tensor]) -> None:
    """The threads that copy are not in it."""
    with torch.inference_mode():
        model = promoe_triton.patch(build(), device="cpu", store="memory", slots=4)
        assert equal(logits(model), want)


@pytest.mark.parametrize("io", ["direct", "buffered"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.usefixtures("from_disk")
def test_from_disk(options: dict[str, Any], io: Any, want: list[Tensor], tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    model = promoe_triton.from_pretrained(str(tmp_path), device="cpu", store="checkpoint", io=io, **options)
    assert equal(logits(model), want)
    assert equal(logits(model), want)


@pytest.mark.parametrize("predictor", ["gate", "token", "history"])
@pytest.mark.usefixtures("streams")
def test_inference_mode_and_out_of_it(predictor: str, want: list[Tensor]) -> None:
    """What was made in inference mode can be written to by whoever is not in it: link threads, later calls."""
    with torch.inference_mode():
        model = promoe_triton.patch(build(), device="cpu", store="memory", slots=3, predictor=predictor)
        assert equal(logits(model), want)
    assert equal(logits(model), want)
    with torch.inference_mode():
        promoe_triton.unpatch(model)
    assert equal(logits(model), want)


@pytest.mark.usefixtures("from_disk")
def test_converted_on_its_way(want: list[Tensor], tmp_path: Path) -> None:
    build(torch.float32).save_pretrained(tmp_path)
    model = promoe_triton.from_pretrained(str(tmp_path), device="cpu", slots=3, dtype=torch.bfloat16)
    assert equal(logits(model), want)


@pytest.mark.usefixtures("from_disk")
def test_a_file_that_is_gone(want: list[Tensor], tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    model = promoe_triton.from_pretrained(str(tmp_path), device="cpu", slots=2)
    file = tmp_path / "model.safetensors"
    file.rename(tmp_path / "elsewhere")
    with pytest.raises(PromoeError, match=r"expert \d of MoE layer \d could not be read: .*model\.safetensors"):
        logits(model)
    (tmp_path / "elsewhere").rename(file)
    assert equal(logits(model), want)


def test_memory_that_cannot_be_registered(
    device: Device, streams: DeviceStreams, want: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """It is copied through a ring instead, and that is said once."""
    streams._can_pin = False
    model = promoe_triton.patch(build(), device="cpu", store="memory", slots=3)
    assert equal(logits(model), want)
    (message,) = [record.message for record in caplog.records if "registered" in record.message]
    assert re.fullmatch(r"(\S+ kB) of \1 of experts could not be registered .* and are copied on their way", message)


def test_storages_of_less_than_so_many_bytes_are_left_alone(
    device: Device, streams: DeviceStreams, want: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other things may lie on their pages, which must stay memory that can be copied to the device, by whomever."""
    monkeypatch.setattr(registration, "LARGE", 1 << 25)
    model = promoe_triton.patch(build(), device="cpu", store="memory", slots=3)
    assert not streams.pinned
    assert isinstance(model._promoe_runtime.link, IssuedLink)
    assert equal(logits(model), want)


def test_the_pages_of_large_storages() -> None:
    """Whole, with the pages on which they begin and end: a tensor is registered as a whole, or not at all."""
    large, small = (torch.zeros(nbytes, dtype=torch.uint8) for nbytes in (registration.LARGE, 1 << 20))
    (pages,) = registration.pages_of([large[1000:2000], small, large[5:]])
    assert pages.start <= large.data_ptr() < pages.start + PAGE
    assert pages.stop - PAGE < large.data_ptr() + large.nbytes <= pages.stop
    assert not pages.start % PAGE
    assert not pages.stop % PAGE


@pytest.mark.usefixtures("streams")
def test_experts_that_do_not_lie_together(want: list[Tensor]) -> None:
    """What is copied from a temporary must be copied before that is gone."""
    model = build()
    for layer in model.model.layers:
        for parameter in layer.mlp.experts.parameters():
            parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)
    promoe_triton.patch(model, device="cpu", store="memory", slots=3)
    assert not isinstance(model._promoe_runtime.link, IssuedLink)
    assert equal(logits(model), want)


@pytest.mark.usefixtures("streams")
def test_memory_that_another_copy_has_registered(want: list[Tensor]) -> None:
    """Patched anew while a copy goes on: a driver registers nothing twice, and what is refused goes through a ring."""
    model = promoe_triton.patch(build(), device="cpu", store="memory", slots=3)
    twin = copy.deepcopy(model)
    promoe_triton.unpatch(model)
    promoe_triton.patch(model, device="cpu", store="memory", slots=3)
    assert equal(logits(model), want)
    assert equal(logits(twin), want)


def test_a_warm_start_is_over_when_patch_returns(streams: DeviceStreams) -> None:
    model = promoe_triton.patch(build(), device="cpu", store="memory", slots=6)
    link = model._promoe_runtime.link
    assert not link._in_flight
    assert promoe_triton.stats(model).bytes_read > 0
    assert promoe_triton.stats(model).link_seconds == 0.0, "of filling"


@pytest.mark.parametrize("store", ["memory", "spool"])
@pytest.mark.usefixtures("streams")
def test_what_was_copied_ahead_and_never_asked_for(store: str, want: list[Tensor], tmp_path: Path) -> None:
    """Slots for all that fill while the model runs, with help of a predictor: then all are placed, used or not."""
    options: Any = {"predictor": "random", "always_predict": True, "warm": False, "spool_dir": tmp_path}
    model = promoe_triton.patch(build(), device="cpu", store=store, slots=12, **options)
    for _ in range(6):
        assert equal(logits(model), want)
    assert model._promoe_runtime.is_settled


def test_what_is_registered_is_given_back(streams: DeviceStreams) -> None:
    model = promoe_triton.patch(build(), device="cpu", store="memory", slots=3)
    assert streams.pinned
    promoe_triton.unpatch(model)
    assert not streams.pinned


@pytest.mark.parametrize("first", [0, 1], ids=["the-model-goes-first", "the-copy-goes-first"])
def test_a_copy_shares_the_registration(
    first: int, streams: DeviceStreams, want: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    models = [promoe_triton.patch(build(), device="cpu", store="memory", slots=3)]
    pinned = set(streams.pinned)
    models.append(copy.deepcopy(models[0]))
    assert not caplog.records, "nothing is copied on its way"
    assert streams.pinned == pinned
    promoe_triton.unpatch(models.pop(first))
    assert streams.pinned == pinned
    assert equal(logits(models[0]), want)
    promoe_triton.unpatch(models.pop())
    assert not streams.pinned


def test_a_copy_that_is_dropped_gives_the_registration_back(streams: DeviceStreams) -> None:
    model = promoe_triton.patch(build(), device="cpu", store="memory", slots=3)
    twin = copy.deepcopy(model)
    promoe_triton.unpatch(model)
    assert streams.pinned
    del twin
    gc.collect()
    assert not streams.pinned


def test_an_interrupted_registration_is_taken_back(
    device: Device, streams: DeviceStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = streams.pin

    def interrupted(address: int, nbytes: int) -> Release | None:
        if streams.pinned:
            raise KeyboardInterrupt
        return pin(address, nbytes)

    monkeypatch.setattr(streams, "pin", interrupted)
    monkeypatch.setattr(registration, "pages_of", lambda tensors: [range(PAGE), range(4 * PAGE, 5 * PAGE)])
    with pytest.raises(KeyboardInterrupt):
        promoe_triton.patch(build(), device="cpu", store="memory", slots=3)
    assert not streams.pinned


@pytest.mark.parametrize(
    ("given", "bus", "disk"),
    [
        pytest.param({}, 2.5e-4, 4e-3, id="each-its-own"),
        pytest.param({"latency": 2e-3}, 2e-3, 2e-3, id="as-given"),
    ],
)
def test_each_kind_of_link_has_its_latency(
    given: dict[str, Any], bus: float, disk: float, streams: DeviceStreams, tmp_path: Path
) -> None:
    def latency(model: Any) -> float:
        link = model._promoe_runtime.link
        return float((link._chunking if isinstance(link, IssuedLink) else link._shared.chunking).latency)

    build().save_pretrained(tmp_path)
    assert latency(promoe_triton.patch(build(), device="cpu", store="memory", slots=3, **given)) == bus
    assert latency(promoe_triton.from_pretrained(str(tmp_path), device="cpu", slots=3, **given)) == disk


class TestRings:
    def test_one_that_is_too_small_is_given_back_for_one_of_twice_its_size(self, device: Device) -> None:
        streams = DeviceStreams(device)
        rings, sizes = Rings(streams), []
        for pages in range(1, 100):  # as chunks grow while a link is measured
            room = rings.room(pages * PAGE)
            room.slot(0)[: pages * PAGE].fill_(1)
            sizes.append(room.slot_bytes)
            assert len(streams.pinned) * PAGE == room.slot_bytes, "one ring at a time"
        assert sorted(set(sizes)) == [PAGE << n for n in range(8)]
        assert rings.room(PAGE).slot_bytes == sizes[-1], "it does not shrink"
        rings.close()
        assert not streams.pinned

    def test_each_thread_has_its_own(self, device: Device) -> None:
        streams = DeviceStreams(device)
        rings, rooms = Rings(streams), []
        thread = threading.Thread(target=lambda: rooms.append(rings.room(3 * PAGE)))
        thread.start()
        thread.join(BOUND)
        rooms.append(rings.room(PAGE))
        assert rooms[0] is not rooms[1]
        assert len(streams.pinned) == 4
        rings.close()
        assert not streams.pinned

    @pytest.mark.parametrize("chunking", ["adaptive", "fixed", "tensor", "expert"])
    @pytest.mark.usefixtures("from_disk")
    def test_an_expert_larger_than_the_ring(
        self, chunking: Any, want: list[Tensor], streams: DeviceStreams, tmp_path: Path
    ) -> None:
        """Tensors of 3840 bytes follow upon chunks of other sizes; what is converted comes whole, and needs most."""
        build().save_pretrained(tmp_path)
        options: Any = {"device": "cpu", "slots": 3, "depth": 2, "chunk": 4096, "chunking": chunking}
        model = promoe_triton.from_pretrained(str(tmp_path), store="checkpoint", io="direct", **options)
        assert equal(logits(model), want)
        promoe_triton.unpatch(model)
        assert not streams.pinned


@pytest.mark.parametrize(("depth", "chunk"), [(1, 4096), (2, 4096), (3, 8192)])
@pytest.mark.usefixtures("from_disk")
def test_bytes_in_flight_are_bounded(depth: int, chunk: int, streams: DeviceStreams, tmp_path: Path) -> None:
    """Whatever is queued, no more than a chunk for each lane."""
    build().save_pretrained(tmp_path)
    options: Any = {"device": "cpu", "slots": 4, "depth": depth, "chunk": chunk}
    model = promoe_triton.from_pretrained(str(tmp_path), store="checkpoint", **options)
    logits(model)
    assert promoe_triton.stats(model).bytes_read > 8 * depth * chunk
    assert 0 < streams.traffic.most <= depth * chunk


class TestStreams:
    """Forwards on one stream and then on another: what they share is in the order in which they were called."""

    @pytest.fixture
    def slow(self) -> Iterator[Device]:
        made = Device(lambda: 0.02)
        yield made
        made.close()
        assert not made.failures, made.failures[:3]

    def test_a_slot_outlives_its_readers_on_either_stream(self, streams: DeviceStreams, slow: Device) -> None:
        """Read on the slow stream, then on the quick one, whose event comes first; then it is given to another."""
        model = promoe_triton.patch(build(), device="cpu", store="memory", slots=4, predictor="none")
        quick = streams.current
        with torch.no_grad():
            for token in range(6):
                for stream, asked in ((slow, token), (quick, token), (quick, token + 6), (quick, token + 12)):
                    streams.current = stream
                    model(torch.tensor([[asked]]))
        assert promoe_triton.stats(model).hits >= 4 * 6, "what the first has read, the second reads again"
        promoe_triton.unpatch(model)

    @pytest.mark.parametrize("options", [{"slots": 4, "predictor": "gate"}, {}], ids=["few", "resident"])
    def test_work_on_another_stream_comes_after_what_was_there(
        self, options: dict[str, Any], streams: DeviceStreams, slow: Device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where nothing is copied: the table of where experts lie is sent once. And what a predictor keeps."""
        seen: list[tuple[str, Device]] = []
        follow = streams.follow

        def followed(last: Any) -> Any:
            if last is not None and last is not streams.current:
                seen.append(("waits", streams.current))
            return follow(last)

        def noted(function: Any) -> Any:
            def call(*args: Any) -> Any:
                seen.append(("works", streams.current))
                return function(*args)

            return call

        monkeypatch.setattr(streams, "follow", followed)
        monkeypatch.setattr(LayerRuntime, "run", noted(LayerRuntime.run))
        monkeypatch.setattr(Prefetcher, "_look", noted(Prefetcher._look))
        model = promoe_triton.patch(build(), device="cpu", store="memory", **options)
        quick = streams.current
        for stream in (quick, slow, slow, quick):
            streams.current = stream
            with torch.no_grad():
                model(PROMPT[:, :3])
        changes = [index for index, (what, _) in enumerate(seen) if what == "waits"]
        assert [seen[index][1] for index in changes] == [slow, quick]
        assert [stream for what, stream in seen[: changes[0]] if what == "works"].count(slow) == 0
        assert {stream for what, stream in seen[changes[0] : changes[1]]} == {slow}

    def test_slots_are_given_up_when_nobody_reads_them(self, streams: DeviceStreams, slow: Device) -> None:
        model = promoe_triton.patch(build(), device="cpu", store="memory", slots=4)
        streams.current = slow
        with torch.no_grad():
            model(PROMPT)
        assert not slow.is_done
        promoe_triton.unpatch(model)
        assert slow.is_done

    @pytest.mark.parametrize("captured", [False, True])
    def test_on_a_gpu(self, captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """The streams of CUDA, but for the device. What was not captured cannot be waited for in a capture."""

        class Stream:
            def __init__(self) -> None:
                self.after: list[Stream] = []

            def wait_stream(self, other: Stream) -> None:
                self.after.append(other)

        first, second = Stream(), Stream()
        here = first
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
        order = Order(CudaStreams(torch.device("cuda", 0)))
        order.follow()
        here = second
        order.follow()
        order.follow()
        assert (first.after, second.after) == ([], [] if captured else [first])
        here = first
        order.follow()
        assert first.after == ([] if captured else [second])


@pytest.mark.parametrize("broken", [False, True])
def test_a_lane_gives_the_thread_back_what_it_had(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stream and its device, which is another, also where a copy fails. To set a stream sets its device."""
    now: dict[str, Any] = {"device": 0, "streams": {0: "mine", 1: "other"}}
    seen: list[tuple[int, Any]] = []

    def set_stream(stream: Any) -> None:
        now["device"] = 1
        now["streams"][1] = stream

    class Target:
        def copy_(self, source: Any, non_blocking: bool) -> None:
            seen.append((now["device"], now["streams"][1]))
            if broken:
                raise RuntimeError("lost")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "lane")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now["device"])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: now.update(device=device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now["streams"][device.index])
    monkeypatch.setattr(torch.cuda, "set_stream", set_stream)
    lane: Any = CudaLane(torch.device("cuda", 1))
    here = lane.here()
    lane.own()
    with pytest.raises(RuntimeError, match="lost") if broken else contextlib.nullcontext():
        lane.copy(Target(), None)
        lane.copy(Target(), None)
    lane.back(here)
    assert seen == [(1, "lane")] * (1 if broken else 2)
    assert now == {"device": 0, "streams": {0: "mine", 1: "other"}}


class OnDevice(Tensor):
    """A tensor that says it is not in the host's memory, and counts how often the host reads one."""

    reads = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.is_cpu.__get__:
            return False
        if func in (Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.cpu, Tensor.numpy):
            OnDevice.reads += 1
        return super().__torch_function__(func, types, args, kwargs or {})


class TestHostReads:
    """The host waits for the device once per layer, and once at each end of the model where it predicts there."""

    @pytest.mark.parametrize("predictor", ["none", "auto"])
    @pytest.mark.usefixtures("streams")
    def test_at_most_once_per_layer(self, predictor: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = promoe_triton.patch(
            build(), device="cpu", store="memory", slots=4, backend="triton", predictor=predictor
        )
        read_in_layers: list[int] = []
        run = LayerRuntime.run

        def counted(layer: LayerRuntime, *args: Any) -> Tensor:
            before = OnDevice.reads
            out = run(layer, *args)
            read_in_layers.append(OnDevice.reads - before)
            return out

        monkeypatch.setattr(LayerRuntime, "run", counted)
        model.model.embed_tokens.register_forward_hook(lambda module, args, out: out.as_subclass(OnDevice))
        with torch.no_grad():
            model(PROMPT[:, :3])  # the first time, the gate compares itself with each router
            read_in_layers.clear()
            reads, before = OnDevice.reads, promoe_triton.stats(model).host_reads
            model(PROMPT[:, :3])
        reads = OnDevice.reads - reads
        assert read_in_layers == [1, 1]
        assert reads == promoe_triton.stats(model).host_reads - before
        assert reads <= len(read_in_layers) + (0 if predictor == "none" else 2)


@pytest.mark.usefixtures("streams")
class TestWeights:
    def test_the_same_objects_are_back(self, want: list[Tensor]) -> None:
        model = build()
        before = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
        promoe_triton.patch(model, device="cpu", store="memory", slots=3)
        assert all(p.is_meta == ("experts" in name) for name, p in model.named_parameters())
        logits(model)
        promoe_triton.unpatch(model)
        assert all(p is before[name][0] and p.data_ptr() == before[name][1] for name, p in model.named_parameters())
        assert equal(logits(model), want)

    def test_state_dict(self) -> None:
        stock = build().state_dict()
        state = promoe_triton.patch(build(), device="cpu", store="memory", slots=3).state_dict()
        assert state.keys() == stock.keys()
        assert all(torch.equal(state[name], stock[name]) for name in stock)

    def test_a_copy_shares_the_weights_until_it_is_unpatched(self, want: list[Tensor]) -> None:
        model = promoe_triton.patch(build(), device="cpu", store="memory", slots=3)
        twin = copy.deepcopy(model)
        assert equal(logits(twin), want)
        promoe_triton.unpatch(twin)
        name = "model.layers.0.mlp.experts.down_proj"
        with torch.no_grad():
            twin.get_parameter(name).zero_()
        assert equal(logits(model), want)
        promoe_triton.unpatch(model)
        assert equal(logits(model), want)

    def test_moving_the_slots_is_refused(self) -> None:
        model = promoe_triton.patch(build(), device="cpu", store="memory", slots=3)
        with pytest.raises(PromoeError, match="cannot be moved to meta; unpatch first, and patch with device="):
            model.to("meta")
        with pytest.raises(PromoeError, match=r"rest in the host's memory and cannot be cast to torch\.float32"):
            model.float()


class TestFences:
    """One slot, one tensor, and events that come when the test says so."""

    def filler(self, streams: Any) -> tuple[DeviceFiller, DeviceMemory, Tensor]:
        spec = ExpertSpec(tensors=(TensorSpec(name="w", part=Part.UP, shape=(2, 4), dtype=torch.float32),))
        weights = torch.arange(24.0).view(3, 2, 4)
        layout: Any = type("Layout", (), {"cut": staticmethod(lambda tensor, e: tensor[e])})
        store = HostStore([spec], [layout], [{"w": weights}])
        memory = DeviceMemory(2, store.slot_bytes(0, 3), torch.device("cpu"))
        return DeviceFiller(HostSource(store, streams), [memory], streams), memory, weights

    def copied(self, filler: DeviceFiller, expert: int, slot: int) -> threading.Thread:
        transfer = Transfer(key=ExpertKey(0, expert), part=Part.WHOLE, slot=slot)
        thread = threading.Thread(target=lambda: filler.copy(Chunk(transfer=transfer, begin=0, end=32)))
        thread.start()
        return thread

    @pytest.mark.parametrize("slots", [[0], None], ids=["this-slot", "any-slot"])
    def test_a_copy_waits_for_who_reads_its_slot(self, slots: list[int] | None) -> None:
        events: list[threading.Event] = []

        class Streams(HostStreams):
            def mark(self, timed: bool = False) -> Any:
                events.append(threading.Event())
                return events[-1]

            def lane(self) -> Lane:
                return DeviceLane()

        filler, memory, weights = self.filler(Streams())
        events[0].set()
        self.copied(filler, 1, 0).join(BOUND)
        filler.fence(0, slots)
        waiting, other = self.copied(filler, 2, 0), self.copied(filler, 2, 1)
        other.join(0.2)
        assert other.is_alive() == (slots is None)
        assert waiting.is_alive()
        assert torch.equal(memory.slot(0)[:32].view(torch.float32), weights[1].flatten())
        events[1].set()
        waiting.join(BOUND)
        other.join(BOUND)
        for slot in (0, 1):
            assert torch.equal(memory.slot(slot)[:32].view(torch.float32), weights[2].flatten())

    def test_the_first_copy_waits_for_what_was_there_before(self) -> None:
        """Memory for slots may be memory that was given back a moment ago, and is read still."""
        before = threading.Event()

        class Streams(HostStreams):
            def mark(self, timed: bool = False) -> Any:
                return before

            def lane(self) -> Lane:
                return DeviceLane()

        filler, memory, weights = self.filler(Streams())
        memory.slot(0).zero_()
        first = self.copied(filler, 1, 0)
        first.join(0.2)
        assert first.is_alive()
        assert not memory.slot(0).any()
        before.set()
        first.join(BOUND)
        assert torch.equal(memory.slot(0)[:32].view(torch.float32), weights[1].flatten())

    def test_a_copy_is_done_when_the_thread_says_so(self) -> None:
        """What is told to have landed is read at once: nobody waits for another event."""
        begun, done = threading.Event(), threading.Event()

        class Late(DeviceLane):
            def finish(self) -> None:
                begun.set()
                assert done.wait(BOUND)
                super().finish()

        class Streams(HostStreams):
            def mark(self, timed: bool = False) -> Any:
                return done

            def lane(self) -> Lane:
                return Late()

        filler, memory, weights = self.filler(Streams())
        copying = self.copied(filler, 2, 1)
        assert begun.wait(BOUND)
        copying.join(0.1)
        assert copying.is_alive()
        done.set()
        copying.join(BOUND)
        assert torch.equal(memory.slot(1)[:32].view(torch.float32), weights[2].flatten())
