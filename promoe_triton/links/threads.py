"""A link of a few threads: each asks for a chunk, copies it into its slot, and asks again."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from promoe_triton.chunking import Chunking
from promoe_triton.errors import PromoeError
from promoe_triton.links.filling import Filler, ended, nothing_came, taken
from promoe_triton.links.meter import Meter
from promoe_triton.protocols import Chunk, Cuts, ExpertKey, ExpertTensors, Feed, R, Transfer
from promoe_triton.timeline import Timeline

CLOSE_SECONDS = 10.0
"""How long closing waits for all threads together; one that hangs in a read ends after that read."""


@dataclass(slots=True)
class _Shared:
    """All that a thread holds on to: never the link itself, so that a lost link can end its threads."""

    filler: Filler
    chunking: Chunking
    lanes: int
    limit: float | None
    feed: Feed | None = None
    in_flight: int = 0
    speculating: int = 0
    meter: Meter = field(default_factory=Meter)
    free_at: float = 0.0
    timeline: Timeline | None = None
    arrivals: dict[ExpertKey, ExpertTensors] = field(default_factory=dict)
    bytes_moved: int = 0
    torn: bool = False
    closed: bool = False
    # Two conditions over one lock: a thread that is woken in vain takes the interpreter from one that is not.
    work: threading.Condition = field(init=False)
    settled: threading.Condition = field(init=False)

    def __post_init__(self) -> None:
        lock = threading.RLock()
        self.work, self.settled = threading.Condition(lock), threading.Condition(lock)

    def reserve(self, now: float, nbytes: int) -> float:
        """Return when a link of limited bandwidth is done with so many bytes more; 0.0 without a limit."""
        if self.limit is None:
            return 0.0
        self.free_at = max(self.free_at, now) + nbytes / self.limit
        return self.free_at


class ThreadedLink:
    """`depth` copies in flight, as long as `chunking` lets them be. Idle until it is given a feed.

    filler: what copies a chunk. limit: bytes per second that it shall not exceed, as on a slower disk or bus; None:
    what there is.
    """

    def __init__(
        self, filler: Filler, *, depth: int, chunking: Chunking, timeout: float, limit: float | None = None
    ) -> None:
        self._shared = _Shared(filler=filler, chunking=chunking, lanes=depth, limit=limit)
        self._timeout = timeout
        self._threads = [
            threading.Thread(target=_work, args=(self._shared, f"copy {i}"), name=f"promoe-read-{i}", daemon=True)
            for i in range(depth)
        ]
        for thread in self._threads:
            thread.start()
        self._finalize = weakref.finalize(self, _stop, self._shared, tuple(self._threads))

    @property
    def bytes_moved(self) -> int:
        return self._shared.bytes_moved

    @property
    def bandwidth(self) -> float:
        return self._shared.meter.rate

    @property
    def busy_seconds(self) -> float:
        return self._shared.meter.busy_seconds

    @property
    def waited_seconds(self) -> float:
        return 0.0

    def record(self, timeline: Timeline | None) -> None:
        self._shared.timeline = timeline

    def now(self) -> float:
        return time.perf_counter()

    @property
    def cuts(self) -> Callable[[Transfer], Cuts]:
        return self._shared.filler.cuts

    def fence(self, layer: int, slots: Iterable[int] | None) -> None:
        self._shared.filler.fence(layer, slots)

    def tell(self, event: Callable[[], R]) -> R:
        shared = self._shared
        if shared.closed:
            raise PromoeError("this model's reading threads have been stopped; patch the model again")
        with shared.work:
            # An interruption in the middle of a change leaves a feed that nobody may ask any more.
            shared.torn = True
            result = event()
            shared.torn = False
            if shared.feed is not None:
                shared.work.notify(shared.feed.backlog)
        return result

    def wait(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        shared = self._shared
        with shared.settled:
            moved, since = shared.bytes_moved, time.monotonic()
            while not (arrived := self.arrived(transfers)):
                shared.settled.wait(timeout=min(self._timeout, 1.0))
                if shared.bytes_moved != moved:
                    moved, since = shared.bytes_moved, time.monotonic()
                elif time.monotonic() - since >= self._timeout:
                    raise nothing_came(shared.filler, transfers, self._timeout)
            return arrived

    def arrived(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        with self._shared.settled:
            feed = self._shared.feed
            assert feed is not None
            # Not returned from here: a signal right after a call whose result is returned would leave the lock held.
            found = ended(feed, transfers)
        return found  # noqa: RET504

    def arrivals(self, keys: Iterable[ExpertKey]) -> Mapping[ExpertKey, ExpertTensors]:
        return taken(self._shared.arrivals, keys)

    def settle(self) -> None:
        """Nothing to do: what has arrived is there."""

    def drain(self, patience: float) -> bool:
        shared = self._shared
        deadline = time.monotonic() + patience
        with shared.settled:
            shared.torn = True
            while shared.in_flight:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                shared.settled.wait(timeout=left)
            shared.feed = None
            shared.arrivals.clear()
        return True

    def restart(self, feed: Feed) -> None:
        shared = self._shared
        with shared.work:
            assert not shared.in_flight
            shared.feed, shared.torn = feed, False
            shared.work.notify_all()

    def close(self) -> None:
        self._finalize()


def _work(shared: _Shared, lane: str) -> None:
    job = None
    while (job := _next(shared, job)) is not None:
        chunk = job.chunk
        try:
            if _copied(shared, job, lane):
                _finish(shared, chunk.transfer)
        except BaseException as error:
            with shared.settled:
                if shared.feed is not None and not shared.torn:
                    shared.feed.failed(chunk, error)
                shared.settled.notify_all()


@dataclass(slots=True)
class _Job:
    """A chunk on its way. due: when a link of limited bandwidth would be done with it; times of `perf_counter`."""

    chunk: Chunk
    began: float
    due: float
    moved: int = 0


def _next(shared: _Shared, done: _Job | None) -> _Job | None:
    """Note that nothing of the last chunk is in flight any more, and wait for the next; None when the link closes."""
    with shared.work:
        if done is not None:
            shared.in_flight -= 1
            shared.speculating -= done.chunk.speculative
            shared.meter.ended(time.perf_counter(), done.moved)
            if shared.torn:
                shared.settled.notify_all()
        while not shared.closed:
            if shared.feed is not None and not shared.torn:
                budgets = shared.chunking.budgets(shared.meter.rate, shared.lanes, shared.speculating)
                chunk = shared.feed.next_chunk(budgets.urgent, budgets.speculative)
                if chunk is not None:
                    now = time.perf_counter()
                    shared.in_flight += 1
                    shared.speculating += chunk.speculative
                    shared.meter.begun(now)
                    return _Job(chunk, now, shared.reserve(now, chunk.end - chunk.begin))
            shared.work.wait()
    return None


def _copied(shared: _Shared, job: _Job, lane: str) -> bool:
    """Read one chunk into its slot; whether its transfer is complete with it."""
    chunk = job.chunk
    moved = shared.filler.copy(chunk)
    if job.due:
        time.sleep(max(job.due - time.perf_counter(), 0.0))
    job.moved = moved
    if shared.timeline is not None:
        shared.timeline.copied(lane, chunk, job.began, time.perf_counter())
    with shared.settled:
        shared.bytes_moved += moved
        return shared.feed is not None and not shared.torn and shared.feed.landed(chunk)


def _finish(shared: _Shared, transfer: Transfer) -> None:
    """Put the last bytes in place and report the tensors."""
    tensors = shared.filler.finish(transfer)
    with shared.settled:
        if shared.feed is not None and not shared.torn:
            if shared.feed.finished(transfer):
                shared.arrivals[transfer.key] = tensors
            shared.settled.notify_all()


def _stop(shared: _Shared, threads: Sequence[threading.Thread]) -> None:
    with shared.work:
        shared.closed = True
        shared.feed = None  # which knows how to cut what is in this store, and so would keep it
        shared.work.notify_all()
    deadline = time.monotonic() + CLOSE_SECONDS
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(timeout=max(deadline - time.monotonic(), 0.0))
    shared.filler.close()
