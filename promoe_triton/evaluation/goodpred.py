"""GOODPRED at each distance: what predictions come to once they have to arrive in time (paper, section on GOODPRED).

    GOODPRED = accuracy x fetch rate
    accuracy = of the A experts named for a layer and a token, the share that is then chosen
    fetch rate = of the same, the share that is in slots before the layer asks, copied ahead or not

The runtime's own core on a virtual clock, without a machine: all that matters is how many experts the link brings while
one layer computes, beside what the layers wait for. Letters: T tokens, A active experts, L layers, H distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from promoe_triton.config import Config
from promoe_triton.evaluation.measures import named_at
from promoe_triton.evaluation.replay import From, Replayed
from promoe_triton.links.fake import Wire
from promoe_triton.protocols import Part
from promoe_triton.simulation.routing import Pass, Routed, passes
from promoe_triton.simulation.shapes import LayerShape, ModelShape
from promoe_triton.simulation.simulator import Outcome, SimulatedLayer, Simulator

PROMPT = 32
"""Tokens of a document that go through the model at once, before the others are decoded."""
LAYER_SECONDS = 1e-3
HALF_BYTES = 1 << 20
"""Sizes and times of the layers simulated; only their ratio to the link's bandwidth means anything."""


@dataclass(frozen=True, slots=True)
class Even:
    """Every layer takes as long: two fifths until it routes, and the rest in equal parts for its experts."""

    active: int

    def layer(self, tokens: int, context: int, texts: int) -> float:
        return 0.4 * LAYER_SECONDS

    def call(self, tokens: int, settled: bool) -> float:
        return 0.0

    def product(self, layer: int, part: Part, rows: Sequence[int]) -> float:
        return 0.3 * LAYER_SECONDS * len(rows) / self.active

    def predict(self, tokens: int) -> float:
        return 0.0

    def head(self, tokens: int) -> float:
        return 0.0


@dataclass(frozen=True, slots=True)
class Timely:
    """Of the experts that were named at one distance: how many were chosen, and how many were there in time."""

    named: int
    chosen: int
    there: int

    @property
    def fetch_rate(self) -> float:
        return self.there / self.named if self.named else float("nan")

    @property
    def goodpred(self) -> float:
        return self.chosen / self.named * self.fetch_rate if self.named else float("nan")


class _Watched(Simulator):
    """Looks at each layer of a decode step, when it asks, whether what was named for it is there."""

    distance = 0
    named = chosen = there = 0

    def _layer(self, layer: SimulatedLayer, this: Pass, settled: bool) -> None:
        if self.distance and not this.prefill:
            ready = self.core.tables[layer.index].ready()
            rows = this.rows(layer.index)
            for expert in this.ranked(self.distance, layer.index, layer.experts):
                self.named += 1
                self.chosen += expert in rows
                self.there += layer.keys[expert] in ready
        super()._layer(layer, this, settled)


def routed(document: Replayed, active: Sequence[int], distances: int, only: int | None = None) -> Routed:
    """Return a document with what was named from routers' inputs, and for the first layers from the last one's output.

    only: the one distance of which predictions are kept.
    """
    named = []
    for h in range(1, distances + 1):
        by_layer = []
        for layer, places in enumerate(document.named):
            place = From("routed" if layer >= h else "left", h)
            found = named_at(places, place, document.chosen[layer], active[layer])
            by_layer.append(found if only in (None, h) else np.full_like(found, -1))
        named.append(by_layer)
    return Routed(ids=document.chosen, named=named)


def run(
    documents: Sequence[Replayed],
    experts: Sequence[int],
    active: Sequence[int],
    *,
    slots: float,
    link: float,
    distances: int,
    policy: str = "lru",
    only: int | None = None,
    prompt: int = PROMPT,
) -> tuple[Outcome, Timely]:
    """Decode documents, each after a prompt of its first tokens; the first fills the cache and does not count.

    link: experts that it brings while one layer computes. distances: how far ahead is predicted; only: at this distance
    alone, of which it is said then what was there in time.
    Raises ValueError where a document is not longer than its prompt.
    """
    shape = ModelShape(
        name="even",
        layers=tuple(
            LayerShape(experts=E, active=A, up_weights=2 * HALF_BYTES, down_weights=HALF_BYTES)
            for E, A in zip(experts, active, strict=True)
        ),
        decoder_layers=len(experts),
        dense_weights=0,
        head_weights=0,
        kv_weights=0,
        attention_width=0,
        bits=8.0,
        dense_bits=8.0,
    )
    config = Config(
        slots=slots, distance=distances, policy=policy, partition="layer", latency=LAYER_SECONDS, always_predict=True
    )
    wire = Wire(bandwidth=link * 3 * HALF_BYTES / LAYER_SECONDS, latency=0.0)
    simulator = _Watched(shape, Even(max(active)), wire, config)
    texts = [routed(document, active, distances, only) for document in documents]
    simulator.run(passes(texts[:1], prompt=prompt))
    simulator.reset()
    simulator.distance = only or 0
    outcome = simulator.run(passes(texts[1:], prompt=prompt))
    return outcome, Timely(simulator.named, simulator.chosen, simulator.there)
