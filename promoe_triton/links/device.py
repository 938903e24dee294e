"""Host memory or disk to slots in a device's memory, on streams beside the one that computes.

A thread that copies returns when its bytes are in the slot, so what a layer computes after an arrival sees them. What
it computed before may still run when its slots are given to others: `fence` notes an event after that work, and every
copy into those slots waits for it on the device, not on the host.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from promoe_triton.links.filling import Views
from promoe_triton.links.sources import Source
from promoe_triton.links.streams import Lane, Streams
from promoe_triton.memory import Slots
from promoe_triton.protocols import Chunk, Cuts, ExpertTensors, Transfer


class _Fence(NamedTuple):
    """An event after work that reads slots. As all work is in one order, a fence comes after all of lower numbers."""

    number: int
    event: Any


class DeviceFiller:
    """Copies chunks from a source into the slots of their layers, which lie on a device. Any thread may use it."""

    def __init__(self, source: Source, memory_of_layer: Sequence[Slots], streams: Streams) -> None:
        self._source = source
        self._memory_of_layer = memory_of_layer
        self._streams = streams
        self._views = Views()
        # The allocator may have given the slots memory that work issued before still reads.
        self._everything = self._latest = _Fence(0, streams.mark())
        self._fences: dict[tuple[int, int], _Fence] = {}
        self._awaited: dict[Lane, int] = {}  # the number of the last one that each lane waits for
        self._here = threading.local()

    def cuts(self, transfer: Transfer) -> Cuts:
        return Cuts(ends=self._source.image(transfer).ends, whole=self._source.is_whole(transfer))

    def source(self, transfer: Transfer) -> str:
        return self._source.describe(transfer)

    def copy(self, chunk: Chunk) -> int:
        lane = self._lane()
        self.await_readers(chunk, lane)
        transfer = chunk.transfer
        if self._source.is_whole(transfer):
            memory = self._memory_of_layer[transfer.key.layer]
            read = self._source.converted(transfer, memory.slot_bytes)
            lane.copy(memory.slot(transfer.slot), read.data)
            lane.finish()
            return read.moved
        for target, data in self._pieces(chunk):
            lane.copy(target, data)
            lane.finish()
        return chunk.end - chunk.begin

    def issue(self, chunk: Chunk, lane: Lane) -> None:
        """Let a lane copy a chunk, of a source that gives it from where it rests. Returns before that is done."""
        for target, data in self._pieces(chunk):
            lane.copy(target, data)

    def await_readers(self, chunk: Chunk, lane: Lane) -> bool:
        """Let a lane wait for whoever reads the slot of a chunk, or any slot; whether it has to."""
        everything, fence = self._everything, self._fences.get(self._place(chunk.transfer))
        if fence is None or fence.number < everything.number:
            fence = everything
        if self._awaited.get(lane, -1) >= fence.number:
            return False
        lane.after(fence.event)
        self._awaited[lane] = fence.number
        return True

    def _place(self, transfer: Transfer) -> tuple[int, int]:
        return id(self._memory_of_layer[transfer.key.layer]), transfer.slot

    def _pieces(self, chunk: Chunk) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield parts of a slot, and what is to be in each, valid until the next."""
        transfer = chunk.transfer
        slot = self._memory_of_layer[transfer.key.layer].slot(transfer.slot)
        image, begin = self._source.image(transfer), chunk.begin
        index = bisect.bisect_right(image.ends, begin)
        while begin < chunk.end:
            extent, end = image.extents[index], image.ends[index]
            skip = begin - (end - extent.nbytes)
            nbytes, first = min(chunk.end, end) - begin, extent.slot_offset + skip
            yield slot[first : first + nbytes], self._source.read(transfer, extent, index, skip, nbytes)
            begin += nbytes
            index += 1

    def finish(self, transfer: Transfer) -> ExpertTensors:
        self._source.check(transfer)
        memory = self._memory_of_layer[transfer.key.layer]
        return self._views.of(self._source.image(transfer), memory, transfer.slot)

    def fence(self, layer: int, slots: Iterable[int] | None) -> None:
        fence = self._latest = _Fence(self._latest.number + 1, self._streams.mark())
        if slots is None:
            self._everything = fence
            return
        memory = id(self._memory_of_layer[layer])
        for slot in slots:
            self._fences[memory, slot] = fence

    def _lane(self) -> Lane:
        lane: Lane | None = getattr(self._here, "lane", None)
        if lane is None:
            lane = self._here.lane = self._streams.lane()
            lane.own()
        return lane

    def close(self) -> None:
        # The slots' memory may go to others next, on the stream where it was taken; every layer comes after the last.
        try:
            self._streams.settle(self._latest.event)
        finally:
            self._source.close()
