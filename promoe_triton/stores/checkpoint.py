"""Experts at rest in safetensors files, read one at a time."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from promoe_triton.memory import SlotMemory
from promoe_triton.protocols import PAGE, ExpertKey, ExpertSpec, ExpertTensors, Part, round_up
from promoe_triton.stores.conversion import ParameterSource
from promoe_triton.stores.image import Piece, SlotImage, slot_image
from promoe_triton.stores.reader import FileReader
from promoe_triton.stores.safetensors_files import Unchanged


class CheckpointStore:
    """The checkpoint a model came from, or a spool written in the same form.

    sources: for each layer, the source of each of its expert tensors by name.
    """

    def __init__(
        self,
        specs: Sequence[ExpertSpec],
        sources: Sequence[Mapping[str, ParameterSource]],
        description: str,
    ) -> None:
        self._specs = tuple(specs)
        self._sources = tuple(sources)
        self._description = description
        files = {ref.file for layer in sources for s in layer.values() for refs in s.refs.values() for ref in refs}
        self.unchanged = Unchanged(sorted(files))
        self._staged = [not all(source.plain for source in layer.values()) for layer in self._sources]
        self._images: dict[tuple[ExpertKey, bool, Part], SlotImage] = {}
        self._staging: SlotMemory | None = None
        self._staging_lock = threading.Lock()

    @property
    def specs(self) -> Sequence[ExpertSpec]:
        return self._specs

    @property
    def files(self) -> list[Path]:
        return list(self.unchanged.files)

    def describe(self) -> str:
        return self._description

    def staged(self, layer: int) -> bool:
        """Whether this layer's experts must be converted on their way into a slot."""
        return self._staged[layer]

    def image(self, key: ExpertKey, direct: bool, part: Part = Part.WHOLE) -> SlotImage:
        """Lay out one expert in a slot. A staged expert's tensors are at rest nowhere: they have no extents."""
        if (known := self._images.get((key, direct, part))) is None:
            known = self._image(key, direct) if part == Part.WHOLE else self.image(key, direct).of(part)
            self._images[key, direct, part] = known
        return known

    def _image(self, key: ExpertKey, direct: bool) -> SlotImage:
        spec = self._specs[key.layer]
        staged = self.staged(key.layer)
        pieces: dict[str, Sequence[Piece]] = {
            tensor.name: [Piece(nbytes=tensor.nbytes)]
            if staged
            else self._sources[key.layer][tensor.name].pieces(key.expert)
            for tensor in spec.tensors
            if key.expert < self._sources[key.layer][tensor.name].experts
        }
        return slot_image(spec, pieces, direct and not staged)

    def position(self, key: ExpertKey) -> tuple[Path, int]:
        """Return where an expert begins, so that many can be read in the order of the files."""
        share = next(iter(self._sources[key.layer].values())).shares(key.expert)
        return min((ref.file, ref.offset) for ref in share.values())

    def slot_bytes(self, layer: int, experts: int) -> int:
        """Return the room that the layer's most demanding expert needs, read in whichever way."""
        if self.staged(layer):
            experts = 1
        images = (self.image(ExpertKey(layer, e), direct) for e in range(experts) for direct in (False, True))
        return round_up(max(image.slot_bytes for image in images))

    def convert(self, key: ExpertKey, image: SlotImage, slot: Tensor, reader: FileReader) -> int:
        """Read one expert's tensors through the staging buffer, convert them and write them into the slot.

        Returns the bytes read. One expert at a time, whatever the number of threads.
        """
        moved = 0
        with self._staging_lock:
            for target in image.tensors:
                source = self._sources[key.layer][target.spec.name]
                shares = source.shares(key.expert)
                staging = self._stage(sum(round_up(ref.nbytes) + 2 * PAGE for ref in shares.values()))
                tensors, start = {}, 0
                for pattern, ref in shares.items():
                    place = {ref.file: ref.offset}
                    known = reader.check(place)
                    first = reader.read(ref.file, ref.offset, ref.nbytes, staging.view, start)
                    reader.check(place, known)
                    raw = staging.slot(0)[first : first + ref.nbytes]
                    if first % ref.dtype.itemsize:
                        raw = raw.clone()  # a view must begin at a multiple of the dtype's size
                    tensors[pattern] = raw.view(ref.dtype).view(ref.shape)
                    start = round_up(first + ref.nbytes)
                    moved += ref.nbytes
                view = target.view(slot)
                view.copy_(source.convert(tensors).reshape(view.shape))
        return moved

    def _stage(self, nbytes: int) -> SlotMemory:
        if self._staging is None or self._staging.slot_bytes < nbytes:
            self._staging = SlotMemory(1, nbytes)
        return self._staging

    def load(self, key: ExpertKey) -> ExpertTensors:
        image = self.image(key, direct=False)
        slot = SlotMemory(1, image.slot_bytes)
        with FileReader(self.unchanged, direct=False) as reader:
            if self.staged(key.layer):
                self.convert(key, image, slot.slot(0), reader)
            else:
                known = reader.check(image.files)
                for extent in image.extents:
                    reader.read_into(extent.file, extent.offset, extent.nbytes, slot.view, extent.slot_offset)
                reader.check(image.files, known)
        return image.views(slot.slot(0))


def apply_moves(image: SlotImage, slot: Tensor) -> None:
    """Move what landed elsewhere to where the tensors begin."""
    if not image.moves:
        return
    base = slot.data_ptr()
    for move in image.moves:
        ctypes.memmove(base + move.target, base + move.source, move.nbytes)


def same_tensors(store: CheckpointStore, key: ExpertKey, expected: ExpertTensors) -> bool:
    """Whether the store's expert equals `expected` bit for bit."""
    loaded = store.load(key)
    return all(
        torch.equal(loaded[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
        for name, tensor in expected.items()
    )
