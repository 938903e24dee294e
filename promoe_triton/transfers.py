"""What is to be copied, in which order, and what has become of it. Pure: no threads, no clock, no I/O."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from promoe_triton.protocols import Chunk, Transfer, round_up


@dataclass(slots=True)
class _Progress:
    ends: Sequence[int]
    whole: bool
    cursor: int = 0
    landed: int = 0
    in_flight: int = 0
    stopped: bool = False

    @property
    def nbytes(self) -> int:
        return self.ends[-1]


class TransferQueue:
    """A feed of chunks, first come, first served.

    A transfer stays known from `push` until `forget`; what it still has in flight is counted.
    """

    def __init__(self) -> None:
        self._progress: dict[Transfer, _Progress] = {}
        self._waiting: OrderedDict[Transfer, None] = OrderedDict()
        self.errors: dict[Transfer, BaseException] = {}

    def __contains__(self, transfer: Transfer) -> bool:
        return transfer in self._progress

    def push(self, transfer: Transfer, ends: Sequence[int], whole: bool = False) -> None:
        """Queue a transfer of so many bytes as its last end says.

        No chunk goes past an end (where one range of a file is followed by another), except that `whole` ones are
        handed out as a single chunk.
        """
        self._progress[transfer] = _Progress(ends, whole)
        self._waiting[transfer] = None

    def next_chunk(self, budget: int) -> Chunk | None:
        if not self._waiting:
            return None
        transfer = next(iter(self._waiting))
        progress = self._progress[transfer]
        begin = progress.cursor
        if progress.whole:
            end = progress.nbytes
        else:
            left = progress.ends[bisect.bisect_right(progress.ends, begin)] - begin
            # Chunks of equal size: a small last one costs nearly as much as a large one.
            end = begin + min(left, budget, round_up(ceil(left / ceil(left / budget))))
        progress.cursor = end
        progress.in_flight += 1
        if end == progress.nbytes:
            del self._waiting[transfer]
        return Chunk(transfer=transfer, begin=begin, end=end)

    def landed(self, chunk: Chunk) -> bool:
        progress = self._progress[chunk.transfer]
        progress.landed += chunk.end - chunk.begin
        complete = progress.landed == progress.nbytes and not progress.stopped
        if not complete:
            progress.in_flight -= 1
        return complete

    def finished(self, transfer: Transfer) -> None:
        self._progress[transfer].in_flight -= 1

    def failed(self, chunk: Chunk, error: BaseException) -> None:
        self._progress[chunk.transfer].in_flight -= 1
        self.errors.setdefault(chunk.transfer, error)
        self.stop(chunk.transfer)

    def stop(self, transfer: Transfer) -> None:
        """Hand out no further chunk of this transfer."""
        self._progress[transfer].stopped = True
        self._waiting.pop(transfer, None)

    def stopped(self, transfer: Transfer) -> bool:
        return self._progress[transfer].stopped

    def settled(self, transfer: Transfer) -> bool:
        """Whether nothing of this transfer is in flight or will be."""
        progress = self._progress.get(transfer)
        return progress is None or (progress.in_flight == 0 and transfer not in self._waiting)

    def forget(self, transfer: Transfer) -> None:
        """Drop all that is known of a settled transfer."""
        del self._progress[transfer]
        self.errors.pop(transfer, None)
