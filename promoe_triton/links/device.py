"""Host memory or disk to slots in a device's memory: each thread on a stream of its own.

A thread returns from a copy when its bytes are in the slot, so what a layer computes after an arrival sees them. What
it computed before may still run when its slots are given to others: `fence` notes an event after that work, and every
copy into those slots waits for it on the device, not on the host.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from promoe_triton.links.filling import Views
from promoe_triton.links.sources import Source
from promoe_triton.links.streams import Lane, Streams
from promoe_triton.memory import Slots
from promoe_triton.protocols import Chunk, Cuts, ExpertTensors, Transfer


class DeviceFiller:
    """Copies chunks from a source into the slots of their layers, which lie on a device. Any thread may use it."""

    def __init__(self, source: Source, memory_of_layer: Sequence[Slots], streams: Streams) -> None:
        self._source = source
        self._memory_of_layer = memory_of_layer
        self._streams = streams
        self._views = Views()
        self._fences: dict[tuple[int, int], Any] = {}
        # The allocator may have given the slots memory that work issued before still reads.
        self._everything = self._latest = streams.mark()
        self._here = threading.local()

    def cuts(self, transfer: Transfer) -> Cuts:
        return Cuts(ends=self._source.image(transfer).ends, whole=self._source.is_whole(transfer))

    def source(self, transfer: Transfer) -> str:
        return self._source.describe(transfer)

    def copy(self, chunk: Chunk) -> int:
        transfer = chunk.transfer
        memory, lane = self._memory_of_layer[transfer.key.layer], self._lane()
        slot = memory.slot(transfer.slot)
        self._await_readers(lane, self._fences.get((id(memory), transfer.slot)))
        if self._source.is_whole(transfer):
            read = self._source.converted(transfer, memory.slot_bytes)
            lane.copy(slot, read.data)
            lane.finish()
            return read.moved
        # A chunk lies within one extent.
        image = self._source.image(transfer)
        index = bisect.bisect_right(image.ends, chunk.begin)
        extent = image.extents[index]
        skip = chunk.begin - (image.ends[index] - extent.nbytes)
        nbytes = chunk.end - chunk.begin
        done = 0
        while done < nbytes:
            data = self._source.read(transfer, extent, index, skip + done, nbytes - done)
            first = extent.slot_offset + skip + done
            lane.copy(slot[first : first + len(data)], data)
            lane.finish()
            done += len(data)
        return nbytes

    def finish(self, transfer: Transfer) -> ExpertTensors:
        self._source.check(transfer)
        memory = self._memory_of_layer[transfer.key.layer]
        return self._views.of(self._source.image(transfer), memory, transfer.slot)

    def fence(self, layer: int, slots: Iterable[int] | None) -> None:
        event = self._latest = self._streams.mark()
        if slots is None:
            self._everything = event
            return
        memory = self._memory_of_layer[layer]
        for slot in slots:
            self._fences[id(memory), slot] = event

    def _await_readers(self, lane: Lane, readers: Any) -> None:
        """Let a lane wait for whoever reads any slot, unless it has waited for that, and for these."""
        everything = self._everything
        if everything is not getattr(self._here, "waited", None):
            lane.after(everything)
            self._here.waited = everything
        if readers is not None:
            lane.after(readers)

    def _lane(self) -> Lane:
        lane: Lane | None = getattr(self._here, "lane", None)
        if lane is None:
            lane = self._here.lane = self._streams.lane()
        return lane

    def close(self) -> None:
        # The slots' memory may go to others next, on the stream where it was taken; every layer comes after the last.
        try:
            self._streams.settle(self._latest)
        finally:
            self._source.close()
