"""What is to be copied, in which order, and what has become of it. Pure: no threads, no clock, no I/O."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import filterfalse
from math import ceil, inf

from promoe_triton.protocols import Chunk, Transfer, round_up

URGENT = 0
"""The rank of what a layer waits for. Speculation ranks by its deadline, a positive number: the sooner, the lower."""


@dataclass(slots=True)
class _Progress:
    ends: Sequence[int]
    nbytes: int
    whole: bool
    rank: int
    order: int
    cursor: int = 0
    landed: int = 0
    in_flight: int = 0
    stopped: bool = False
    again: list[Chunk] = field(default_factory=list)

    @property
    def handed_out(self) -> bool:
        return self.cursor == self.nbytes and not self.again


def _urgency(item: tuple[Transfer, _Progress]) -> tuple[int, int]:
    return item[1].rank, item[1].order


def _begun_first(item: tuple[Transfer, _Progress]) -> tuple[bool, int, int]:
    return not item[1].cursor, item[1].rank, item[1].order


class TransferQueue:
    """A feed of chunks: the lowest rank first, first come, first served among equals.

    Overtaking is nothing but asking again: a transfer that is passed over keeps its cursor and goes on from there.
    A transfer stays known from `push` until `forget`; what it still has in flight is counted.
    overtake: whether what is more urgent may pass a transfer that has begun; else that one is copied to its end first.
    """

    def __init__(self, overtake: bool = True) -> None:
        self._overtake = overtake
        self._pushed = 0
        self._progress: dict[Transfer, _Progress] = {}
        self._waiting: dict[Transfer, _Progress] = {}
        # Those waiting, the most urgent last, with some that do not wait any more; None: in another order by now.
        self._sorted: list[tuple[Transfer, _Progress]] | None = []
        # Up to which rank nothing could be handed out when last asked, and nothing has changed since.
        self._idle: float = -1
        self.errors: dict[Transfer, BaseException] = {}

    def __contains__(self, transfer: Transfer) -> bool:
        return transfer in self._progress

    def __len__(self) -> int:
        return len(self._progress)

    def __iter__(self) -> Iterator[Transfer]:
        """All transfers known, in the order they came."""
        return iter(self._progress)

    @property
    def backlog(self) -> int:
        """How many transfers have bytes that were not handed out yet."""
        return len(self._waiting)

    def push(self, transfer: Transfer, ends: Sequence[int], rank: int = URGENT, whole: bool = False) -> None:
        """Queue a transfer of so many bytes as its last end says.

        No chunk goes past an end (where one range of a file is followed by another), except that `whole` ones are
        handed out as a single chunk.
        """
        self._progress[transfer] = progress = _Progress(ends, ends[-1], whole, rank, self._pushed)
        self._pushed += 1
        self._wait(transfer, progress)

    def _wait(self, transfer: Transfer, progress: _Progress) -> None:
        self._waiting[transfer] = progress
        self._sorted = None
        self.reopen()

    def reopen(self) -> None:
        """What could not start may start now."""
        self._idle = -1

    def next_chunk(
        self, budget: int, speculative_budget: int | None, start: Callable[[Transfer, int], bool | None]
    ) -> Chunk | None:
        """Hand out at most `budget` bytes of the most urgent transfer; of speculation, at most its own budget.

        No speculation is handed out where its budget is 0.

        start: takes a slot for a transfer of some rank whose first chunk comes next; False where that cannot be now,
            None where no other of its layer and of this rank or a later one could start either.
        """
        asked = URGENT if speculative_budget == 0 else inf
        if asked <= self._idle:
            return None
        waiting, order = self._waiting, self._sorted
        if order is None:
            key = _urgency if self._overtake else _begun_first
            order = self._sorted = sorted(waiting.items(), key=key, reverse=True)
        while order and order[-1][0] not in waiting:
            order.pop()
        shut = set()
        for transfer, progress in reversed(order):
            most = budget
            if speculative_budget is not None and progress.rank != URGENT:
                most = min(budget, speculative_budget)
            # `start` may have stopped another one to make room.
            if not most or transfer not in waiting or (not progress.cursor and transfer.key.layer in shut):
                continue
            started = True if progress.cursor else start(transfer, progress.rank)
            if started:
                return self._cut(transfer, progress, most)
            if started is None:
                shut.add(transfer.key.layer)
        self._idle = asked
        return None

    def _cut(self, transfer: Transfer, progress: _Progress, budget: int) -> Chunk:
        begin = progress.cursor
        if progress.again:
            failed = progress.again.pop()
            begin, end = failed.begin, failed.end
        else:
            end = progress.nbytes
            if not progress.whole:
                end = progress.ends[bisect_right(progress.ends, begin)]
                if (left := end - begin) > budget:
                    # Chunks of equal size: a small last one costs nearly as much as a large one.
                    end = begin + min(budget, round_up(ceil(left / ceil(left / budget))))
            if not begin and not self._overtake:
                self._sorted = None
            progress.cursor = end
        progress.in_flight += 1
        if progress.cursor == progress.nbytes and not progress.again:
            del self._waiting[transfer]
        return Chunk(transfer, begin, end, progress.rank != URGENT)

    def landed(self, chunk: Chunk) -> bool:
        progress = self._progress[chunk.transfer]
        progress.landed += chunk.end - chunk.begin
        if progress.landed == progress.nbytes and not progress.stopped:
            return True
        progress.in_flight -= 1
        return False

    def finished(self, transfer: Transfer) -> None:
        self._progress[transfer].in_flight -= 1

    def failed(self, chunk: Chunk, error: BaseException) -> None:
        """Stop a transfer for this error; but what failed while nobody waited for it is handed out once more.

        Unless all bytes have landed: then it failed as they were put in place, which is not done twice.
        """
        progress = self._progress[chunk.transfer]
        progress.in_flight -= 1
        is_lost = progress.landed < progress.nbytes
        if is_lost and chunk.speculative and progress.rank == URGENT and not progress.stopped:
            progress.again.append(chunk)
            self._wait(chunk.transfer, progress)
            return
        self.errors.setdefault(chunk.transfer, error)
        self.stop(chunk.transfer)

    def ended(self, transfers: Iterable[Transfer]) -> list[Transfer]:
        """Return those of these transfers that are not known any more, or have failed."""
        known, errors = self._progress, self.errors
        if not errors:
            return [*filterfalse(known.__contains__, transfers)]  # of a prompt there are many
        return [transfer for transfer in transfers if transfer not in known or transfer in errors]

    def rank(self, transfer: Transfer) -> int:
        return self._progress[transfer].rank

    def promote(self, transfer: Transfer, rank: int) -> None:
        """Give a transfer a lower rank; one that was stopped while it had chunks in flight goes on with this one."""
        progress = self._progress[transfer]
        rank = rank if progress.stopped else min(progress.rank, rank)
        if rank != progress.rank:
            progress.rank, self._sorted = rank, None
            self.reopen()
        if progress.stopped and transfer not in self.errors:
            progress.stopped = False
            self.reopen()
            if not progress.handed_out:
                self._wait(transfer, progress)

    def stop(self, transfer: Transfer) -> None:
        """Hand out no further chunk of this transfer."""
        self._progress[transfer].stopped = True
        self._waiting.pop(transfer, None)

    def stopped(self, transfer: Transfer) -> bool:
        return self._progress[transfer].stopped

    def begun(self, transfer: Transfer) -> int:
        """Bytes that were handed out."""
        return self._progress[transfer].cursor

    def left(self, transfer: Transfer) -> int:
        """Bytes that were not handed out yet, or have to be once more."""
        progress = self._progress[transfer]
        return progress.nbytes - progress.cursor + sum(chunk.end - chunk.begin for chunk in progress.again)

    def complete(self, transfer: Transfer) -> bool:
        progress = self._progress[transfer]
        return progress.landed == progress.nbytes

    def settled(self, transfer: Transfer) -> bool:
        """Whether nothing of this transfer is in flight or will be."""
        progress = self._progress.get(transfer)
        return progress is None or (progress.in_flight == 0 and transfer not in self._waiting)

    def forget(self, transfer: Transfer) -> None:
        """Drop all that is known of a settled transfer."""
        del self._progress[transfer]
        self.errors.pop(transfer, None)
