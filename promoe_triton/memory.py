"""Memory of slots: one anonymous, page-aligned mapping, cut into equal slots."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from promoe_triton.protocols import PAGE, round_up


class SlotMemory:
    """`slots` places of `slot_bytes` each. Pages are taken from the system when they are first written."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = round_up(slot_bytes)
        self._map = mmap.mmap(-1, max(slots * self.slot_bytes, PAGE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if slots * self.slot_bytes >= 2**21 and hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._map)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def slot(self, index: int) -> Tensor:
        """Return slot `index` as uint8 [slot_bytes], a view."""
        start = index * self.slot_bytes
        return self._bytes[start : start + self.slot_bytes]
