"""Memory that is no file's: slots in anonymous, page-aligned mappings, and copies of weights that lie in files."""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from promoe_triton.protocols import PAGE, round_up

ALIGN = 64
"""Bytes; no operation looks at the alignment of its operands beyond that."""

_NO_FILES = ("/dev/", "/memfd:", "/SYSV")
"""What shared memory is called where a mapping's file is named."""


class Slots(Protocol):
    """Memory cut into places for one expert each."""

    @property
    def slot_bytes(self) -> int: ...

    def slot(self, index: int) -> Tensor:
        """Return slot `index` as uint8 [slot_bytes], a view."""
        ...


class DeviceMemory:
    """Slots in the memory of a device."""

    def __init__(self, slots: int, slot_bytes: int, device: torch.device) -> None:
        self.slots = slots
        self.slot_bytes = round_up(slot_bytes)
        # Threads write to it that know nothing of the mode in which it was made.
        with torch.inference_mode(False):
            self._bytes = torch.empty(slots * self.slot_bytes, dtype=torch.uint8, device=device)

    def slot(self, index: int) -> Tensor:
        start = index * self.slot_bytes
        return self._bytes[start : start + self.slot_bytes]


class SlotMemory:
    """`slots` places of `slot_bytes` each. Pages are taken from the system when they are first written."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = round_up(slot_bytes)
        self._map = mmap.mmap(-1, max(slots * self.slot_bytes, PAGE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if slots * self.slot_bytes >= 2**21 and hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._map)
        with torch.inference_mode(False):
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def slot(self, index: int) -> Tensor:
        """Return slot `index` as uint8 [slot_bytes], a view."""
        start = index * self.slot_bytes
        return self._bytes[start : start + self.slot_bytes]


def in_files(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors whose memory is a mapped file's, as transformers' loader leaves them; each object once.

    They change when the file does, end the process when it is truncated, and give no memory back when they go.
    """
    ranges = sorted(_mapped_files())
    begins = [begin for begin, _ in ranges]

    def is_mapped(tensor: Tensor) -> bool:
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or not tensor.nbytes:
            return False
        index = bisect.bisect_right(begins, tensor.data_ptr()) - 1
        return index >= 0 and tensor.data_ptr() < ranges[index][1]

    return [tensor for tensor in {id(tensor): tensor for tensor in tensors}.values() if is_mapped(tensor)]


def _mapped_files() -> Iterable[tuple[int, int]]:
    """Return begin and end of every address range of this process that is (private or shared) pages of a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, _, *names = line.split(maxsplit=5)
        if names and names[0].startswith("/") and not names[0].startswith(_NO_FILES):
            begin, end = addresses.split("-")
            yield int(begin, 16), int(end, 16)


def own_memory(tensors: Iterable[Tensor]) -> None:
    """Copy the data of tensors to memory of their own, one after the other; the objects stay.

    Tensors with the same data go on sharing them, and all keep their strides and their alignment, so that products
    round as they did.
    """
    same: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        same.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), []).append(tensor)
    for sharing in same.values():
        data = sharing[0].data
        extent = 1 + sum((n - 1) * stride for n, stride in zip(data.shape, data.stride(), strict=True))
        nbytes = extent * data.itemsize
        room = torch.empty(nbytes + 2 * ALIGN, dtype=torch.uint8)
        first = (data.data_ptr() - room.data_ptr()) % ALIGN
        copied = room[first : first + nbytes].view(data.dtype).copy_(data.as_strided((extent,), (1,)))
        for tensor in sharing:
            tensor.data = copied.as_strided(data.shape, data.stride())
