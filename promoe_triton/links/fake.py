"""A link on a virtual clock: any bandwidth, latency, jitter and faults, the same every time. For tests and planning.

Nothing happens at once and nothing by itself: time passes in `wait`, until something arrives, and in `pass_time`,
which stands for computing. Whether bytes are really copied is up to the filler.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from promoe_triton.chunking import Chunking
from promoe_triton.errors import PromoeError
from promoe_triton.links.filling import Filler, ended, taken
from promoe_triton.links.meter import Meter
from promoe_triton.protocols import Chunk, Cuts, ExpertKey, ExpertTensors, Feed, R, Transfer
from promoe_triton.timeline import Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """What a fake link is like.

    bandwidth: bytes per second, one chunk after the other. latency: seconds from asking for a chunk to its first
    byte, in which others may be on the wire. jitter: further seconds, by chunk. fault: what a chunk fails with, if
    it does. Both are asked once per chunk, in the order in which chunks begin; None: none.
    """

    bandwidth: float = 1e9
    latency: float = 0.0
    jitter: Callable[[Chunk], float] | None = None
    fault: Callable[[Chunk], BaseException | None] | None = None


class _Landing(NamedTuple):
    """Ordered by time, then by when it began: no two have begun as the same. at: by the wire's own clock."""

    at: float
    order: int
    chunk: Chunk
    lane: int
    began: float
    error: BaseException | None


class DryFiller:
    """Copies nothing, for planning. cuts: how transfers may be cut."""

    def __init__(self, cuts: Callable[[Transfer], Cuts]) -> None:
        self.cuts = cuts

    def source(self, transfer: Transfer) -> str:
        return "nowhere"

    def copy(self, chunk: Chunk) -> int:
        return chunk.end - chunk.begin

    def finish(self, transfer: Transfer) -> ExpertTensors:
        return {}

    def fence(self, layer: int, slots: Iterable[int] | None) -> None:
        pass

    def close(self) -> None:
        pass


class FakeLink:
    """`depth` chunks in flight on one wire."""

    def __init__(self, filler: Filler, wire: Wire, *, depth: int, chunking: Chunking) -> None:
        self._filler, self._wire, self._chunking = filler, wire, chunking
        self._lanes = list(range(depth))
        self._depth = depth
        self._feed: Feed | None = None
        self._time = self._wire_free = 0.0
        # How far the wire's clock is behind: it stands still for some of the time that others compute.
        self._lag = 0.0
        self._begun = self._speculating = 0
        self._landings: list[_Landing] = []
        self._arrivals: dict[ExpertKey, ExpertTensors] = {}
        self._meter = Meter()
        self._timeline: Timeline | None = None
        self._closed = False
        self.bytes_moved = 0

    def now(self) -> float:
        return self._time

    @property
    def cuts(self) -> Callable[[Transfer], Cuts]:
        return self._filler.cuts

    def fence(self, layer: int, slots: Iterable[int] | None) -> None:
        self._filler.fence(layer, slots)

    @property
    def bandwidth(self) -> float:
        return self._meter.rate

    @property
    def busy_seconds(self) -> float:
        return self._meter.busy_seconds

    @property
    def waited_seconds(self) -> float:
        return 0.0

    def record(self, timeline: Timeline | None) -> None:
        self._timeline = timeline

    def pass_time(self, seconds: float, slowed: float = 1.0, link_slowed: float = 1.0) -> None:
        """Let so many virtual seconds of computing pass, in which nobody waits.

        While copies are in flight, it takes `slowed` times as long, and they take `link_slowed` times as long.
        """
        while self._landings:
            until, lands = self._time + seconds * slowed, self._landings[0].at + self._lag
            if link_slowed != 1.0:
                lands = self._time + (lands - self._time) * link_slowed
            passed = max(min(lands, until) - self._time, 0.0)
            self._lag += passed - passed / link_slowed
            if lands > until:
                self._time = until
                return
            seconds -= passed / slowed
            self._land()
        self._time += seconds

    def tell(self, event: Callable[[], R]) -> R:
        if self._closed:
            raise PromoeError("this link has been closed; patch the model again")
        result = event()
        self._begin()
        return result

    def wait(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        while not (arrived := self.arrived(transfers)):
            has_ended = False
            while not has_ended:
                if not self._landings:
                    raise PromoeError(f"nothing is in flight that {transfers[0].name} could come with")
                has_ended = self._land()
        return arrived

    def arrived(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        assert self._feed is not None
        return ended(self._feed, transfers)

    def arrivals(self, keys: Iterable[ExpertKey]) -> Mapping[ExpertKey, ExpertTensors]:
        return taken(self._arrivals, keys)

    def settle(self) -> None:
        """Nothing to do: what has arrived is there."""

    def drain(self, patience: float) -> bool:
        self._feed = None
        until = self._time + patience
        while self._landings and self._landings[0].at + self._lag <= until:
            self._land()
        if self._landings:
            self._time = until
            return False
        self._arrivals.clear()
        return True

    def restart(self, feed: Feed) -> None:
        assert not self._landings
        self._feed = feed
        self._begin()

    def close(self) -> None:
        self._closed, self._feed = True, None
        self._landings.clear()
        self._filler.close()

    def _begin(self) -> None:
        """Put on the wire what there is to copy, as long as lanes are free."""
        feed, wire, meter, now = self._feed, self._wire, self._meter, self._time
        while self._lanes and feed is not None and feed.backlog:
            chunk = feed.next_chunk(*self._chunking.budgets(meter.rate, self._depth, self._speculating))
            if chunk is None:
                return
            self._speculating += chunk.speculative
            meter.begun(now)
            first_byte = now - self._lag + wire.latency + (wire.jitter(chunk) if wire.jitter else 0.0)
            self._wire_free = max(first_byte, self._wire_free) + (chunk.end - chunk.begin) / wire.bandwidth
            self._begun += 1
            error = wire.fault(chunk) if wire.fault else None
            lane = self._lanes.pop(0)
            heapq.heappush(self._landings, _Landing(self._wire_free, self._begun, chunk, lane, now, error))

    def _land(self) -> bool:
        """Go to the time at which the next chunk lands; whether an expert has come with it, or an error."""
        landing = heapq.heappop(self._landings)
        chunk, feed = landing.chunk, self._feed
        self._time = max(self._time, landing.at + self._lag)
        moved, has_ended = 0, False
        try:
            if landing.error is not None:
                raise landing.error
            moved = self._filler.copy(chunk)
            if feed is not None and feed.landed(chunk):
                tensors = self._filler.finish(chunk.transfer)
                has_ended = True
                if feed.finished(chunk.transfer):
                    self._arrivals[chunk.transfer.key] = tensors
        except Exception as error:
            has_ended = True
            if feed is not None:
                feed.failed(chunk, error)
        self.bytes_moved += moved
        self._speculating -= chunk.speculative
        self._meter.ended(self._time, moved)
        self._lanes.append(landing.lane)
        if self._timeline is not None:
            self._timeline.copied(f"copy {landing.lane}", chunk, landing.began, self._time)
        self._begin()
        return has_ended
