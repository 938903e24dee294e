"""What is copied next, where to and in place of what. Decisions only, from events to the next piece of work.

Pure and deterministic: no device, thread, clock or I/O, so that a real link, a simulator and a property test drive
the same code. One method at a time may run; whoever drives it sees to that (links hold a lock).

A layer tells which experts it needs when its gate is done (`gate`), asks for them (`ask`), and gives back what it
no longer needs (`release`, `discard`). The link asks for chunks and tells what became of them. A predictor's ranking
comes in by `predict` and becomes speculation: transfers that rank behind everything a layer waits for, by the layer
they are for. Positions count layers since the start: layer l of pass p is at p * layers + l + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from promoe_triton.admission import Admission, places
from promoe_triton.config import Config
from promoe_triton.protocols import Chunk, Cuts, ExpertKey, Part, Transfer, expert_key
from promoe_triton.slots import SlotTable
from promoe_triton.techniques import Technique
from promoe_triton.transfers import URGENT, TransferQueue
from promoe_triton.trial import GhostCache

STREAM_BUFFERS = 2
"""Slots that experts pass through when a call needs more of them than there are slots."""


@dataclass(slots=True, kw_only=True)
class Needs:
    """The experts of one call: resident ones (leased), those that will stay, and those that pass through.

    Those that pass through are copied half by half, so that every byte is still copied once. leaving: resident ones
    that are to be discarded after the call. dropped: those on their way that were expected, and are not needed.
    """

    resident: list[ExpertKey]
    missing: list[ExpertKey]
    streamed: list[ExpertKey]
    leaving: list[ExpertKey]
    dropped: list[ExpertKey]


@dataclass(slots=True)
class Tally:
    """What became of what was copied ahead for a layer, in experts and bytes.

    on_time, late: the layer needed them, and they were there, or still on their way. dropped: it did not, and their
    copy was given up. evicted: they left their slots before anybody needed them. All others of those issued have yet
    to prove themselves. copied, useful: bytes copied ahead, and those of them that the layer then needed; unproven:
    those that may still be needed. late_copied: of the useful ones, those of experts that were late.
    """

    issued: int = 0
    on_time: int = 0
    late: int = 0
    dropped: int = 0
    evicted: int = 0
    copied: int = 0
    useful: int = 0
    unproven: int = 0
    late_copied: int = 0


@dataclass(frozen=True, slots=True)
class _Expected:
    """What is expected before a position (inf: at all). by_layer: at which position each expert is."""

    by_layer: Sequence[Mapping[ExpertKey, int]]
    before: float

    def __contains__(self, key: Any) -> bool:
        position: float = self.by_layer[key.layer].get(key, inf)
        return position < self.before


class Core:
    """Slots, transfers and speculation of one model.

    tables: the slot table of each layer; layers may share one. cuts: how a transfer may be cut into chunks.
    overtake: what is more urgent passes a copy that has begun, between two chunks (paper: chunked prefetching).
    preempt: drop what a layer was expected to need, and does not, when its gate is done (early preemption).
    reorder: ready experts come first, and stay; else experts are taken in the order they are given, and (unless `pins`)
        each that is missing pushes out the one that was used least recently: maybe one that comes after it, and where
        there are more than there are slots, the first of the call, so that the next such call finds none of its own.
    pins: what is in slots when a call begins stays until its end, also without reordering: the policy says for good who
        belongs there, and what is missing passes through what is left.
    ghosts: count in `absent` what LRU caches of as many slots would miss, which nothing copied ahead can change (for
        `Trial`).
    """

    def __init__(
        self,
        tables: Sequence[SlotTable],
        cuts: Callable[[Transfer], Cuts],
        *,
        overtake: bool = True,
        preempt: bool = True,
        reorder: bool = True,
        pins: bool = False,
        ghosts: bool = False,
    ) -> None:
        self.tables = tables
        self.queue = TransferQueue(overtake)
        self.admission = Admission()
        self._tallies = [Tally() for _ in tables]
        self.position = 0
        self.absent = 0
        self._ghosts = {table: GhostCache(len(table)) for table in {*tables}} if ghosts else {}
        self._cuts = cuts
        self._preempt = preempt
        self._reorder = reorder
        self._pins = reorder or pins
        self._on_way: dict[ExpertKey, Transfer] = {}
        # By layer: at which position each expert is expected.
        self._expected: list[dict[ExpertKey, int]] = [{} for _ in tables]
        # Copied ahead and not needed yet, with the bytes that were.
        self._unproven: dict[ExpertKey, int] = {}
        # Needed while still on its way, with the bytes that came ahead and count as useful unless the copy is given up.
        self._late: dict[ExpertKey, int] = {}
        # Tables that have no slot for what has this rank or a later one, until something there may leave.
        self._closed: dict[SlotTable, int] = {}
        # By layer: what its last gate needed, but will not soon need again.
        self._cold: list[set[ExpertKey]] = [set() for _ in tables]

    # What a layer tells.

    def gate(self, layer: int, experts: Iterable[int], recent: Sequence[int] | None = None) -> Needs:
        """Layer `layer` needs these experts now: lease those that are resident, drop what was expected in vain.

        recent: those of them that count as used, in their order, as often as they were (None: all, once); the others
            come last in the order of recency.
        """
        table = self.tables[layer]
        keys = [expert_key(layer, expert) for expert in experts]
        if self._ghosts:
            self.absent += self._ghosts[table].misses(keys)
        self._advance(layer)
        self._reopen(table)
        dropped = self._settle_guesses(layer, {key.expert for key in keys})
        ready = table.ready()
        resident: list[ExpertKey] = []
        missing: list[ExpertKey] = []
        for key in keys:
            if key in self._unproven:
                self._prove(key)
            is_ready = key in ready
            (resident if is_ready else missing).append(key)
            if not self._pins:
                if is_ready:
                    table.lease([key])
                if recent is None:
                    table.touch([key])
                table.make_room(len(missing))
        if self._pins:
            table.lease(resident)
            if recent is None:
                table.touch(keys)
        self._cold[layer] = {*missing} if recent is not None else set()
        if recent:
            needed = {key.expert: key for key in keys}
            used = [needed[expert] for expert in recent if expert in needed]
            table.touch(used)
            self._cold[layer].difference_update(used)
        if self._reorder and len(missing) > 1:
            # What is furthest on its way comes first: the order of computation is that of arrival.
            missing.sort(key=lambda key: -self._begun(key))
        streamed: list[ExpertKey] = []
        kept = len(table) - len(resident)
        if kept < len(missing):
            # What is on its way has its slot, and stays.
            begun = sum(table.slot_of(key) is not None for key in missing) if self._reorder else 0
            buffers = min(STREAM_BUFFERS, max(len(table) - begun, 1))
            while kept < min(begun + buffers, len(table)):
                # Resident experts fill every slot: some of them must pass through as well.
                key = table.least(resident)
                resident.remove(key)
                table.drop(key)
                missing.append(key)
                kept += 1
            kept -= buffers
            if self._reorder:
                missing, streamed = missing[:kept], missing[kept:]
            else:
                passing = len(missing) - kept
                streamed, missing = missing[:passing], missing[passing:]
        leaving = [] if self._pins else [key for key in keys[: -len(table)] if key in {*resident}]
        return Needs(resident=resident, missing=missing, streamed=streamed, leaving=leaving, dropped=dropped)

    def ask(self, key: ExpertKey, part: Part) -> Transfer:
        """Make the copy of an expert that a layer waits for urgent, whether it is on its way or not.

        One that has come since the gate is leased, and its transfer has ended.
        """
        if self.tables[key.layer].is_ready(key):
            self.tables[key.layer].lease([key])
            self.tables[key.layer].touch([key])
            return Transfer(key=key, part=part)
        known = self._on_way.get(key)
        if known is not None and known.part == part and known not in self.queue.errors:
            self.queue.promote(known, URGENT)
            return known
        if known is not None:
            tally, nbytes = self._tallies[key.layer], self._late.pop(key, 0)
            tally.useful -= nbytes
            tally.late_copied -= nbytes
            self._drop(known)
        transfer = Transfer(key=key, part=part)
        self._push(transfer, self._cuts(transfer), URGENT)
        return transfer

    def ended(self, transfers: Iterable[Transfer]) -> list[Transfer]:
        """Return those of these urgent transfers that have arrived, and their experts can be read, or have failed."""
        return self.queue.ended(transfers)

    def error(self, transfer: Transfer) -> BaseException | None:
        """Return what a transfer failed with."""
        return self.queue.errors.get(transfer)

    def release(self, keys: Sequence[ExpertKey]) -> None:
        """These leased experts of one layer are not read any more."""
        if keys:
            table = self.tables[keys[0].layer]
            table.release(keys)
            self._reopen(table)

    def discard(self, key: ExpertKey) -> None:
        """An expert that passes through is not read any more, and its slot is free."""
        self._vacate(key)

    def predict(self, position: int, ranked: Sequence[ExpertKey], nbytes: float, way: Hashable = None) -> bool:
        """Speculate that these experts of a layer, most likely first, will be needed at `position`.

        Only those that are worth it by what became of earlier guesses that came this `way`. They count as expected, so
        that resident ones stay. Of the others so many are queued that all but the last fit into `nbytes`.
        Returns whether a guess of any of these ranks is worth a copy.
        """
        if not ranked:
            return False
        layer = ranked[0].layer
        table, standing = self.tables[layer], self.admission.of(way, layer)
        worthy = standing.worthy
        ready, expected = table.ready(), self._expected[layer]
        guesses, named = [], []
        for key, place in zip(ranked, places(len(ranked)), strict=True):
            is_ready = key in ready
            if not is_ready or key in self._unproven:
                guesses.append((key.expert, place))
            if not worthy[place]:
                continue
            named.append(key)
            if not is_ready:
                if (known := self._on_way.get(key)) is not None:
                    self.queue.promote(known, position)
                elif nbytes > 0 and len(table) > 1:
                    transfer = Transfer(key=key, part=Part.WHOLE)
                    cuts = self._cuts(transfer)
                    nbytes -= cuts.ends[-1]
                    self._push(transfer, cuts, position)
                    if key in self._unproven:
                        self._note_gone(key)
                    self._unproven[key] = 0
                    self._tallies[layer].issued += 1
                else:
                    continue
            if expected.setdefault(key, position) > position:
                expected[key] = position
        table.expect(reversed(named))
        if guesses:
            standing.open = guesses
        return any(worthy[: len(ranked)])

    def position_of(self, layer: int, steps: int) -> int:
        """Return the position of `layer` `steps` passes from now; 0: in this pass, or the next if it has been."""
        done = (self.position - 1) // len(self.tables) if self.position else 0
        position = (done + steps) * len(self.tables) + layer + 1
        return position if position > self.position else position + len(self.tables)

    def tallies(self) -> list[Tally]:
        """Return what became of what was copied ahead, by layer."""
        for key in [*self._unproven]:
            self._note_gone(key)
        found = [replace(tally) for tally in self._tallies]
        for key, nbytes in self._unproven.items():
            found[key.layer].unproven += nbytes
        return found

    def inherit(self, other: Core) -> None:
        """Take over what another core has learned and counted."""
        self.admission, self._tallies, self.absent = other.admission, other._tallies, other.absent

    def queued(self, position: int) -> int:
        """Bytes that are to be copied ahead of need, until `position`.

        What a layer waits for does not count: until it has come, no later layer begins.
        """
        queue = self.queue
        return sum(queue.left(t) for t in queue if URGENT < queue.rank(t) <= position and not queue.stopped(t))

    # What a link asks and tells.

    def next_chunk(self, budget: int, speculative_budget: int | None = None) -> Chunk | None:
        return self.queue.next_chunk(budget, speculative_budget, self._start)

    @property
    def backlog(self) -> int:
        return self.queue.backlog

    def landed(self, chunk: Chunk) -> bool:
        if chunk.speculative:
            self._note_copied(chunk)
        complete = self.queue.landed(chunk)
        if not complete:
            self._settle(chunk.transfer)
        return complete

    def finished(self, transfer: Transfer) -> bool:
        """The expert is in its slot: leased where a layer waits for it, else free to be evicted."""
        self.queue.finished(transfer)
        if self.queue.stopped(transfer):
            self._settle(transfer)  # a layer has asked for the expert in another form meanwhile
            return False
        key, urgent = transfer.key, self.queue.rank(transfer) == URGENT
        self.queue.forget(transfer)
        del self._on_way[key]
        self._late.pop(key, None)
        self.tables[key.layer].filled(key)
        if not urgent:
            self.release([key])
        return True

    def failed(self, chunk: Chunk, error: BaseException) -> None:
        self.queue.failed(chunk, error)
        if self.queue.rank(chunk.transfer) != URGENT:
            self._settle(chunk.transfer)  # whoever needs it will ask again

    @property
    def evictions(self) -> int:
        """Experts that have left a slot for another."""
        return sum(table.evictions for table in {*self.tables})

    # How it is decided.

    def _advance(self, layer: int) -> None:
        self.position = self.position_of(layer, 0)

    def _settle_guesses(self, layer: int, needed: Collection[int]) -> list[ExpertKey]:
        """Learn from what a layer was expected to need, and drop what it does not (paper: early preemption).

        Returns what was dropped.
        """
        self.admission.settle(layer, needed)
        expected = self._expected[layer]
        due = [key for key, position in expected.items() if position <= self.position]
        for key in due:
            del expected[key]
        dropped = []
        for key in due if self._preempt and self._on_way else ():
            on_way = self._on_way.get(key)
            if on_way is not None and key.expert not in needed and not self.queue.complete(on_way):
                self._tallies[layer].dropped += self._unproven.pop(key, None) is not None
                self._drop(on_way)
                dropped.append(key)
        return dropped

    def _prove(self, key: ExpertKey) -> None:
        """Count what speculation did for an expert that a layer needs now, and that was copied ahead."""
        if self._note_gone(key):
            return
        tally, nbytes = self._tallies[key.layer], self._unproven.pop(key)
        tally.useful += nbytes
        if self.tables[key.layer].is_ready(key):
            tally.on_time += 1
        else:
            tally.late += 1
            tally.late_copied += nbytes
            self._late[key] = nbytes

    def _note_gone(self, key: ExpertKey) -> bool:
        """Count an expert that was copied ahead and has left before anybody needed it; whether it has."""
        gone = key in self._unproven and not self._is_coming(key)
        if gone:
            del self._unproven[key]
            self._tallies[key.layer].evicted += 1
        return gone

    def _is_coming(self, key: ExpertKey) -> bool:
        return key in self._on_way or self.tables[key.layer].is_ready(key)

    def _note_copied(self, chunk: Chunk) -> None:
        key, nbytes = chunk.transfer.key, chunk.end - chunk.begin
        tally = self._tallies[key.layer]
        tally.copied += nbytes
        if key in self._late and not self.queue.stopped(chunk.transfer):
            tally.useful += nbytes
            tally.late_copied += nbytes
            self._late[key] += nbytes
        elif key in self._unproven:
            self._unproven[key] += nbytes

    def _begun(self, key: ExpertKey) -> int:
        known = self._on_way.get(key)
        return self.queue.begun(known) if known is not None else 0

    def _push(self, transfer: Transfer, cuts: Cuts, rank: int) -> None:
        self._on_way[transfer.key] = transfer
        self.queue.push(transfer, cuts.ends, rank, cuts.whole)

    def _drop(self, transfer: Transfer) -> None:
        self.queue.stop(transfer)
        self._settle(transfer)

    def _settle(self, transfer: Transfer) -> None:
        """Forget a stopped transfer once nothing of it is in flight: its slot is free then."""
        if not self.queue.stopped(transfer) or not self.queue.settled(transfer):
            return
        if transfer in self.queue.errors and self.queue.rank(transfer) == URGENT:
            return  # its error has yet to be told
        self.queue.forget(transfer)
        if transfer.slot >= 0:
            self._vacate(transfer.key)
        if self._on_way.get(transfer.key) is transfer:
            del self._on_way[transfer.key]

    def _vacate(self, key: ExpertKey) -> None:
        self.tables[key.layer].drop(key)
        self._reopen(self.tables[key.layer])

    def _reopen(self, table: SlotTable) -> None:
        """Something in a table may leave that might not before."""
        self._closed.pop(table, None)
        self.queue.reopen()

    def _start(self, transfer: Transfer, rank: int) -> bool | None:
        """Take a slot for a transfer whose first chunk is about to be written; see `TransferQueue.next_chunk`."""
        key = transfer.key
        table = self.tables[key.layer]
        if rank >= self._closed.get(table, inf):
            return None
        if table.slot_of(key) is not None:
            return False  # bytes of a copy that was dropped are still in flight
        if rank == URGENT:
            cold = key in self._cold[key.layer]
            slot = table.admit(key, _Expected(self._expected, inf), cold)
            if slot is None:
                slot = table.admit(key, cold=cold)
            if slot is None and self._sacrifice(table) and (slot := table.admit(key, cold=cold)) is None:
                return False  # what is in flight of it comes to its end first
        elif len(self.queue) >= len(table) and sum(t.slot >= 0 for t in self._speculation(table)) >= len(table) - 1:
            return None  # one slot is closed to speculation
        else:
            slot = table.admit(key, _Expected(self._expected, rank + 1))
        if slot is None:
            self._closed[table] = rank
            return None
        transfer.slot = slot
        return True

    def _speculation(self, table: SlotTable) -> list[Transfer]:
        """Return what is on its way into a table and not urgent."""
        return [t for t in self.queue if self.queue.rank(t) != URGENT and self.tables[t.key.layer] is table]

    def _sacrifice(self, table: SlotTable) -> bool:
        """Drop the speculation that is needed last of those that hold a slot: a layer waits. Whether there is any."""
        holding = [t for t in self._speculation(table) if t.slot >= 0 and not self.queue.complete(t)]
        if holding:
            self._drop(max(holding, key=self.queue.rank))
        return bool(holding)


def make_core(config: Config, tables: Sequence[SlotTable], cuts: Callable[[Transfer], Cuts]) -> Core:
    """Return the core for a configuration, over the slot tables of its layers."""
    step = config.step
    return Core(
        tables,
        cuts,
        overtake=config.overtake,
        preempt=Technique.PREEMPTION in step.techniques,
        reorder=Technique.REORDER in step.techniques or step.layer,
        pins=config.replacement == "static",
        ghosts=config.predicts and not config.always_predict,
    )
