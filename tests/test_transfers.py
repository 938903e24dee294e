"""The queue of copies, driven in any legal order: every byte once, in order, and nothing kept for ever."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from promoe_triton.protocols import PAGE, Chunk, ExpertKey, Part, Transfer
from promoe_triton.transfers import URGENT, TransferQueue

KEY = ExpertKey(0, 0)


def start(transfer: Transfer, rank: int) -> bool:
    """Slots for all."""
    transfer.slot = 0
    return True


@dataclass(slots=True, eq=False)
class Expected:
    """What should be known of one transfer; `out` are chunks that have neither landed nor failed.

    touching: the one that all bytes have landed with, until they are put in place.
    """

    transfer: Transfer
    ends: list[int]
    whole: bool
    rank: int
    cursor: int = 0
    landed: int = 0
    out: list[Chunk] = field(default_factory=list)
    again: list[Chunk] = field(default_factory=list)
    stopped: bool = False
    touching: Chunk | None = None
    error: BaseException | None = None

    @property
    def nbytes(self) -> int:
        return self.ends[-1]

    @property
    def waiting(self) -> bool:
        return (self.cursor < self.nbytes or bool(self.again)) and not self.stopped

    @property
    def settled(self) -> bool:
        return not (self.waiting or self.out or self.touching is not None)


class Queue(RuleBasedStateMachine):
    @initialize(overtake=st.booleans())
    def open(self, overtake: bool) -> None:
        self.queue, self.overtake = TransferQueue(overtake), overtake
        self.slots = True  # whether there is one for a transfer that begins
        self.known: list[Expected] = []  # in the order of `push`
        self.gone: list[Transfer] = []
        self.tells_all = False

    def start(self, transfer: Transfer, rank: int) -> bool | None:
        assert transfer.slot == -1
        if self.slots or rank == URGENT:
            transfer.slot = 0
            return True
        return None if self.tells_all else False

    @rule(tells_all=st.booleans())
    def slots_come_and_go(self, tells_all: bool) -> None:
        self.slots, self.tells_all = not self.slots, tells_all
        if self.slots:
            self.queue.reopen()

    def pick(self, data: st.DataObject, among: list[Expected]) -> Expected:
        return among[data.draw(st.integers(0, len(among) - 1))]

    @rule(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=3), whole=st.booleans(), rank=st.integers(URGENT, 2))
    def push(self, sizes: list[int], whole: bool, rank: int) -> None:
        # The same expert again is another transfer.
        transfer = Transfer(key=ExpertKey(rank % 2, 0), part=Part.WHOLE)
        assert transfer not in self.queue
        ends = list(accumulate(sizes))
        self.queue.push(transfer, ends, rank, whole)
        self.known.append(Expected(transfer, ends, whole, rank))

    @rule(budget=st.integers(1, 20), speculative=st.integers(0, 20) | st.none())
    def next_chunk(self, budget: int, speculative: int | None) -> None:
        chunk = self.queue.next_chunk(budget, speculative, self.start)
        ready = [e for e in self.known if e.waiting and (e.cursor or self.slots or e.rank == URGENT)]
        ready = [e for e in ready if e.rank == URGENT or speculative != 0]
        first = min(ready, key=lambda e: (not self.overtake and not e.cursor, e.rank), default=None)
        if first is not None and first.rank != URGENT and speculative is not None:
            budget = min(budget, speculative)
        if first is None:
            assert chunk is None
            return
        assert chunk is not None
        assert chunk.transfer is first.transfer
        if first.again:
            lost = first.again.pop()
            assert (chunk.begin, chunk.end, chunk.speculative) == (lost.begin, lost.end, first.rank != URGENT)
            first.out.append(chunk)
            return
        assert chunk.begin == first.cursor
        if first.whole:
            assert chunk.end == first.nbytes
        else:
            assert 0 < chunk.end - chunk.begin <= budget
            assert chunk.end <= next(end for end in first.ends if end > first.cursor), "a chunk lies in one range"
        first.cursor = chunk.end
        first.out.append(chunk)

    @precondition(lambda self: any(expected.out for expected in self.known))
    @rule(data=st.data())
    def landed(self, data: st.DataObject) -> None:
        expected = self.pick(data, [expected for expected in self.known if expected.out])
        chunk = data.draw(st.sampled_from(expected.out))
        complete = self.queue.landed(chunk)
        expected.out.remove(chunk)
        expected.landed += chunk.end - chunk.begin
        assert complete == (expected.landed == expected.nbytes and not expected.stopped)
        expected.touching = chunk if complete else None

    @precondition(lambda self: any(expected.touching is not None for expected in self.known))
    @rule(data=st.data())
    def finished(self, data: st.DataObject) -> None:
        expected = self.pick(data, [expected for expected in self.known if expected.touching is not None])
        self.queue.finished(expected.transfer)
        expected.touching = None

    @precondition(lambda self: any(expected.touching is not None for expected in self.known))
    @rule(data=st.data())
    def failed_at_last(self, data: st.DataObject) -> None:
        """All bytes are there, and turn out to be wrong: none of them is handed out again, whoever waits by now."""
        expected = self.pick(data, [expected for expected in self.known if expected.touching is not None])
        error = OSError("mine")
        assert expected.touching is not None
        self.queue.failed(expected.touching, error)
        expected.touching, expected.stopped = None, True
        expected.error = expected.error or error

    @precondition(lambda self: any(expected.out for expected in self.known))
    @rule(data=st.data())
    def failed(self, data: st.DataObject) -> None:
        expected = self.pick(data, [expected for expected in self.known if expected.out])
        chunk = data.draw(st.sampled_from(expected.out))
        error = OSError(f"at {chunk.begin}")
        self.queue.failed(chunk, error)
        expected.out.remove(chunk)
        if chunk.speculative and expected.rank == URGENT and not expected.stopped:
            expected.again.append(chunk)
            return
        expected.stopped = True
        expected.error = expected.error or error

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        expected = self.pick(data, self.known)
        self.queue.stop(expected.transfer)
        expected.stopped = True

    @precondition(lambda self: self.known)
    @rule(data=st.data(), rank=st.integers(URGENT, 2))
    def promote(self, data: st.DataObject, rank: int) -> None:
        expected = self.pick(data, self.known)
        if expected.stopped and not expected.out:
            return  # what has settled is pushed anew
        self.queue.promote(expected.transfer, rank)
        expected.rank = rank if expected.stopped else min(expected.rank, rank)
        expected.stopped = expected.error is not None

    @precondition(lambda self: any(expected.settled for expected in self.known))
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        expected = self.pick(data, [expected for expected in self.known if expected.settled])
        self.queue.forget(expected.transfer)
        self.known.remove(expected)
        self.gone.append(expected.transfer)

    @invariant()
    def agrees(self) -> None:
        for expected in self.known:
            assert expected.transfer in self.queue
            assert self.queue.settled(expected.transfer) == expected.settled
            # The first error counts: later ones follow from it.
            assert self.queue.errors.get(expected.transfer) is expected.error
        for transfer in self.gone:
            assert transfer not in self.queue
            assert self.queue.settled(transfer)
        assert len(self.queue.errors) == sum(expected.error is not None for expected in self.known)

    def teardown(self) -> None:
        """Bring all to an end: what is left then would be left for ever."""
        if not hasattr(self, "queue"):
            return
        for expected in self.known:
            self.queue.stop(expected.transfer)
            for chunk in expected.out:
                self.queue.landed(chunk)
            if expected.touching is not None:
                self.queue.finished(expected.transfer)
            assert self.queue.settled(expected.transfer)
            self.queue.forget(expected.transfer)
        assert not self.queue._progress
        assert not self.queue._waiting
        assert not self.queue.errors


TestQueue = cast(Any, Queue).TestCase
TestQueue.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@settings(deadline=None)
@given(
    wanted=st.lists(st.tuples(st.lists(st.integers(1, 60), min_size=1, max_size=3), st.booleans()), min_size=1),
    budgets=st.lists(st.integers(1, 40), min_size=1),
)
def test_each_byte_is_handed_out_once_and_in_order(wanted: list[tuple[list[int], bool]], budgets: list[int]) -> None:
    queue = TransferQueue()
    transfers = [Transfer(key=KEY, part=Part.WHOLE) for _ in wanted]
    for transfer, (sizes, whole) in zip(transfers, wanted, strict=True):
        queue.push(transfer, list(accumulate(sizes)), whole=whole)
    chunks: list[Chunk] = []
    while (chunk := queue.next_chunk(budgets[len(chunks) % len(budgets)], None, start)) is not None:
        chunks.append(chunk)
    for transfer, (sizes, whole) in zip(transfers, wanted, strict=True):
        mine = [chunk for chunk in chunks if chunk.transfer is transfer]
        assert [byte for chunk in mine for byte in range(chunk.begin, chunk.end)] == list(range(sum(sizes)))
        assert len(mine) == 1 or not whole
    assert [chunk.transfer for chunk in chunks] == sorted((chunk.transfer for chunk in chunks), key=transfers.index), (
        "first come, first served"
    )
    done = [chunk.transfer for chunk in chunks if queue.landed(chunk)]
    assert done == transfers
    assert not any(map(queue.settled, transfers)), "a complete transfer counts as in flight until it is finished"
    for transfer in transfers:
        queue.finished(transfer)
    assert all(map(queue.settled, transfers))


def test_a_transfer_pushed_while_another_is_half_out_waits_its_turn() -> None:
    queue = TransferQueue()
    first, second = (Transfer(key=KEY, part=Part.WHOLE) for _ in range(2))
    queue.push(first, [10])
    assert queue.next_chunk(4, None, start) == Chunk(transfer=first, begin=0, end=4)
    queue.push(second, [3])
    out = [queue.next_chunk(4, None, start) for _ in range(4)]
    assert out == [
        Chunk(transfer=first, begin=4, end=8),
        Chunk(transfer=first, begin=8, end=10),
        Chunk(transfer=second, begin=0, end=3),
        None,
    ]


@settings(deadline=None)
@given(pages=st.lists(st.integers(1, 100), min_size=1, max_size=4), budget=st.integers(1, 40))
def test_a_range_is_cut_into_equal_chunks(pages: list[int], budget: int) -> None:
    queue = TransferQueue()
    ends = [PAGE * end for end in accumulate(pages)]
    queue.push(Transfer(key=KEY, part=Part.WHOLE), ends)
    taken = list(iter(lambda: queue.next_chunk(PAGE * budget, None, start), None))
    for end, size in zip(ends, pages, strict=True):
        chunks = [(c.end - c.begin) // PAGE for c in taken if end - PAGE * size <= c.begin < end]
        assert len(chunks) == -(-size // budget), "as few as the budget allows"
        assert max(chunks) - min(chunks) <= 1, "whole pages, as equal as can be"


def test_nothing_more_of_a_stopped_transfer() -> None:
    queue = TransferQueue()
    transfer = Transfer(key=KEY, part=Part.WHOLE)
    queue.push(transfer, [10])
    chunk = queue.next_chunk(4, None, start)
    assert chunk is not None
    queue.stop(transfer)
    assert queue.next_chunk(4, None, start) is None
    assert not queue.settled(transfer), "its first bytes are still in flight"
    assert queue.landed(chunk) is False
    assert queue.settled(transfer)


def test_the_last_bytes_of_a_stopped_transfer_do_not_complete_it() -> None:
    queue = TransferQueue()
    transfer = Transfer(key=KEY, part=Part.WHOLE)
    queue.push(transfer, [10], whole=True)
    chunk = queue.next_chunk(4, None, start)
    assert chunk is not None
    queue.stop(transfer)
    assert queue.landed(chunk) is False
    assert queue.settled(transfer)


@pytest.mark.parametrize("landed", [False, True], ids=["on its way", "as it is put in place"])
def test_what_was_asked_for_ahead_and_fails_once_somebody_waits(landed: bool) -> None:
    """Lost bytes are handed out again; but where all are there, and wrong, whoever waits must be told."""
    queue = TransferQueue()
    transfer = Transfer(key=KEY, part=Part.WHOLE)
    queue.push(transfer, [10], rank=1)
    chunk = queue.next_chunk(10, None, start)
    assert chunk is not None
    queue.promote(transfer, URGENT)
    assert not landed or queue.landed(chunk)
    queue.failed(chunk, OSError("mine"))
    assert queue.ended([transfer]) == ([transfer] if landed else [])
    assert queue.next_chunk(10, None, start) == (None if landed else Chunk(transfer, 0, 10))


def test_transfers_are_told_apart_by_identity() -> None:
    one, other = (Transfer(key=KEY, part=Part.WHOLE) for _ in range(2))
    queue = TransferQueue()
    queue.push(one, [1])
    assert one in queue
    assert other not in queue
    with pytest.raises(KeyError):
        queue.forget(other)


def pushed(queue: TransferQueue, *ranks: int) -> list[Transfer]:
    """Two pages of a layer by rank each."""
    transfers = [Transfer(key=ExpertKey(rank, i), part=Part.WHOLE) for i, rank in enumerate(ranks)]
    for transfer, rank in zip(transfers, ranks, strict=True):
        queue.push(transfer, [2 * PAGE], rank)
    return transfers


def handed_out(queue: TransferQueue, start: Any = start, speculative: int | None = None) -> Transfer | None:
    chunk = queue.next_chunk(PAGE, speculative, start)
    return None if chunk is None else chunk.transfer


def test_what_is_promoted_comes_at_once() -> None:
    queue = TransferQueue()
    first, second = pushed(queue, 1, 2)
    assert handed_out(queue) is first
    queue.promote(second, URGENT)
    assert [handed_out(queue) for _ in range(4)] == [second, second, first, None]


def test_what_could_not_start_may_once_it_is_urgent() -> None:
    def urgent_only(transfer: Transfer, rank: int) -> bool:
        return rank == URGENT

    queue = TransferQueue()
    (only,) = pushed(queue, 1)
    assert handed_out(queue, urgent_only) is None
    queue.promote(only, URGENT)
    assert handed_out(queue, urgent_only) is only


def test_what_has_begun_comes_first_where_nothing_overtakes() -> None:
    queue = TransferQueue(overtake=False)
    first, second = pushed(queue, 1, 2)
    assert handed_out(queue, lambda transfer, rank: transfer is second) is second
    assert [handed_out(queue) for _ in range(3)] == [second, first, first]


def test_without_a_budget_for_it_speculation_waits_and_with_one_it_goes_on() -> None:
    queue = TransferQueue()
    (ahead,) = pushed(queue, 1)
    assert handed_out(queue, speculative=0) is None
    assert handed_out(queue) is ahead


@pytest.mark.parametrize(("answer", "asked"), [(False, [0, 1, 2, 3]), (None, [0, 2])])
def test_a_layer_that_lets_nothing_start_is_not_asked_again(answer: bool | None, asked: list[int]) -> None:
    found = []

    def refuse(transfer: Transfer, rank: int) -> bool | None:
        found.append(transfer.key.expert)
        return answer

    queue = TransferQueue()
    pushed(queue, 1, 1, 2, 2)
    for _ in range(2):
        assert handed_out(queue, refuse) is None
    assert found == asked, "and none at all before something has changed"
    queue.reopen()
    assert handed_out(queue, refuse) is None
    assert found == asked * 2
