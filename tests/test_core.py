"""The core, driven as links and layers drive it, in any order that may occur."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from math import inf
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from promoe_triton import core as cores
from promoe_triton.config import Config
from promoe_triton.core import STREAM_BUFFERS, Core, Needs, Tally
from promoe_triton.policies import POLICIES, make_policy
from promoe_triton.protocols import PAGE, Chunk, Cuts, ExpertKey, Part, Seam, Transfer
from promoe_triton.slots import SlotTable
from promoe_triton.speculation import PROBE, Place, Ranking, Speculation
from promoe_triton.transfers import URGENT

LAYERS, EXPERTS = 3, 5
PAGES = {Part.UP: 4, Part.DOWN: 2, Part.WHOLE: 6}


def cuts(transfer: Transfer) -> Cuts:
    """UP is one range and DOWN another; the experts of the last layer are converted on their way, whole."""
    ends = (4 * PAGE, 6 * PAGE) if transfer.part == Part.WHOLE else (PAGES[transfer.part] * PAGE,)
    return Cuts(ends=ends, whole=transfer.key.layer == LAYERS - 1)


def make_core(slots: list[int], shared: bool = False, policy: str = "lru", **techniques: bool) -> Core:
    tables = [SlotTable(range(n), make_policy(policy, {})) for n in slots]
    if shared:
        tables = [SlotTable(range(sum(slots)), make_policy(policy, {}))] * len(slots)
    return Core(tables, cuts, **techniques)


def total(core: Core) -> Tally:
    """What became of what was copied ahead, over all layers."""
    tallies = core.tallies()
    return Tally(**{field.name: sum(getattr(tally, field.name) for tally in tallies) for field in fields(Tally)})


def drive(core: Core, budget: int = PAGE) -> Transfer | None:
    """Let a link with one read in flight do its next piece of work; return what it was for."""
    chunk = core.next_chunk(budget)
    if chunk is None:
        return None
    if core.landed(chunk):
        core.finished(chunk.transfer)
    return chunk.transfer


class Driven(RuleBasedStateMachine):
    """Chunks that are out land in any order; calls of layers go on while speculation comes and goes."""

    @initialize(
        slots=st.lists(st.integers(1, 6), min_size=LAYERS, max_size=LAYERS),
        shared=st.booleans(),
        overtake=st.booleans(),
        preempt=st.booleans(),
        takes=st.sampled_from(["reorder", "pins", "neither"]),
        ghosts=st.booleans(),
        policy=st.sampled_from(POLICIES),
    )
    def open(
        self, slots: list[int], shared: bool, overtake: bool, preempt: bool, takes: str, ghosts: bool, policy: str
    ) -> None:
        order = {"reorder": takes == "reorder", "pins": takes == "pins", "ghosts": ghosts}
        self.core = make_core(slots, shared, policy, overtake=overtake, preempt=preempt, **order)
        self.overtake, self.preempt, self.ghosts = overtake, preempt, ghosts
        self.stays = takes != "neither"
        self.evicted = self.absent = 0
        self.used: dict[SlotTable, list[ExpertKey]] = {table: [] for table in self.tables()}
        self.out: list[Chunk] = []
        self.unlucky = False
        self.lost: list[tuple[Transfer, int, int]] = []
        self.touching: list[Transfer] = []
        self.down: list[Transfer] = []
        self.given: Counter[Transfer] = Counter()
        self.layer = -1

    def tables(self) -> set[SlotTable]:
        return {*self.core.tables}

    # Speculation and what a link does.

    @rule(
        layer=st.integers(0, LAYERS - 1),
        steps=st.integers(0, 2),
        experts=st.lists(st.integers(0, EXPERTS - 1), unique=True),
        room=st.integers(0, 30),
    )
    def predict(self, layer: int, steps: int, experts: list[int], room: int) -> None:
        keys = [ExpertKey(layer, expert) for expert in experts]
        before = total(self.core).issued
        self.core.predict(self.core.position_of(layer, steps), keys, room * PAGE)
        issued = total(self.core).issued - before
        assert issued == 0 or (issued - 1) * PAGES[Part.WHOLE] < room, "all but the last fit"

    @rule(budget=st.integers(1, 5), speculative=st.integers(0, 5) | st.none())
    def next_chunk(self, budget: int, speculative: int | None) -> None:
        before = {table: {*table._slot_of} for table in self.tables()}
        evicted, expected = self.core.evictions, [dict(positions) for positions in self.core._expected]
        chunk = self.core.next_chunk(budget * PAGE, None if speculative is None else speculative * PAGE)
        evicted = self.core.evictions - evicted
        self.evicted += evicted
        if chunk is None:
            assert not evicted, "what leaves makes room for what is about to be written"
            return
        assert evicted <= (chunk.transfer not in self.given), "one, for a first chunk"
        table = self.core.tables[chunk.transfer.key.layer]
        if evicted:
            assert len(before[table]) == len(table), "no slot was free"
            (victim,) = before[table] - {*table._slot_of}
            sooner = expected[victim.layer].get(victim, inf) <= self.core.queue.rank(chunk.transfer)
            assert not (chunk.speculative and sooner), "speculation takes no slot of what is needed sooner"
        assert chunk.speculative is (self.core.queue.rank(chunk.transfer) != URGENT)
        if chunk.speculative and speculative is not None and not cuts(chunk.transfer).whole:
            assert chunk.end - chunk.begin <= min(budget, speculative) * PAGE
        transfer = chunk.transfer
        if (transfer, chunk.begin, chunk.end) in self.lost:
            self.lost.remove((transfer, chunk.begin, chunk.end))
        else:
            assert chunk.begin == self.given[transfer], "every byte once, in order"
            self.given[transfer] = chunk.end
        assert table.slot_of(transfer.key) == transfer.slot, "what is written is occupied"
        assert not table.is_ready(transfer.key), "and nobody reads it"
        queue = self.core.queue
        if queue.rank(transfer) != URGENT and (self.overtake or chunk.begin == 0):
            passed_over = [t for t in queue if queue.rank(t) == URGENT and not queue.stopped(t) and queue.left(t)]
            assert all(t.slot == -1 for t in passed_over), "speculation goes only where nothing urgent can"
        self.out.append(chunk)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        chunk = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        if self.core.landed(chunk):
            assert self.given[chunk.transfer] == cuts(chunk.transfer).ends[-1]
            self.touching.append(chunk.transfer)

    @precondition(lambda self: self.touching)
    @rule()
    def finish(self) -> None:
        transfer = self.touching.pop()
        dropped = self.core.queue.stopped(transfer)
        assert self.core.finished(transfer) is not dropped
        assert self.core.tables[transfer.key.layer].is_ready(transfer.key) is not dropped

    @precondition(lambda self: any(chunk.speculative for chunk in self.out))
    @rule()
    def fail(self) -> None:
        self.fail_with(next(chunk for chunk in self.out if chunk.speculative))

    def fail_with(self, chunk: Chunk) -> None:
        """A copy that nobody waited for when it began."""
        self.out.remove(chunk)
        queue = self.core.queue
        if queue.rank(chunk.transfer) == URGENT and not queue.stopped(chunk.transfer):
            self.lost.append((chunk.transfer, chunk.begin, chunk.end))
        self.core.failed(chunk, OSError("mine"))

    @rule()
    def luck_turns(self) -> None:
        self.unlucky = not self.unlucky

    # Calls of layers, in the order of a forward.

    def settle(self, pending: list[Transfer]) -> Transfer:
        """Wait as a layer does: a bounded number of steps of the link must bring one of these."""
        for _ in range(2000):
            done = next(iter(self.core.ended(pending)), None)
            if done is not None:
                assert self.core.error(done) is None
                pending.remove(done)
                return done
            if self.touching:
                self.finish()
            elif self.out and self.unlucky and self.out[-1].speculative:
                self.fail_with(self.out[-1])
            elif self.out:
                chunk = self.out.pop()
                if self.core.landed(chunk):
                    self.touching.append(chunk.transfer)
            else:
                before = len(self.out)
                self.next_chunk(2, None)
                assert len(self.out) > before, "somebody waits, nothing is in flight, and nothing can be started"
        raise AssertionError("never came")

    @rule(
        experts=st.lists(st.integers(0, EXPERTS - 1), unique=True),
        recent=st.none() | st.lists(st.integers(0, EXPERTS)),
    )
    def call(self, experts: list[int], recent: list[int] | None) -> None:
        core = self.core
        self.layer = (self.layer + 1) % LAYERS
        table = core.tables[self.layer]
        ready = {*table.ready()}
        needs = core.gate(self.layer, experts, recent)
        self.check(needs, experts)
        self.check_kept(needs, ready)
        self.count_absent(table, [ExpertKey(self.layer, expert) for expert in experts])
        asked = [(key, Part.WHOLE) for key in needs.missing] + [(key, Part.UP) for key in needs.streamed]
        at_once = len(asked) if self.preempt else 1
        computed, up = [key.expert for key in needs.resident], []
        while asked or up:
            up += [core.ask(*each) for each in asked[:at_once]]
            asked = asked[at_once:]
            computed.append(self.arrived(self.settle(up)))
        assert sorted(computed) == sorted(experts), "every expert once"
        kept = [*needs.resident, *needs.missing]
        assert all(map(table.is_ready, kept)), "nothing that will be read has left"
        if not self.preempt:
            self.down += [core.ask(key, Part.DOWN) for key in needs.streamed]
        again = []
        while self.down:
            again.append(self.arrived(self.settle(self.down)))
        assert sorted(again) == sorted(key.expert for key in needs.streamed)
        core.release(kept)
        for key in needs.leaving:
            core.discard(key)

    def check(self, needs: Needs, experts: list[int]) -> None:
        table = self.core.tables[self.layer]
        all_keys = [*needs.resident, *needs.missing, *needs.streamed]
        assert sorted(key.expert for key in all_keys) == sorted(experts)
        assert len(needs.resident) + len(needs.missing) <= len(table)
        for transfer in self.core.queue:
            late = self.core.queue.rank(transfer) <= self.core.position and transfer.key.layer == self.layer
            if self.preempt and late and transfer.key.expert not in experts and not self.core.queue.complete(transfer):
                assert self.core.queue.stopped(transfer), "stale speculation is dropped"

    def check_kept(self, needs: Needs, ready: set[ExpertKey]) -> None:
        """Where experts stay, those in slots do, but for few whose slots others pass through: no evictions."""
        gone = ready - self.core.tables[self.layer].ready()
        if not self.stays:
            return
        assert gone <= {*needs.missing, *needs.streamed}
        assert len(gone) <= (STREAM_BUFFERS if needs.streamed else 0)
        assert {*needs.resident} == (ready - gone) & {*needs.resident, *needs.missing, *needs.streamed}

    def count_absent(self, table: SlotTable, keys: list[ExpertKey]) -> None:
        """What an LRU cache has: the experts used last, as many as there are slots."""
        used = self.used[table]
        for key in keys:
            self.absent += self.ghosts and key not in used[-len(table) :]
            used[:] = [*(other for other in used if other != key), key]
        assert self.core.absent == self.absent

    def arrived(self, transfer: Transfer) -> int:
        table = self.core.tables[transfer.key.layer]
        assert table.is_ready(transfer.key)
        if transfer.part != Part.WHOLE:
            self.core.discard(transfer.key)
        if transfer.part == Part.UP and self.preempt:
            self.down.append(self.core.ask(transfer.key, Part.DOWN))
        return transfer.key.expert

    @invariant()
    def holds(self) -> None:
        core = self.core
        assert core.evictions == self.evicted or not self.stays, "nothing leaves for another but before a first chunk"
        for table in self.tables():
            table.check_integrity()
            ahead = [t for t in core._speculation(table) if t.slot >= 0 and not core.queue.stopped(t)]
            assert len(ahead) <= max(len(table) - 1, 0), "one slot is closed to speculation"
        known = list(core.queue)
        assert {*core._on_way.values()} <= {*known}
        flying = {*(chunk.transfer for chunk in self.out), *self.touching}
        assert all(t in flying for t in known if core.queue.stopped(t)), "what is dropped goes when it has landed"
        assert len(known) <= 2 * LAYERS * EXPERTS
        assert all(len(expected) <= EXPERTS for expected in core._expected)
        assert len(core._unproven) <= LAYERS * EXPERTS
        assert all(len(cold) <= EXPERTS for cold in core._cold)
        tally = total(core)
        assert tally.useful >= 0
        assert tally.useful + tally.unproven <= tally.copied
        assert tally.on_time + tally.late + tally.dropped + tally.evicted <= tally.issued

    def teardown(self) -> None:
        """When all has landed, every slot is ready or free and every lease given back."""
        if not hasattr(self, "core"):
            return
        while self.touching or self.out:
            self.finish() if self.touching else self.land_last()
        while (chunk := self.core.next_chunk(100 * PAGE)) is not None:
            self.out.append(chunk)
            self.land_last()
            if self.touching:
                self.finish()
        for table in self.tables():
            assert table.available() == len(table)

    def land_last(self) -> None:
        chunk = self.out.pop()
        if self.core.landed(chunk):
            self.touching.append(chunk.transfer)


TestDriven = cast(Any, Driven).TestCase
TestDriven.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def fill(core: Core, layer: int, experts: list[int]) -> None:
    """One call of a layer, alone."""
    needs = core.gate(layer, experts)
    for key in needs.missing:
        core.ask(key, Part.WHOLE)
    while drive(core) is not None:
        pass
    core.release([*needs.resident, *needs.missing])


def test_an_urgent_copy_overtakes_and_the_half_done_one_goes_on() -> None:
    core = make_core([4, 4, 4])
    core.predict(core.position_of(1, 0), [ExpertKey(1, 0)], 100 * PAGE)
    ahead = drive(core)
    assert ahead is not None
    assert ahead.key == ExpertKey(1, 0)
    needs = core.gate(0, [2])
    urgent = core.ask(needs.missing[0], Part.WHOLE)
    order = [drive(core) for _ in range(12)]
    assert order[:6] == [urgent] * 6
    assert order[6:] == [ahead] * 5 + [None], "five of six pages were left"


def test_nothing_overtakes_where_chunks_are_off() -> None:
    core = make_core([4, 4, 4], overtake=False)
    core.predict(core.position_of(1, 0), [ExpertKey(1, 0)], 100 * PAGE)
    ahead = drive(core)
    core.gate(0, [1])
    urgent = core.ask(ExpertKey(0, 1), Part.WHOLE)
    assert [drive(core) for _ in range(6)] == [ahead] * 5 + [urgent]


def test_stale_speculation_is_dropped_and_its_slot_free() -> None:
    core = make_core([4, 4, 4])
    core.predict(core.position_of(0, 0), [ExpertKey(0, 1), ExpertKey(0, 2)], 100 * PAGE)
    chunk = core.next_chunk(PAGE)
    assert chunk is not None
    assert chunk.transfer.key == ExpertKey(0, 1)
    needs = core.gate(0, [2])
    assert needs.missing == [ExpertKey(0, 2)]
    core.ask(needs.missing[0], Part.WHOLE)
    assert core.tables[0].slot_of(ExpertKey(0, 1)) is not None, "bytes are still on their way into it"
    assert core.landed(chunk) is False
    assert core.tables[0].slot_of(ExpertKey(0, 1)) is None
    assert (total(core).issued, total(core).late) == (2, 1)


def test_what_has_come_furthest_comes_first() -> None:
    core = make_core([4, 4, 4])
    core.predict(core.position_of(0, 0), [ExpertKey(0, 3), ExpertKey(0, 1)], 100 * PAGE)
    for _ in range(7):
        drive(core)
    assert core.tables[0].is_ready(ExpertKey(0, 3))
    needs = core.gate(0, [0, 1, 2, 3])
    assert [key.expert for key in needs.resident] == [3]
    assert [key.expert for key in needs.missing] == [1, 0, 2]
    assert (total(core).on_time, total(core).late) == (1, 1)


@pytest.mark.parametrize(("position", "stays"), [(1, True), (3, False)], ids=["sooner", "later"])
def test_speculation_takes_no_slot_of_what_is_expected_sooner(position: int, stays: bool) -> None:
    core = make_core([2, 2, 2])
    fill(core, 0, [0, 1])
    core.predict(core.position_of(0, position), [ExpertKey(0, 0), ExpertKey(0, 1)], 0)
    core.predict(core.position_of(0, 2), [ExpertKey(0, 2)], 100 * PAGE)
    drive(core)
    assert core.tables[0].is_ready(ExpertKey(0, 1)) is stays
    assert core.tables[0].is_ready(ExpertKey(0, 0)), "of those that are expected the most likely leaves last"


def test_one_slot_is_closed_to_speculation() -> None:
    core = make_core([1, 2, 2])
    for layer in (0, 1):
        core.predict(core.position_of(layer, 0), [ExpertKey(layer, e) for e in range(4)], 100 * PAGE)
    started = [drive(core, budget=PAGE) for _ in range(30)]
    assert {t.key.layer for t in started if t} == {1}


@pytest.mark.parametrize("how", ["release", "discard"])
def test_a_slot_that_is_given_back_is_taken_at_once(how: str) -> None:
    core = make_core([2, 2, 2])
    fill(core, 0, [0, 1])
    resident = core.gate(0, [0, 1]).resident
    core.predict(core.position_of(0, 1), [ExpertKey(0, 2)], 100 * PAGE)
    assert drive(core) is None, "both slots are leased"
    if how == "release":
        core.release(resident)
    else:
        core.discard(resident[0])
    ahead = drive(core)
    assert ahead is not None
    assert ahead.key == ExpertKey(0, 2)


def test_an_expert_that_cannot_start_yet_holds_up_no_other_of_its_layer() -> None:
    core = make_core([4, 4, 4])
    core.predict(core.position_of(0, 0), [ExpertKey(0, 1)], 100 * PAGE)
    chunk = core.next_chunk(PAGE)
    assert chunk is not None
    core.gate(0, [1, 2])
    core.ask(ExpertKey(0, 1), Part.UP)
    core.ask(ExpertKey(0, 2), Part.WHOLE)
    other = drive(core)
    assert other is not None
    assert other.key == ExpertKey(0, 2), "bytes of a copy of expert 1 in another form are still in flight"


def test_what_is_on_its_way_stays_where_others_have_to_pass_through() -> None:
    """A prompt needs more experts than there are slots; two of them were begun for it already."""
    core = make_core([4, 4, 4])
    fill(core, 0, [0, 1])
    core.predict(core.position_of(0, 1), [ExpertKey(0, 2), ExpertKey(0, 3)], 100 * PAGE)
    begun = [chunk for _ in range(2) if (chunk := core.next_chunk(4 * PAGE)) is not None]
    needs = core.gate(0, range(EXPERTS), recent=[])
    assert {chunk.transfer.key for chunk in begun} <= {*needs.missing}
    assert {*needs.resident, *needs.missing, *needs.streamed} == {ExpertKey(0, expert) for expert in range(EXPERTS)}
    assert all(core.ask(chunk.transfer.key, Part.WHOLE) is chunk.transfer for chunk in begun)


def test_one_of_those_on_their_way_passes_through_where_they_take_all_slots() -> None:
    core = make_core([2, 2, 2])
    for expert in (0, 1):
        core.ask(ExpertKey(0, expert), Part.WHOLE)
    begun = [chunk for _ in range(3) if (chunk := core.next_chunk(100 * PAGE)) is not None]
    assert {chunk.transfer.slot for chunk in begun} == {0, 1}
    needs = core.gate(0, range(EXPERTS), recent=[])
    assert len(needs.missing) == 1
    assert len(needs.streamed) == EXPERTS - 1


def test_what_was_given_up_for_an_urgent_copy_is_given_up_again_where_it_is_predicted_again() -> None:
    core = make_core([2, 2, 2])
    fill(core, 0, [0])
    guess = [ExpertKey(0, 1)]
    core.predict(core.position_of(0, 2), guess, 100 * PAGE)
    begun = [chunk for _ in range(9) if (chunk := core.next_chunk(100 * PAGE)) is not None]
    core.gate(0, [0, 2])
    urgent = core.ask(ExpertKey(0, 2), Part.WHOLE)
    assert drive(core) is None, "bytes of the guess are still on their way into the only slot there is"
    core.predict(core.position_of(0, 1), guess, 100 * PAGE)
    assert drive(core) is None
    for chunk in begun:
        assert not core.landed(chunk)
    assert drive(core) is urgent


def test_a_prediction_that_comes_true_twice_counts_once() -> None:
    core = make_core([3, 3, 3])
    core.predict(core.position_of(0, 0), [ExpertKey(0, 0)], 100 * PAGE)
    while drive(core) is not None:
        pass
    fill(core, 0, [0])
    fill(core, 0, [0])
    assert total(core).on_time == 1


def test_a_predicted_resident_expert_counts_as_used() -> None:
    core = make_core([3, 3, 3])
    fill(core, 0, [0, 1, 2])
    core.predict(core.position_of(0, 1), [ExpertKey(0, 0)], 0)
    core.gate(1, [])
    fill(core, 0, [3])
    assert not core.tables[0].is_ready(ExpertKey(0, 1)), "the least recently used one that nobody expects"


def test_an_urgent_copy_leaves_what_is_expected_where_it_can() -> None:
    core = make_core([3, 3, 3])
    fill(core, 0, [0, 1, 2])
    core.predict(core.position_of(0, 3), [ExpertKey(0, 0)], 0)
    fill(core, 0, [1, 2])
    fill(core, 0, [3])
    assert {key.expert for key in core.tables[0].ready()} == {0, 2, 3}


@pytest.mark.parametrize(
    ("done", "layer", "steps", "position"),
    [([], 1, 0, 2), ([0], 0, 0, 4), ([0], 2, 0, 3), ([0], 0, 1, 4), ([0, 1, 2], 0, 1, 4), ([0, 1, 2, 0], 1, 0, 5)],
)
def test_positions(done: list[int], layer: int, steps: int, position: int) -> None:
    core = make_core([1, 1, 1])
    for index in done:
        core.gate(index, [])
    assert core.position_of(layer, steps) == position


def test_what_is_to_be_copied_before_a_deadline() -> None:
    core = make_core([4, 4, 4])
    core.predict(core.position_of(1, 0), [ExpertKey(1, 0)], 100 * PAGE)
    core.predict(core.position_of(2, 0), [ExpertKey(2, 0)], 100 * PAGE)
    drive(core)
    assert [core.queued(position) // PAGE for position in (1, 2, 3)] == [0, 5, 11]


def test_experts_taken_in_order_push_out_ready_ones_that_come_later() -> None:
    """What an LRU cache does that is asked for one expert at a time."""
    needs = {}
    for reorder in (True, False):
        core = make_core([3, 3, 3], reorder=reorder)
        fill(core, 0, [2, 3, 4])
        needs[reorder] = core.gate(0, [0, 2, 3])
    assert [key.expert for key in needs[True].resident] == [2, 3]
    assert [key.expert for key in needs[False].missing] == [0, 2, 3], "0 took the slot of 2, 2 that of 3, 3 that of 4"


def test_an_lru_cache_that_is_scanned_finds_nothing_again() -> None:
    """Taken in order, more experts than slots push each other out; with reordering those in slots stay."""
    for reorder, found in ((False, 0), (True, 3)):
        core = make_core([5, 5, 5], reorder=reorder)
        hits = []
        for _ in range(3):
            needs = core.gate(0, range(8))
            hits.append(len(needs.resident))
            for key in needs.streamed:
                for part in (Part.UP, Part.DOWN):
                    core.ask(key, part)
                    while drive(core):
                        pass
                    core.discard(key)
            for key in needs.missing:
                core.ask(key, Part.WHOLE)
            while drive(core):
                pass
            core.release([*needs.resident, *needs.missing])
            for key in needs.leaving:
                core.discard(key)
        assert hits == [0, found, found]


def test_what_a_prompt_used_before_its_end_leaves_first() -> None:
    core = make_core([4, 4, 4])
    fill(core, 0, [0, 1])
    needs = core.gate(0, [0, 1, 2, 3], recent=[1, 3])
    for key in needs.missing:
        core.ask(key, Part.WHOLE)
    while drive(core) is not None:
        pass
    core.release([*needs.resident, *needs.missing])
    left = []
    for new in (4, 5, 6):
        ready = {key.expert for key in core.tables[0].ready()}
        fill(core, 0, [new])
        left += sorted(ready - {key.expert for key in core.tables[0].ready()})
    assert left == [2, 0, 1], "loaded and not used at the end; used before; used at the end"


def test_what_a_prompt_left_unfinished_is_not_cold_the_next_time_it_is_needed() -> None:
    core = make_core([3, 3, 3])
    core.predict(core.position_of(0, 0), [ExpertKey(0, 0)], 100 * PAGE)
    drive(core)
    for recent in ([1], None):  # the first call finds 0 on its way: nothing is admitted for it
        needs = core.gate(0, [0, 1], recent=recent)
        for key in needs.missing:
            core.ask(key, Part.WHOLE)
        while drive(core) is not None:
            pass
        core.release([*needs.resident, *needs.missing])
        if recent:
            core.tables[0].drop(ExpertKey(0, 0))
    fill(core, 0, [2])
    fill(core, 0, [3])
    assert {key.expert for key in core.tables[0].ready()} == {0, 2, 3}, "1, used first of them all, has left"


def test_a_way_that_does_not_come_true_is_given_up_and_wins_trust_again() -> None:
    core = make_core([8, 8, 8])

    def issued(right: bool, rounds: int) -> int:
        before = total(core).issued
        for i in range(rounds):
            core.predict(core.position_of(0, 0), [ExpertKey(0, 10 + i % 40)], 100 * PAGE, way="mine")
            needs = core.gate(0, [10 + i % 40 if right else 3])
            for key in needs.missing:
                core.ask(key, Part.WHOLE)
            while drive(core) is not None:
                pass
            core.release([*needs.resident, *needs.missing])
        return total(core).issued - before

    assert issued(False, 50) < 10
    assert issued(False, 20) == 0
    assert issued(True, 200) > 100
    assert issued(True, 20) == 20


def test_what_comes_to_nothing_is_asked_for_now_and_then_until_it_comes_true() -> None:
    core, speculation, here = make_core([8, 8, 8]), Speculation(always=True), Place(0, Seam.ROUTED)

    def asked(right: bool, passes: int) -> list[bool]:
        """In which passes a prediction of layer 1 was made."""
        found = []
        for i in range(passes):
            wanted = 10 + i % 40
            speculation.routed(0, 1, float(i), 0.0, 0)
            core.gate(0, [])
            found.append(not speculation.leaves_out(here))
            if found[-1]:
                speculation.queue(core, here, 1, [Ranking(0, [ExpertKey(1, wanted)])], 1e9)
            needs = core.gate(1, [wanted if right else 3])
            for key in needs.missing:
                core.ask(key, Part.WHOLE)
            while drive(core) is not None:
                pass
            core.release([*needs.resident, *needs.missing])
        return found

    assert sum(asked(False, 60)) < 60
    assert sum(asked(False, 10 * PROBE)) == 10, "a rare probe"
    asked(True, 100 * PROBE)
    assert all(asked(True, PROBE)), "trusted again"


def test_static_keeps_what_is_popular_through_a_prompt() -> None:
    """Without reordering others lose what comes later in the call; here what is missing passes through what is left."""
    popularity = {ExpertKey(0, expert): float(expert) for expert in range(EXPERTS)}
    popular = [ExpertKey(0, expert) for expert in range(EXPERTS - 4, EXPERTS)]
    for pins in (True, False):
        core = Core([SlotTable(range(4), make_policy("static", popularity))], cuts, reorder=False, pins=pins)
        fill(core, 0, [key.expert for key in popular])
        needs = core.gate(0, range(EXPERTS), recent=[])
        kept = popular[2:] if pins else []
        assert needs.resident == kept
        assert needs.leaving == []
        assert len(needs.streamed) == EXPERTS - len(needs.resident) - len(needs.missing)


def test_bytes_copied_ahead_are_useful_where_they_are_needed() -> None:
    core = make_core([4, 4, 4])
    core.predict(core.position_of(0, 0), [ExpertKey(0, 0), ExpertKey(0, 1), ExpertKey(0, 2)], 100 * PAGE)
    for _ in range(8):
        drive(core)
    needs = core.gate(0, [0, 1])
    assert (total(core).copied, total(core).useful) == (8 * PAGE, 8 * PAGE), "all of 0 and two pages of 1"
    core.ask(needs.missing[0], Part.WHOLE)
    while drive(core) is not None:
        pass
    assert (total(core).copied, total(core).useful) == (8 * PAGE, 8 * PAGE), "the rest of 1 was waited for"
    assert (total(core).issued, total(core).on_time, total(core).late) == (3, 1, 1)


@pytest.mark.parametrize("landed", [False, True])
def test_bytes_of_a_late_copy_that_is_given_up_are_not_useful(landed: bool) -> None:
    core = make_core([4, 4, 4])
    core.predict(core.position_of(0, 0), [ExpertKey(0, 0)], 100 * PAGE)
    for _ in range(2):
        drive(core)
    out = core.next_chunk(PAGE)
    assert out is not None
    core.gate(0, [0])
    if landed:
        core.landed(out)
    assert total(core).useful == (3 if landed else 2) * PAGE
    core.ask(ExpertKey(0, 0), Part.UP)
    if not landed:
        core.landed(out)
    assert (total(core).copied, total(core).useful) == (3 * PAGE, 0)
    while drive(core):
        pass
    assert (total(core).copied, total(core).useful, total(core).late) == (3 * PAGE, 0, 1)


def test_the_misses_of_a_ghost_are_counted_where_something_is_predicted_and_predictions_change_none() -> None:
    def absent(config: Config, *predicted: int) -> int:
        tables = [SlotTable(range(2), make_policy("lru", {}))]
        core = cores.make_core(config, tables, lambda transfer: Cuts(ends=(4096,)))
        for experts in ([0, 1], [0, 2], [2]):
            core.predict(core.position_of(0, 0), [ExpertKey(0, e) for e in predicted], 1e9)
            while (chunk := core.next_chunk(4096, 4096)) is not None:
                if core.landed(chunk):
                    core.finished(chunk.transfer)
            needs = core.gate(0, experts)
            core.release(needs.resident)
        return core.absent

    assert absent(Config()) == absent(Config(), 1) == absent(Config(), 2, 0) == 3
    assert absent(Config(predictor="none")) == absent(Config(always_predict=True)) == 0
