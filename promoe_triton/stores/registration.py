"""The host's memory as a device may read it by itself: registered once for all who copy from it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor
from transformers.utils import logging as transformers_logging

from promoe_triton.protocols import PAGE, round_up

LARGE = 1 << 25
"""Bytes from which on an allocator takes pages of their own for a storage: glibc's never learns a larger bound."""

Release = Callable[[], None]
Pin = Callable[[int, int], Release | None]
"""From address and bytes of whole pages to what undoes their registration; None where they cannot be registered."""


class Registration:
    """The large storages of tensors. The first to take it registers them, the last to give it back undoes that.

    A driver refuses every copy of memory that is registered in part, whoever asks for it. So it is all of a storage or
    nothing, with the pages on which it begins and ends, and only where nothing else can lie on these. It refuses to
    register a page twice as well, and copies of a model share their experts' memory. Any thread may ask.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tuple(tensors)  # the memory must outlive its registration
        self._lock = threading.Lock()
        self._users = 0
        self._releases: list[Release] = []
        self.pages = pages_of(tensors)
        self.refused: list[range] = []

    def take(self, pin: Pin) -> None:
        """Register the pages, unless that has been done; `refused` has those that cannot be."""
        with self._lock:
            if not self._users:
                self._register(pin)
            self._users += 1

    def give_back(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._undo()

    def is_refused(self, address: int) -> bool:
        """Whether this address could not be registered, though it should: others may have registered a part."""
        return any(address in part for part in self.refused)

    def _register(self, pin: Pin) -> None:
        try:
            for part in transformers_logging.tqdm(self.pages, desc="Registering experts with the device", leave=False):
                release = pin(part.start, len(part))
                if release is None:
                    self.refused.append(part)
                else:
                    self._releases.append(release)
        except BaseException:
            self._undo()  # an interruption must not leave the experts locked in memory
            raise

    def _undo(self) -> None:
        self.refused.clear()
        while self._releases:
            self._releases.pop()()


def pages_of(tensors: Iterable[Tensor]) -> list[range]:
    """Return the pages on which the tensors' large storages lie, as ranges of addresses that have none in common."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in map(Tensor.untyped_storage, tensors)}
    parts: list[range] = []
    for address, nbytes in sorted(storages.items()):
        begin, end = address // PAGE * PAGE, round_up(address + nbytes)
        if nbytes < LARGE:
            continue
        if parts and begin < parts[-1].stop:
            parts[-1] = range(parts[-1].start, max(end, parts[-1].stop))
        else:
            parts.append(range(begin, end))
    return parts
