"""The experts of one call as waves, in the order in which they can be computed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol

from promoe_triton.core import Core, Needs
from promoe_triton.counters import Counters
from promoe_triton.protocols import ExpertKey, Link, Part, Transfer
from promoe_triton.techniques import Step, Technique

RECENT = 64
"""The last tokens of a prompt, whose experts are kept before those of its other tokens."""


class Served(Protocol):
    """A layer whose experts come in waves: of a model that runs, or of one that is simulated."""

    @property
    def index(self) -> int: ...

    @property
    def experts(self) -> int:
        """Return E."""
        ...

    @property
    def step(self) -> Step:
        """What is on of the paper's techniques."""
        ...

    @property
    def core(self) -> Core: ...

    @property
    def link(self) -> Link: ...

    @property
    def counters(self) -> Counters: ...

    def has(self, part: Part) -> bool:
        """Whether this half of an expert has weights."""
        ...

    def place(self, keys: Sequence[ExpertKey]) -> None:
        """These experts are ready, and may be computed."""
        ...

    def remove(self, expert: int) -> None:
        """An expert is not computed any more."""
        ...

    def waited(self, began: float) -> None:
        """The layer has waited for a copy since then."""
        ...

    def dropped(self, keys: Sequence[ExpertKey]) -> None:
        """The layer does not need these experts, whose copies ahead of need are given up."""
        ...

    def check_resident(self) -> None:
        """The call is over, and its leases are given back."""
        ...


class Waves:
    """Resident experts first, then the others as they arrive (paper, section on reordered inference).

    Missing experts take slots and stay. Where there are more of them than slots, the last of them pass through a few
    slots twice: first their up projection, then their down projection, so that every byte is still read once. What
    has come through such a slot is computed before resident experts are, and alone, so that the slot is free for the
    next; and its second half is asked for at once, so that the link goes on while the rest of the first is computed.

    Without reordering, experts are computed in the order of their numbers; without preemption, a missing one is asked
    for when it is its turn; with whole layers, all experts are copied and only then computed (`Step`).
    """

    def __init__(self, layer: Served, experts: Collection[int], recent: Sequence[int] | None) -> None:
        step = layer.step
        self._layer, self._computed = layer, experts
        self._core, self._link = layer.core, layer.link
        self._preempt = Technique.PREEMPTION in step.techniques
        self._reorder = Technique.REORDER in step.techniques
        self._whole_layer = step.layer
        self._as_they_come = self._preempt and (self._reorder or self._whole_layer)
        self._asked: dict[ExpertKey, Transfer] = {}
        self._second_halves: dict[ExpertKey, Transfer] = {}
        if step.layer:
            experts = range(layer.experts)
        elif not self._reorder:
            experts = sorted(experts)
        self._needs = self._link.tell(lambda: self._gate(experts, recent))
        if self._needs.dropped:
            layer.dropped(self._needs.dropped)
        layer.place(self._needs.resident)
        hits = sum(key.expert in self._computed for key in self._needs.resident)
        layer.counters.hits += hits
        layer.counters.misses += len(self._computed) - hits

    def _gate(self, experts: Collection[int], recent: Sequence[int] | None) -> Needs:
        """Submit all that is missing at once, in the order it will be computed (early preemption)."""
        needs = self._core.gate(self._layer.index, experts, recent)
        if self._preempt:
            self._ask_all(needs.missing, Part.WHOLE)
            self._ask_all(self._streamed(needs, Part.UP), Part.UP)
        return needs

    def _ask_all(self, keys: Iterable[ExpertKey], part: Part) -> None:
        for key in keys:
            self._asked[key] = self._core.ask(key, part)

    def _streamed(self, needs: Needs, part: Part) -> list[ExpertKey]:
        """Return what passes through slots in this half of the computation."""
        return needs.streamed if self._layer.has(part) else []

    def up(self) -> Iterator[list[int]]:
        """Yield experts whose up projection can be computed, until all are."""
        resident, missing, streamed = self._needs.resident, self._needs.missing, self._streamed(self._needs, Part.UP)
        if self._as_they_come:
            yield from self._by_arrival(resident, streaming=bool(streamed))
        else:
            kept = [*resident, *missing] if self._reorder else sorted([*resident, *missing])
            yield from self._one_by_one(kept, Part.WHOLE)
            yield from self._one_by_one(streamed, Part.UP)

    def down(self) -> Iterator[list[int]]:
        """Yield experts whose down projection can be computed, until all are."""
        kept, streamed = [*self._needs.resident, *self._needs.missing], self._streamed(self._needs, Part.DOWN)
        self._asked = self._second_halves
        if self._preempt and streamed and not self._layer.has(Part.UP):
            self._link.tell(lambda: self._ask_all(streamed, Part.DOWN))
        if self._as_they_come:
            yield from self._by_arrival(kept, streaming=bool(streamed))
        else:
            yield self._wave(kept)
            yield from self._one_by_one(streamed, Part.DOWN)

    def _wave(self, keys: Iterable[ExpertKey]) -> list[int]:
        """Return those of these experts that are computed: all, unless whole layers are copied."""
        return [key.expert for key in keys if key.expert in self._computed]

    def _by_arrival(self, ready: Sequence[ExpertKey], streaming: bool) -> Iterator[list[int]]:
        """Yield ready experts, and what was asked for as it arrives.

        streaming: what arrives goes first, as the next expert waits for its slot.
        """
        waiting = self._wave(ready)
        if waiting and not streaming and not self._whole_layer:
            yield waiting
            waiting = []
        while self._asked:
            pending = list(self._asked.values())
            now = bool(waiting) and not self._whole_layer
            arrived = self._link.arrived(pending) if now else self._wait(pending)
            if arrived:
                yield from self._compute(arrived)
            else:
                yield [waiting.pop(0)]
        if waiting:
            yield waiting

    def _one_by_one(self, keys: Sequence[ExpertKey], part: Part) -> Iterator[list[int]]:
        """Yield experts as they stand, and ask for each when it is its turn, unless it was asked for before."""
        resident, ready = {*self._needs.resident}, list[ExpertKey]()
        for key in keys:
            if key in resident:
                ready.append(key)
                continue
            if ready:
                yield self._wave(ready)
                ready = []
            if key not in self._asked:
                self._link.tell(lambda key=key: self._ask_all([key], part))  # type: ignore[misc]
            yield from self._compute(self._wait([self._asked[key]]))
        if ready:
            yield self._wave(ready)

    def _wait(self, transfers: Sequence[Transfer]) -> Sequence[Transfer]:
        began = self._link.now()
        arrived = self._link.wait(transfers)
        self._layer.counters.stall_seconds += self._link.now() - began
        self._layer.waited(began)
        return arrived

    def _compute(self, arrived: Sequence[Transfer]) -> Iterator[list[int]]:
        for transfer in arrived:
            del self._asked[transfer.key]
        # What passes through goes first, and one by one: while the second is computed, the slot of the first is filled.
        for transfer in arrived:
            if transfer.part != Part.WHOLE:
                yield from self._pass_through(transfer)
        if kept := [transfer.key for transfer in arrived if transfer.part == Part.WHOLE]:
            self._layer.place(kept)
            if wave := self._wave(kept):
                yield wave

    def _pass_through(self, transfer: Transfer) -> Iterator[list[int]]:
        key = transfer.key
        self._layer.place([key])
        if wave := self._wave([key]):
            yield wave
        self._layer.remove(key.expert)
        self._fence([key])
        is_due = self._preempt and transfer.part == Part.UP and self._layer.has(Part.DOWN)
        self._link.tell(lambda: self._leave(key, is_due))

    def _leave(self, key: ExpertKey, is_due: bool) -> None:
        """A slot is free again. is_due: the other half is wanted as well, after the first halves of all others."""
        self._core.discard(key)
        if is_due:
            self._second_halves[key] = self._core.ask(key, Part.DOWN)

    def close(self) -> None:
        """Give all leases back."""
        for key in self._needs.leaving:
            self._layer.remove(key.expert)
        self._fence([*self._needs.resident, *self._needs.missing])
        self._link.tell(self._give_back)
        self._layer.check_resident()

    def _fence(self, keys: Iterable[ExpertKey]) -> None:
        """What has been computed from these slots may still run on the device."""
        table = self._core.tables[self._layer.index]
        self._link.fence(self._layer.index, [slot for key in keys if (slot := table.slot_of(key)) is not None])

    def _give_back(self) -> None:
        """At once: what has no lease any more may be evicted by the next chunk that wants a slot."""
        needs = self._needs
        leaving = {*needs.leaving}
        for key in leaving:
            self._core.discard(key)
        self._core.release([key for key in [*needs.resident, *needs.missing] if key not in leaving])
