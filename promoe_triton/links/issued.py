"""A link to a device without threads: whoever computes issues the copies to a stream, and goes on.

A copy that was issued cannot be taken back, and those of a stream are done in their order. So what a layer waits for
is issued at once, and of what is copied ahead no more than takes `latency` seconds; more follows whenever a layer tells
anything. To the feed a chunk has landed when it has been issued: it is the device that waits for it, before it computes
with it, and the host goes on meanwhile. (Threads that wait for copies take the interpreter from the one that computes,
again and again.)
"""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from promoe_triton.chunking import Chunking
from promoe_triton.errors import PromoeError
from promoe_triton.links.device import DeviceFiller
from promoe_triton.links.filling import ended, nothing_came, taken
from promoe_triton.links.meter import Meter
from promoe_triton.links.streams import Lane, Streams
from promoe_triton.protocols import Chunk, Cuts, ExpertKey, ExpertTensors, Feed, Part, R, Transfer
from promoe_triton.timeline import Timeline

TOGETHER = 4
"""Experts that are computed together, at most, as they arrive: fewer launches, and the next ones come meanwhile."""

LOOK = 1e-4
"""Seconds between two looks at what is in flight, for who waits for all of it."""


class _Copy(NamedTuple):
    """A chunk in flight, and the events before it, when it is done, and after the pause that follows, in seconds."""

    chunk: Chunk
    pause: float
    begin: Any
    copied: Any
    end: Any


class _Arrival(NamedTuple):
    """order: of a lane's events, one comes after all before it."""

    tensors: ExpertTensors
    order: int
    event: Any


class IssuedLink:
    """One lane of copies. depth: how many of them may be in flight ahead of need where chunks have a fixed size.

    limit: bytes per second that it shall not exceed, as on a slower bus; None: what there is.
    """

    def __init__(
        self,
        filler: DeviceFiller,
        streams: Streams,
        *,
        depth: int,
        chunking: Chunking,
        timeout: float,
        limit: float | None = None,
    ) -> None:
        self._filler, self._streams, self._lane = filler, streams, streams.lane()
        self._depth, self._chunking, self._timeout, self._limit = depth, chunking, timeout, limit
        self._lock = threading.RLock()
        self._feed: Feed | None = None
        self._stopped = self._closed = False
        self._in_flight: deque[_Copy] = deque()
        self._arrivals: dict[ExpertKey, _Arrival] = {}
        self._arrived = 0
        self._waits: deque[tuple[Any, Any]] = deque()
        self._waited = 0.0
        self._meter, self._copying = Meter(), Meter()  # copying: without what holds copies back
        self._pace = 1.0
        self._bytes_moved = 0
        self._timeline: Timeline | None = None
        self._start: tuple[Any, float] = (None, 0.0)
        self._finalize = weakref.finalize(self, _stop, self._lane, filler)

    def now(self) -> float:
        return time.perf_counter()

    @property
    def cuts(self) -> Callable[[Transfer], Cuts]:
        cuts = self._filler.cuts
        if self._chunking.name == "tensor":
            return cuts
        # One chunk may have several ranges: they are issued one after the other.
        return lambda transfer: Cuts(ends=cuts(transfer).ends[-1:])

    @property
    def bytes_moved(self) -> int:
        self._look()
        return self._bytes_moved

    @property
    def bandwidth(self) -> float:
        return self._meter.rate

    @property
    def busy_seconds(self) -> float:
        self._look()
        return self._meter.busy_seconds

    @property
    def waited_seconds(self) -> float:
        self._look()
        return self._waited

    def record(self, timeline: Timeline | None) -> None:
        """See `Link.record`. The times are the device's; where they begin, host and device are at one."""
        with self._lock:
            self._lane.finish()
            self._look()
            self._start = self._lane.mark(), self.now()
            self._timeline = timeline

    def fence(self, layer: int, slots: Iterable[int] | None) -> None:
        self._filler.fence(layer, slots)

    def tell(self, event: Callable[[], R]) -> R:
        if self._closed:
            raise PromoeError("this model's slots were closed by unpatch; patch the model again")
        with self._lock:
            result = event()
            self._issue()
        return result

    def wait(self, transfers: Sequence[Transfer]) -> Sequence[Transfer]:
        deadline = time.monotonic() + self._timeout
        while not (arrived := self._issued(transfers)):
            if time.monotonic() > deadline:
                raise nothing_came(self._filler, transfers, self._timeout)
            time.sleep(LOOK)
            self.tell(lambda: None)
        return arrived

    def arrived(self, transfers: Sequence[Transfer]) -> Sequence[Transfer]:
        """Return those whose bytes are there: who asks has other things to compute meanwhile."""
        arrivals, streams = self._arrivals, self._streams
        return [t for t in self._issued(transfers) if t.key not in arrivals or streams.has_come(arrivals[t.key].event)]

    def _issued(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        """Return as many as are computed together: of what passes through a slot one, so that the next is copied."""
        with self._lock:
            assert self._feed is not None
            # Not returned from here: a signal right after a call whose result is returned would leave the lock held.
            found = ended(self._feed, transfers)
        passing = [t.part is not Part.WHOLE for t in found[:TOGETHER]]
        return found[: max(passing.index(True), 1) if True in passing else TOGETHER]

    def arrivals(self, keys: Iterable[ExpertKey]) -> Mapping[ExpertKey, ExpertTensors]:
        found = taken(self._arrivals, keys)
        if found:
            streams, last = self._streams, max(found.values(), key=lambda arrival: arrival.order)
            if not streams.has_come(last.event):
                begin = streams.mark(timed=True)
                streams.wait(last.event)
                self._waits.append((begin, streams.mark(timed=True)))
        return {key: arrival.tensors for key, arrival in found.items()}

    def drain(self, patience: float) -> bool:
        deadline = time.monotonic() + patience
        with self._lock:
            self._stopped = True
            self._look()
            while self._in_flight:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                time.sleep(min(left, LOOK))
                self._look()
            self._feed = None
            self._arrivals.clear()
        return True

    def restart(self, feed: Feed) -> None:
        with self._lock:
            assert not self._in_flight
            self._feed, self._stopped = feed, False

    def settle(self) -> None:
        with self._lock:
            self._lane.finish()
            self._look()

    def close(self) -> None:
        with self._lock:
            self._closed, self._feed = True, None
            self._finalize()

    def _issue(self) -> None:
        """Give the lane what there is to copy, as far as it may be given."""
        self._look()
        if self._asked() is None:
            return
        before, begun, here = None, False, self._lane.here()
        try:
            while (feed := self._asked()) is not None and (chunk := feed.next_chunk(*self._budgets())) is not None:
                begun = True
                before = self._copy(feed, chunk, before)
        finally:
            if begun:
                self._lane.back(here)

    def _asked(self) -> Feed | None:
        """Return the feed, if it may be asked and has something to copy."""
        feed = self._feed
        return feed if feed is not None and feed.backlog and not self._stopped else None

    def _copy(self, feed: Feed, chunk: Chunk, before: Any) -> Any:
        """Give the lane a chunk; return the event after it. before: that of the chunk given just before, if any."""
        lane, filler, transfer, nbytes = self._lane, self._filler, chunk.transfer, chunk.end - chunk.begin
        try:
            if before is None:
                lane.own()
            # What follows at once begins when the one before it ends.
            waits = filler.await_readers(chunk, lane)
            begin = lane.mark() if waits or before is None or self._streams.has_come(before) else before
            filler.issue(chunk, lane)
            copied = end = lane.mark()
            pause = self._pause(nbytes)
            if pause:
                lane.pause(pause * self._pace)
                end = lane.mark()
            self._in_flight.append(_Copy(chunk, pause, begin, copied, end))
            if feed.landed(chunk):
                tensors = filler.finish(transfer)
                if feed.finished(transfer):
                    self._arrived += 1
                    self._arrivals[transfer.key] = _Arrival(tensors, self._arrived, end)
        except Exception as error:
            feed.failed(chunk, error)
            return None
        return end

    def _budgets(self) -> tuple[int, int]:
        """Return the most bytes of the next chunk: of what a layer waits for, and of what is copied ahead."""
        chunking = self._chunking
        if chunking.name != "adaptive":
            longest = sys.maxsize if chunking.name == "tensor" else chunking.longest
            return longest, longest if len(self._in_flight) < self._depth else 0
        window = chunking.in_flight(self._meter.rate)
        left = window - sum(copy.chunk.end - copy.chunk.begin for copy in self._in_flight)
        return sys.maxsize, left if 2 * left >= window else 0

    def _pause(self, nbytes: int) -> float:
        """Return for how many seconds more a link of limited bandwidth would copy so many bytes."""
        if self._limit is None:
            return 0.0
        alone = self._copying.rate
        return max(nbytes / self._limit - (nbytes / alone if alone else 0.0), 0.0)

    def _look(self) -> None:
        """Take note of what the device has done meanwhile. Raises PromoeError where it is lost."""
        try:
            self._note_done()
        except RuntimeError as error:
            raise PromoeError(f"copies to the device have failed, and it can be asked nothing more: {error}") from error

    def _note_done(self) -> None:
        streams, in_flight, waits = self._streams, self._in_flight, self._waits
        with self._lock:
            while in_flight and streams.has_come(in_flight[0].end):
                chunk, pause, begin, copied, end = in_flight.popleft()
                nbytes = chunk.end - chunk.begin
                self._bytes_moved += nbytes
                self._meter.add(streams.seconds(begin, end), nbytes)
                if self._limit is not None:
                    self._copying.add(streams.seconds(begin, copied), nbytes)
                if pause:
                    # A device counts its cycles, which are not always as long.
                    self._pace *= (pause / max(streams.seconds(copied, end), 0.1 * pause)) ** 0.5
                if self._timeline is not None:
                    start, began = self._start
                    times = [began + streams.seconds(start, event) for event in (begin, copied)]
                    self._timeline.copied("copy", chunk, *times)
            while waits and streams.has_come(waits[0][1]):
                self._waited += streams.seconds(*waits.popleft())


def _stop(lane: Lane, filler: DeviceFiller) -> None:
    try:
        lane.finish()
    finally:
        filler.close()
