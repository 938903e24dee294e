"""A model that runs on a virtual clock: routed as a text was, with the runtime's own core, waves and speculation."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from statistics import fmean
from typing import Any

from promoe_triton.budget import first_experts
from promoe_triton.chunking import BUS_LATENCY
from promoe_triton.config import Config
from promoe_triton.core import Core, Tally, make_core
from promoe_triton.counters import Ahead, Counters
from promoe_triton.links.fake import DryFiller, FakeLink, Wire
from promoe_triton.policies import make_policy
from promoe_triton.protocols import ExpertKey, Part, Seam, expert_key
from promoe_triton.simulation.costs import Costs
from promoe_triton.simulation.routing import Pass
from promoe_triton.simulation.shapes import ModelShape
from promoe_triton.speculation import PROMPT, Place, Ranking, Speculation
from promoe_triton.techniques import Step
from promoe_triton.waves import RECENT, Waves


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run came to.

    ttft_seconds, tpot_seconds: means over prompts and decode steps (nan: there was none). tps: tokens per second
    while decoding. stall_seconds: of waiting, computing_seconds: of all else where nothing is copied meanwhile,
    moving_seconds: that the link needs for what was of use; over the whole run. on_time, late: what was copied ahead
    and needed (late: a miss). bytes_moved: over the link; bytes_ahead of them ahead of need, of those bytes_wasted for
    nothing, and bytes_unproven for what nobody has needed yet.
    """

    seconds: float
    ttft_seconds: float
    tpot_seconds: float
    tps: float
    stall_seconds: float
    computing_seconds: float
    moving_seconds: float
    hits: int
    misses: int
    on_time: int
    late: int
    bytes_moved: int
    bytes_ahead: int
    bytes_wasted: int
    bytes_unproven: int
    accuracy: float
    fetch_rate: float
    goodpred: float

    @property
    def hit_ratio(self) -> float:
        return self.hits / (self.hits + self.misses)

    def hidden(self, reactive: Outcome) -> float:
        """Return the share of what can be hidden that was: (T_reactive - T) / (T_reactive - T_limit)."""
        limit = max(self.computing_seconds, self.moving_seconds)
        hideable = reactive.seconds - limit
        return (reactive.seconds - self.seconds) / hideable if hideable > 0 else float("nan")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"hit_ratio": self.hit_ratio}


class SimulatedLayer:
    """One MoE layer: what `Waves` serves, without weights."""

    def __init__(self, model: Simulator, index: int, experts: int) -> None:
        self._model = model
        self.index = index
        self.experts = experts
        self.keys = [expert_key(index, expert) for expert in range(experts)]
        self.resident = False
        self.step: Step = model.config.step
        self.core: Core = model.core
        self.link: FakeLink = model.link
        self.counters: Counters = model.counters

    def has(self, part: Part) -> bool:
        return True

    def place(self, keys: Sequence[ExpertKey]) -> None:
        pass

    def remove(self, expert: int) -> None:
        pass

    def waited(self, began: float) -> None:
        pass

    def dropped(self, keys: Sequence[ExpertKey]) -> None:
        pass

    def check_resident(self) -> None:
        if not self._model.shared:
            self.resident = self.core.tables[self.index].holds(self.keys)


@dataclass(slots=True)
class _Totals:
    began: float = 0.0
    bytes_before: int = 0
    tallies: list[Tally] = field(default_factory=list)
    computing: float = 0.0
    prompts: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    decoded: int = 0


class Simulator:
    """One model with its slots and its link. Runs on from where the last run ended.

    config: as at run time, with the latency of a bus where it leaves that open; of it device, store and backend mean
    nothing here, and of predictors only whether there is one: predictions come with the passes. memory: bytes that
    slots may take where the configuration leaves their number open. slowed, link_slowed: how much longer computing
    takes while copies are in flight, and they while it goes on.
    """

    def __init__(
        self,
        shape: ModelShape,
        costs: Costs,
        wire: Wire,
        config: Config,
        *,
        popularity: Mapping[ExpertKey, float] | None = None,
        memory: float = 0.0,
        slowed: float = 1.0,
        link_slowed: float = 1.0,
    ) -> None:
        self.shape, self.config = shape, config
        self._costs, self._wire, self._slowed, self._link_slowed = costs, wire, slowed, link_slowed
        self._popularity = popularity or {}
        self.budget = shape.budget(config, int(memory))
        self.shared = self.budget.shared
        cuts = functools.cache(shape.cuts)
        filler = DryFiller(lambda transfer: cuts(transfer.key.layer, transfer.part))
        self.link = FakeLink(filler, wire, depth=config.depth, chunking=config.cuts(BUS_LATENCY))
        tables = self.budget.tables(shape.specs(), lambda: make_policy(config.replacement, self._popularity))
        self.core = make_core(config, tables, self.link.cuts)
        self.link.restart(self.core)
        self.counters = Counters(now=self.link.now)
        self.layers = [SimulatedLayer(self, i, layer.experts) for i, layer in enumerate(shape.layers)]
        self._prefetch = config.predicts
        self._speculation = Speculation(config.always_predict)
        if config.warm:
            self._warm()
        self._totals = _Totals()
        self.reset()

    def _warm(self) -> None:
        link = self.link
        for key in first_experts(self.core.tables, [layer.keys for layer in self.layers], self._popularity):
            transfer = link.tell(lambda key=key: self.core.ask(key, Part.WHOLE))  # type: ignore[misc]
            link.wait([transfer])
            link.tell(lambda key=key: self.core.release([key]))  # type: ignore[misc]
        for layer in self.layers:
            layer.check_resident()

    def reset(self) -> None:
        """Count from here on."""
        self.counters = Counters(now=self.link.now)
        for layer in self.layers:
            layer.counters = self.counters
        self._totals = _Totals(began=self.link.now(), bytes_before=self.link.bytes_moved, tallies=self.core.tallies())

    def run(self, passes: Iterable[Pass]) -> Outcome:
        """Run some passes, and return what all since the last reset have come to."""
        for this, following in pairwise((*passes, None)):
            assert this is not None
            began = self.link.now()
            self._pass(this, following)
            taken = self.link.now() - began
            if this.prefill:
                self._totals.prompts.append(taken)
            else:
                self._totals.steps.append(taken)
                self._totals.decoded += this.tokens
        return self._outcome()

    def _pass(self, this: Pass, following: Pass | None) -> None:
        settled = all(layer.resident for layer in self.layers)
        for layer in self.layers:
            self._compute(self._costs.layer(this.tokens, this.context, this.texts))
            self._layer(layer, this, settled)
        if not settled and following is not None and not following.prefill:
            ahead = (self._ranking(following, layer, 1, distance=layer.index + 1) for layer in self._first())
            self._speculate(Place(len(self.layers) - 1, Seam.LEFT), following.tokens, ahead)
        self._compute(self._costs.head(this.tokens))

    def _first(self) -> Sequence[SimulatedLayer]:
        return self.layers[: self.config.distance]

    def _layer(self, layer: SimulatedLayer, this: Pass, settled: bool) -> None:
        """The steps of `LayerRuntime.run`."""
        rows, costs, index = this.rows(layer.index), self._costs, layer.index
        self._compute(costs.call(this.tokens, settled))
        if settled:
            self.counters.hits += len(rows)
            self._wave(index, Part.UP, rows, rows)
            self._wave(index, Part.DOWN, rows, rows)
            return
        self._speculation.routed(index, this.tokens, self.link.now(), self.counters.stall_seconds, self.core.absent)
        recent = None
        if this.tokens >= PROMPT:
            recent = this.ids[index][-RECENT:].ravel().tolist()
        waves = Waves(layer, rows.keys(), recent)
        later = self.layers[index + 1 : index + 1 + self.config.distance]
        self._speculate(
            Place(index, Seam.ROUTED),
            this.tokens,
            (self._ranking(this, target, 0, distance=target.index - index) for target in later),
        )
        for wave in waves.up():
            self._wave(index, Part.UP, wave, rows)
        for wave in waves.down():
            self._wave(index, Part.DOWN, wave, rows)
        waves.close()

    def _wave(self, index: int, part: Part, wave: Collection[int], rows: Mapping[int, int]) -> None:
        if wave:
            self._compute(self._costs.product(index, part, [rows[expert] for expert in wave]))

    def _ranking(self, seen: Pass, target: SimulatedLayer, steps: int, distance: int) -> Ranking:
        if not self._prefetch or target.resident:
            return Ranking(steps, [])
        experts = seen.ranked(distance, target.index, target.experts)
        return Ranking(steps, [target.keys[expert] for expert in experts])

    def _speculate(self, place: Place, tokens: int, rankings: Iterable[Ranking]) -> None:
        """Act on what is predicted. rankings: made only where they are asked for."""
        if tokens >= PROMPT or self._speculation.leaves_out(place):
            return
        named = [ranking for ranking in rankings if ranking.experts]
        if named:
            self._compute(self._costs.predict(tokens))
            queue, link = self._speculation.queue, self.link
            link.tell(lambda: queue(self.core, place, tokens, named, link.bandwidth))

    def _compute(self, seconds: float) -> None:
        self._totals.computing += seconds
        self.link.pass_time(seconds, self._slowed, self._link_slowed)

    def _outcome(self) -> Outcome:
        totals, counters, link = self._totals, self.counters, self.link
        after, before = self.core.tallies(), totals.tallies

        def grown(name: str) -> int:
            return sum(getattr(a, name) - getattr(b, name) for a, b in zip(after, before, strict=True))

        ahead = Ahead.of([Tally(**{f.name: grown(f.name) for f in fields(Tally)})])
        moved = link.bytes_moved - totals.bytes_before
        useful = moved - ahead.bytes_wasted - grown("unproven")
        decoding = sum(totals.steps)
        return Outcome(
            seconds=link.now() - totals.began,
            ttft_seconds=fmean(totals.prompts) if totals.prompts else float("nan"),
            tpot_seconds=fmean(totals.steps) if totals.steps else float("nan"),
            tps=totals.decoded / decoding if decoding else float("nan"),
            stall_seconds=counters.stall_seconds,
            computing_seconds=totals.computing,
            moving_seconds=useful / self._wire.bandwidth,
            hits=counters.hits,
            misses=counters.misses,
            on_time=ahead.on_time,
            late=ahead.late,
            bytes_moved=moved,
            bytes_ahead=ahead.bytes_copied,
            bytes_wasted=ahead.bytes_wasted,
            bytes_unproven=grown("unproven"),
            accuracy=ahead.accuracy,
            fetch_rate=ahead.fetch_rate,
            goodpred=ahead.goodpred,
        )
