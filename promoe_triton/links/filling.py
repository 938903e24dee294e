"""From the store's bytes to tensors in a slot: what every link does with a chunk, whatever decides when."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Protocol

from promoe_triton.errors import PromoeError
from promoe_triton.memory import SlotMemory, Slots
from promoe_triton.protocols import Chunk, Cuts, ExpertKey, ExpertTensors, Feed, R, Transfer
from promoe_triton.stores.checkpoint import CheckpointStore, apply_moves
from promoe_triton.stores.image import SlotImage
from promoe_triton.stores.reader import FileReader


def ended(feed: Feed, transfers: Sequence[Transfer]) -> list[Transfer]:
    """Return those of these transfers that have arrived. Raises PromoeError where one of them has failed."""
    arrived = feed.ended(transfers)
    for transfer in arrived:
        if (error := feed.error(transfer)) is not None:
            raise PromoeError(f"{transfer.name} could not be read: {error}") from error
    return arrived


def taken(arrivals: dict[ExpertKey, R], keys: Iterable[ExpertKey]) -> dict[ExpertKey, R]:
    """Take those of these experts out that have arrived."""
    if not arrivals:
        return {}
    return {key: arrival for key in keys if (arrival := arrivals.pop(key, None)) is not None}


def nothing_came(filler: Filler, transfers: Sequence[Transfer], timeout: float) -> PromoeError:
    """Return the error of a wait for these transfers that was given up after so many seconds."""
    return PromoeError(
        f"no byte arrived for {timeout:g} s while waiting for {transfers[0].name} from {filler.source(transfers[0])}"
    )


class Filler(Protocol):
    """What a link copies with."""

    def cuts(self, transfer: Transfer) -> Cuts:
        """Say how the bytes of a transfer may be cut into chunks."""
        ...

    def source(self, transfer: Transfer) -> str:
        """Say where a transfer's bytes come from."""
        ...

    def copy(self, chunk: Chunk) -> int:
        """Copy one chunk into its transfer's slot; return the bytes moved."""
        ...

    def finish(self, transfer: Transfer) -> ExpertTensors:
        """Put the last bytes of a complete transfer in place; return its tensors, views of the slot."""
        ...

    def fence(self, layer: int, slots: Iterable[int] | None) -> None:
        """See `Link.fence`."""
        ...

    def close(self) -> None: ...


class Views:
    """The tensors of slots, as experts lie in them; most experts of a layer lie just as the one before them did."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, int], tuple[object, ExpertTensors]] = {}

    def of(self, image: SlotImage, memory: Slots, slot: int) -> ExpertTensors:
        places, tensors = self._last.get((id(memory), slot), (None, {}))
        if places != image.places:
            places, tensors = image.places, image.views(memory.slot(slot))
            self._last[id(memory), slot] = places, tensors
        return tensors


class SlotFiller:
    """Reads chunks of experts from a checkpoint into the slots of their layers. Any thread may use it.

    direct: past the page cache.
    """

    def __init__(self, store: CheckpointStore, memory_of_layer: Sequence[SlotMemory], direct: bool) -> None:
        self._store = store
        self._memory_of_layer = memory_of_layer
        self._reader = FileReader(store.unchanged, direct)
        self._views = Views()

    def image(self, transfer: Transfer) -> SlotImage:
        return self._store.image(transfer.key, self._reader.direct, transfer.part)

    def cuts(self, transfer: Transfer) -> Cuts:
        """Cut where one range of the source follows another; what is converted on its way comes whole."""
        return Cuts(ends=self.image(transfer).ends, whole=self._store.staged(transfer.key.layer))

    def source(self, transfer: Transfer) -> str:
        first = self.image(transfer).extents[0]
        return f"{first.file} at offset {first.offset}"

    def copy(self, chunk: Chunk) -> int:
        transfer, reader = chunk.transfer, self._reader
        image, memory = self.image(transfer), self._memory_of_layer[transfer.key.layer]
        if self._store.staged(transfer.key.layer):
            return self._store.convert(transfer.key, image, memory.slot(transfer.slot), reader)
        if transfer.source is None:
            noted = reader.check(image.files)
            transfer.source = transfer.source or noted
        begin = chunk.begin
        while begin < chunk.end:
            index = bisect.bisect_right(image.ends, begin)
            extent = image.extents[index]
            skip = begin - (image.ends[index] - extent.nbytes)
            nbytes = min(chunk.end, image.ends[index]) - begin
            reader.read_into(
                extent.file,
                extent.offset + skip,
                nbytes,
                memory.view,
                transfer.slot * memory.slot_bytes + extent.slot_offset + skip,
                needed=min(nbytes, extent.needed - skip),
            )
            begin += nbytes
        return chunk.end - chunk.begin

    def finish(self, transfer: Transfer) -> ExpertTensors:
        image, memory = self.image(transfer), self._memory_of_layer[transfer.key.layer]
        if not self._store.staged(transfer.key.layer):
            self._reader.check(image.files, transfer.source)
            apply_moves(image, memory.slot(transfer.slot))
        return self._views.of(image, memory, transfer.slot)

    def fence(self, layer: int, slots: Iterable[int] | None) -> None:
        """Nothing to do: a product over RAM is done when its call returns."""

    def close(self) -> None:
        self._reader.close()
