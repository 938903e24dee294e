"""Where a device's slots are filled from: the host's memory, or files through a little of it.

Either way the bytes that a lane copies lie in memory that the device can read by itself, if there is such memory, and
if they are many.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import NamedTuple, Protocol

from torch import Tensor

from promoe_triton.config import format_size
from promoe_triton.links.streams import Streams
from promoe_triton.memory import SlotMemory
from promoe_triton.protocols import PAGE, Transfer
from promoe_triton.stores.checkpoint import CheckpointStore
from promoe_triton.stores.host import HostStore
from promoe_triton.stores.image import Extent, SlotImage
from promoe_triton.stores.reader import FileReader
from promoe_triton.stores.registration import Release

logger = logging.getLogger(__name__)


class Converted(NamedTuple):
    """An expert as it is to lie in its slot (uint8 [slot_bytes]), and the bytes that were read for it."""

    data: Tensor
    moved: int


class Source(Protocol):
    """Bytes of experts in the host's memory. Any thread may ask."""

    def image(self, transfer: Transfer) -> SlotImage:
        """Say how a transfer's bytes lie in a slot; every tensor is aligned, nothing is moved afterwards."""
        ...

    def is_whole(self, transfer: Transfer) -> bool:
        """Whether it is converted on its way, and comes as one."""
        ...

    def read(self, transfer: Transfer, extent: Extent, index: int, skip: int, nbytes: int) -> Tensor:
        """Return bytes of the image's extent number `index`, uint8 [nbytes]; valid until this thread's next call."""
        ...

    def converted(self, transfer: Transfer, slot_bytes: int) -> Converted:
        """Return a transfer that `is_whole`; valid until this thread's next call."""
        ...

    def check(self, transfer: Transfer) -> None:
        """Raise PromoeError unless what was read was what it should be."""
        ...

    def describe(self, transfer: Transfer) -> str: ...

    def close(self) -> None: ...


class Ring(NamedTuple):
    """Memory for bytes on their way. release: undoes its registration, if it could be registered."""

    memory: SlotMemory
    release: Release | None


class Rings:
    """Memory of every thread's own, for bytes on their way to the device."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._here = threading.local()
        self._taken: dict[int, Ring] = {}  # by thread; the memory must outlive its registration

    def room(self, nbytes: int) -> SlotMemory:
        """Return the calling thread's memory, of at least so many bytes; what was in it before may be gone.

        Its last copy must be done.
        """
        memory: SlotMemory | None = getattr(self._here, "memory", None)
        if memory is None or memory.slot_bytes < nbytes:
            # Chunks grow as the link is measured: twice as much each time, or every few would register memory anew.
            grown = nbytes if memory is None else max(nbytes, 2 * memory.slot_bytes)
            self._release(threading.get_ident())
            memory = self._here.memory = SlotMemory(1, grown)
            release = self._streams.pin(memory.slot(0).data_ptr(), memory.slot_bytes)
            self._taken[threading.get_ident()] = Ring(memory, release)
        return memory

    def _release(self, thread: int) -> None:
        ring = self._taken.pop(thread, None)
        if ring is not None and ring.release is not None:
            ring.release()

    def close(self) -> None:
        for thread in list(self._taken):
            self._release(thread)


class HostSource:
    """Experts at rest in the host's memory, which is registered with the device: copied from where they rest."""

    def __init__(self, store: HostStore, streams: Streams) -> None:
        self._store = store
        self._rings = Rings(streams)
        self._registration = registration = store.registration
        registration.take(streams.pin)
        self._give_back = weakref.finalize(self, registration.give_back)
        if registration.refused:
            logger.warning(
                "%s of %s of experts could not be registered with the device, and are copied on their way",
                format_size(sum(map(len, registration.refused))),
                format_size(sum(map(len, registration.pages))),
            )

    def image(self, transfer: Transfer) -> SlotImage:
        return self._store.image(transfer.key, transfer.part)

    def is_whole(self, transfer: Transfer) -> bool:
        return False

    def read(self, transfer: Transfer, extent: Extent, index: int, skip: int, nbytes: int) -> Tensor:
        name = self.image(transfer).tensors[index].spec.name
        data = self._store.bytes_of(transfer.key, name)[skip : skip + nbytes]
        if self._registration.is_refused(data.data_ptr()):
            return self._rings.room(nbytes).slot(0)[:nbytes].copy_(data)
        return data

    @property
    def is_direct(self) -> bool:
        """Whether all is copied from where it rests: what is not registered the driver stages before it returns."""
        return not self._registration.refused and self._store.lies_together

    def converted(self, transfer: Transfer, slot_bytes: int) -> Converted:
        raise AssertionError("what rests in memory needs no conversion")

    def check(self, transfer: Transfer) -> None:
        pass

    def describe(self, transfer: Transfer) -> str:
        return self._store.describe()

    def close(self) -> None:
        self._give_back()
        self._rings.close()


class DiskSource:
    """Experts at rest in files, read into a ring of host memory. direct: past the page cache."""

    def __init__(self, store: CheckpointStore, streams: Streams, direct: bool) -> None:
        self._store = store
        self._reader = FileReader(store.unchanged, direct)
        self._rings = Rings(streams)

    def image(self, transfer: Transfer) -> SlotImage:
        # As for reads through the page cache: the phase that direct reads have in the file ends in the ring.
        return self._store.image(transfer.key, False, transfer.part)

    def is_whole(self, transfer: Transfer) -> bool:
        return self._store.staged(transfer.key.layer)

    def read(self, transfer: Transfer, extent: Extent, index: int, skip: int, nbytes: int) -> Tensor:
        if transfer.source is None:
            noted = self._reader.check(self.image(transfer).files)
            transfer.source = transfer.source or noted
        room = self._rings.room(nbytes + 2 * PAGE)
        first = self._reader.read(extent.file, extent.offset + skip, nbytes, room.view, 0)
        return room.slot(0)[first : first + nbytes]

    def converted(self, transfer: Transfer, slot_bytes: int) -> Converted:
        slot = self._rings.room(slot_bytes).slot(0)[:slot_bytes]
        return Converted(slot, self._store.convert(transfer.key, self.image(transfer), slot, self._reader))

    def check(self, transfer: Transfer) -> None:
        if not self.is_whole(transfer):
            self._reader.check(self.image(transfer).files, transfer.source)

    def describe(self, transfer: Transfer) -> str:
        first = self.image(transfer).extents[0]
        return f"{first.file} at offset {first.offset}"

    def close(self) -> None:
        self._reader.close()
        self._rings.close()
