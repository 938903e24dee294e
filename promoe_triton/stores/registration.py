"""The host's memory as a device may read it by itself: registered once for all who copy from it."""

from __future__ import annotations

import bisect
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor
from transformers.utils import logging as transformers_logging

from promoe_triton.protocols import PAGE, round_up

Release = Callable[[], None]
Pin = Callable[[int, int], Release | None]
"""From address and bytes of whole pages to what undoes their registration; None where they cannot be registered."""


class Stretch(NamedTuple):
    """Addresses from one that was asked for up to `end`. reads: whether the device reads them by itself."""

    reads: bool
    end: float


class Registration:
    """The whole pages of tensors. The first to take it registers them, the last to give it back undoes that.

    A page that a tensor has in part is left alone: something else may lie there, and a driver refuses every copy of
    memory that is registered in part, whoever asks for it. It refuses to register a page twice as well, and copies of
    a model share their experts' memory. Any thread may ask.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tuple(tensors)  # the memory must outlive its registration
        self._lock = threading.Lock()
        self._users = 0
        self._releases: list[Release] = []
        self.pages = pages_of(tensors)
        self.refused: list[range] = []
        self._registered: list[range] = []

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

    def stretch(self, address: int) -> Stretch:
        """Return how far it is the same as here: that the device reads memory by itself, or that it does not."""
        parts = self._registered
        after = bisect.bisect_right(parts, address, key=lambda part: part.start)
        if after and address < parts[after - 1].stop:
            return Stretch(True, parts[after - 1].stop)
        return Stretch(False, parts[after].start if after < len(parts) else math.inf)

    def _register(self, pin: Pin) -> None:
        try:
            for part in transformers_logging.tqdm(self.pages, desc="Registering experts with the device", leave=False):
                release = pin(part.start, len(part))
                if release is None:
                    self.refused.append(part)
                else:
                    self._releases.append(release)
                    self._registered.append(part)
        except BaseException:
            self._undo()  # an interruption must not leave the experts locked in memory
            raise

    def _undo(self) -> None:
        self.refused.clear()
        self._registered.clear()
        while self._releases:
            self._releases.pop()()


def pages_of(tensors: Iterable[Tensor]) -> list[range]:
    """Return the pages that are the tensors' alone, as ranges of addresses in their order that have none in common."""
    parts: list[range] = []
    for tensor in sorted(tensors, key=Tensor.data_ptr):
        begin = round_up(tensor.data_ptr())
        end = (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE
        if parts and begin < parts[-1].stop:
            parts[-1] = range(parts[-1].start, max(end, parts[-1].stop))
        elif begin < end:
            parts.append(range(begin, end))
    return parts
