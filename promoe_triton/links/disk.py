"""Disk to RAM: a few threads that read chunks straight into slots."""

from __future__ import annotations

import bisect
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from promoe_triton.errors import PromoeError
from promoe_triton.memory import SlotMemory
from promoe_triton.protocols import Chunk, ExpertTensors, Transfer
from promoe_triton.stores.checkpoint import CheckpointStore, apply_moves
from promoe_triton.stores.image import SlotImage
from promoe_triton.stores.reader import FileReader
from promoe_triton.transfers import TransferQueue


@dataclass(slots=True)
class _Job:
    """A transfer with the places its bytes go to. Staged experts are read from files by their store."""

    image: SlotImage
    memory: SlotMemory
    staged: bool


@dataclass(slots=True)
class _Shared:
    """All that a reading thread holds on to: never the link itself, so that a lost link can end its threads."""

    store: CheckpointStore
    reader: FileReader
    memory_of_layer: Sequence[SlotMemory]
    chunk_bytes: int
    queue: TransferQueue = field(default_factory=TransferQueue)
    jobs: dict[Transfer, _Job] = field(default_factory=dict)
    done: dict[Transfer, ExpertTensors] = field(default_factory=dict)
    last_views: dict[tuple[int, int], tuple[Any, ExpertTensors]] = field(default_factory=dict)
    bytes_moved: int = 0
    closed: bool = False
    # Two conditions over one lock: a thread that is woken in vain takes the interpreter from one that is not.
    work: threading.Condition = field(init=False)
    settled: threading.Condition = field(init=False)

    def __post_init__(self) -> None:
        lock = threading.RLock()
        self.work, self.settled = threading.Condition(lock), threading.Condition(lock)

    def views(self, job: _Job, slot: int) -> ExpertTensors:
        """Return a slot's tensors; most experts of a layer lie in a slot just as the one before them did."""
        places, tensors = self.last_views.get((id(job.memory), slot), (None, {}))
        if places != job.image.places:
            places, tensors = job.image.places, job.image.views(job.memory.slot(slot))
            self.last_views[id(job.memory), slot] = places, tensors
        return tensors


class DiskLink:
    """`depth` reads in flight, of at most `chunk_bytes` each."""

    def __init__(
        self,
        store: CheckpointStore,
        memory_of_layer: Sequence[SlotMemory],
        *,
        direct: bool,
        depth: int,
        chunk_bytes: int,
        timeout: float,
    ) -> None:
        self._shared = _Shared(
            store=store,
            reader=FileReader(store.unchanged, direct),
            memory_of_layer=memory_of_layer,
            chunk_bytes=chunk_bytes,
        )
        self._timeout = timeout
        self.direct = direct
        self._threads = [
            threading.Thread(target=_work, args=(self._shared,), name=f"promoe-read-{i}", daemon=True)
            for i in range(depth)
        ]
        for thread in self._threads:
            thread.start()
        self._finalize = weakref.finalize(self, _stop, self._shared, tuple(self._threads))

    @property
    def bytes_moved(self) -> int:
        return self._shared.bytes_moved

    def submit(self, transfer: Transfer) -> None:
        shared = self._shared
        if shared.closed:
            raise PromoeError("this model's reading threads have been stopped; patch the model again")
        store, layer = shared.store, transfer.key.layer
        image = store.image(transfer.key, shared.reader.direct).of(transfer.part)
        job = _Job(image, shared.memory_of_layer[layer], store.staged(layer))
        with shared.work:
            shared.jobs[transfer] = job
            shared.queue.push(transfer, image.ends, whole=job.staged)
            shared.work.notify_all()

    def wait(self, transfer: Transfer) -> ExpertTensors:
        shared = self._shared
        with shared.settled:
            moved, since = shared.bytes_moved, time.monotonic()
            while transfer not in shared.done and transfer not in shared.queue.errors:
                shared.settled.wait(timeout=min(self._timeout, 1.0))
                if shared.bytes_moved != moved:
                    moved, since = shared.bytes_moved, time.monotonic()
                elif time.monotonic() - since >= self._timeout:
                    first = shared.jobs[transfer].image.extents[0]
                    raise PromoeError(
                        f"no byte arrived for {self._timeout:g} s while waiting for {_name(transfer)} from "
                        f"{first.file} at offset {first.offset}"
                    )
            if transfer in shared.queue.errors:
                error = shared.queue.errors[transfer]
                raise PromoeError(f"{_name(transfer)} could not be read: {error}") from error
            tensors = shared.done.pop(transfer)
            shared.queue.forget(transfer)
            del shared.jobs[transfer]
            return tensors

    def _forget_if_settled(self, transfer: Transfer) -> None:
        shared = self._shared
        if transfer in shared.queue:
            shared.queue.stop(transfer)
            if not shared.queue.settled(transfer):
                return
            shared.queue.forget(transfer)
        del shared.jobs[transfer]
        shared.done.pop(transfer, None)

    def drain(self, patience: float) -> bool:
        shared = self._shared
        deadline = time.monotonic() + patience
        with shared.settled:
            while shared.jobs:
                for transfer in list(shared.jobs):
                    self._forget_if_settled(transfer)
                left = deadline - time.monotonic()
                if shared.jobs and left <= 0:
                    return False
                if shared.jobs:
                    shared.settled.wait(timeout=left)
        return True

    def close(self) -> None:
        self._finalize()


def _name(transfer: Transfer) -> str:
    return f"expert {transfer.key.expert} of MoE layer {transfer.key.layer}"


def _work(shared: _Shared) -> None:
    while (chunk := _next(shared)) is not None:
        job = shared.jobs[chunk.transfer]
        try:
            moved = _copy(shared, job, chunk)
            with shared.settled:
                shared.bytes_moved += moved
                complete = shared.queue.landed(chunk)
                if shared.queue.stopped(chunk.transfer):
                    shared.settled.notify_all()
            if complete:
                _finish(shared, job, chunk.transfer)
        except BaseException as error:
            with shared.settled:
                shared.queue.failed(chunk, error)
                shared.settled.notify_all()


def _next(shared: _Shared) -> Chunk | None:
    """Wait for the next chunk; None when the link closes."""
    with shared.work:
        while not shared.closed:
            if (chunk := shared.queue.next_chunk(shared.chunk_bytes)) is not None:
                return chunk
            shared.work.wait()
    return None


def _copy(shared: _Shared, job: _Job, chunk: Chunk) -> int:
    """Read one chunk into its slot; return the bytes read."""
    transfer, image, reader = chunk.transfer, job.image, shared.reader
    if job.staged:
        return shared.store.convert(transfer.key, image, job.memory.slot(transfer.slot), reader)
    if chunk.begin == 0:
        for file in image.files:
            reader.check(file)  # opens it anew where it was exchanged for an equal one
    index = bisect.bisect_right(image.ends, chunk.begin)
    extent = image.extents[index]
    skip = chunk.begin - (image.ends[index] - extent.nbytes)
    nbytes = chunk.end - chunk.begin
    reader.read_into(
        extent.file,
        extent.offset + skip,
        nbytes,
        job.memory.view,
        transfer.slot * job.memory.slot_bytes + extent.slot_offset + skip,
        needed=min(nbytes, extent.needed - skip),
    )
    return nbytes


def _finish(shared: _Shared, job: _Job, transfer: Transfer) -> None:
    """Put the last bytes in place and report the tensors."""
    if not job.staged:
        for file in job.image.files:
            # Only a file that is still the same after the last read has surely been the same at the first.
            shared.reader.check(file)
        apply_moves(job.image, job.memory.slot(transfer.slot))
    tensors = shared.views(job, transfer.slot)
    with shared.settled:
        shared.queue.finished(transfer)
        shared.done[transfer] = tensors
        shared.settled.notify_all()


def _stop(shared: _Shared, threads: Sequence[threading.Thread]) -> None:
    with shared.work:
        shared.closed = True
        shared.work.notify_all()
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(timeout=10.0)
    shared.reader.close()
