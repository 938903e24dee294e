"""All predictors and policies side by side on a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from promoe_triton.config import Config
from promoe_triton.errors import PromoeError
from promoe_triton.evaluation import goodpred
from promoe_triton.evaluation.caches import BELADY, Mask, resident
from promoe_triton.evaluation.measures import Row, accuracy, calibration, hits, named_at, on_misses
from promoe_triton.evaluation.replay import From, Replayed, recording, replay
from promoe_triton.policies import POLICIES
from promoe_triton.predictors.bounds import NoPredictor, OraclePredictor
from promoe_triton.predictors.reach import Reach, RoutedLayers
from promoe_triton.protocols import Predictor
from promoe_triton.simulation.routing import Routed, popularity_of
from promoe_triton.traces import Document, Trace

ORACLE, NONE, GATE = "oracle", "none", "gate"
PREDICTED, BY_GATE = "predicted", "predicted, by the gate"
"""The policy that goes by predictions: those of the predictor that is trusted, and those that every model has."""
WARM = 0.25
"""The share of the documents that only fill caches and tables, and are not counted."""
SIMULATED = 6
"""Documents decoded on a virtual clock, of those long enough; the first fills the cache, and does not count."""
AHEAD = Config().distance
"""Layers ahead that a running model is told of by default, and so the policy here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked. layers: of the model. predictors: by name, each made anew for a trace.

    slots: shares of the experts. distance: layers ahead. link: experts that the link brings while one layer computes.
    trusted: the predictor whose predictions the policy "predicted" goes by.
    """

    layers: RoutedLayers
    predictors: Mapping[str, Callable[[], Predictor]]
    trusted: str
    slots: Sequence[float] = (0.125, 0.25, 0.375, 0.5, 0.75)
    distance: int = 4
    link: float = 3.0

    @property
    def every(self) -> list[str]:
        return [*self.predictors, ORACLE, NONE]

    @property
    def policies(self) -> list[str]:
        """Return the policies that are compared."""
        return [*POLICIES, *([BY_GATE] if self.trusted != GATE else []), BELADY]

    @property
    def width(self) -> int:
        """How many of the experts named are looked at: two for each that is chosen."""
        return min(2 * max(self.layers.active), max(self.layers.experts))


@dataclass(slots=True)
class _Text:
    name: str
    question: Question
    documents: list[Document]
    replayed: dict[str, list[Replayed]] = field(default_factory=dict)

    @property
    def warm(self) -> int:
        return max(round(WARM * len(self.documents)), 1)

    def counted(self, predictor: str) -> list[Replayed]:
        return self.replayed[predictor][self.warm :]


def compare(
    trace: Trace,
    name: str,
    question: Question,
    documents: int | None = None,
    step: Callable[[str], None] = lambda what: None,
) -> Iterator[Row]:
    """Yield all that there is to say of one trace, called `name` in the rows. step: told after each of `steps`.

    Raises PromoeError where the trace is of other layers, or has less than three documents.
    """
    layers = question.layers
    if [(layer.experts, layer.active) for layer in trace.layers] != list(
        zip(layers.experts, layers.active, strict=True)
    ):
        raise PromoeError(f"the trace in {trace.folder} is of another model: {trace.about.get('model')}")
    found = [document for document, _ in zip(trace.read(), range(documents or trace.documents), strict=False)]
    if len(found) < 3:
        raise PromoeError(f"the trace in {trace.folder} has {len(found)} documents to look at, and three are needed")
    text = _Text(name, question, found)
    for predictor in question.every:
        text.replayed[predictor] = _replayed(text, predictor)
        step(f"{name}: {predictor}")
    caches = {}
    for policy in question.policies:
        for share in question.slots:
            masks = _resident(text, policy, share)
            yield from hits(name, policy, share, text.counted(NONE), masks)
            if policy != BY_GATE:
                caches[policy, share] = masks
        step(f"{name}: caches by {policy}")
    for predictor in question.every:
        if predictor != NONE:
            yield from _of_predictor(text, predictor, caches)
        yield from _in_time(text, predictor)
        step(f"{name}: GOODPRED of {predictor}")


def steps(question: Question) -> int:
    """Return how many steps `compare` tells of."""
    return 2 * len(question.every) + len(question.policies)


def _replayed(text: _Text, predictor: str) -> list[Replayed]:
    layers, width = text.question.layers, text.question.width
    if predictor == ORACLE:
        reach = Reach(distance=text.question.distance)
        oracles = [
            OraclePredictor(recording(document, len(layers.experts)), layers, reach) for document in text.documents
        ]
        return [
            replay(document, layers, oracle, width) for document, oracle in zip(text.documents, oracles, strict=True)
        ]
    asked = text.question.predictors.get(predictor, NoPredictor)()
    return [replay(document, layers, asked, width) for document in text.documents]


def _resident(text: _Text, policy: str, share: float) -> list[list[Mask]]:
    """Return by counted document and layer which experts are in slots."""
    layers, told = text.question.layers, text.replayed[GATE if policy == BY_GATE else text.question.trusted]
    policy = PREDICTED if policy == BY_GATE else policy
    found: list[list[Mask]] = [[] for _ in told]
    for layer, (E, A) in enumerate(zip(layers.experts, layers.active, strict=True)):
        chosen = [document.chosen[layer] for document in told]
        lengths = [len(ids_TA) for ids_TA in chosen]
        popularity = popularity_of(Routed(ids=[ids_TA]) for ids_TA in chosen[: text.warm])
        places = [From("left", layer + 1), *(From("routed", ahead) for ahead in range(AHEAD, 0, -1))]
        named = [
            np.concatenate([named_at(document.named[layer], place, document.chosen[layer], A) for document in told])
            for place in places
        ]
        masks = resident(policy, max(round(share * E), 1), np.concatenate(chosen), E, popularity, named)
        begin = 0
        for place, length in enumerate(lengths):
            found[place].append(masks[begin : begin + length])
            begin += length
    return found[text.warm :]


def _of_predictor(
    text: _Text, predictor: str, caches: Mapping[tuple[str, float], Sequence[Sequence[Mask]]]
) -> Iterator[Row]:
    active = text.question.layers.active
    documents = text.counted(predictor)
    yield from accuracy(text.name, predictor, documents, active)
    yield from calibration(text.name, predictor, documents)
    for (policy, share), masks in caches.items():
        if policy != BELADY:
            yield from on_misses(text.name, predictor, documents, masks, max(active), policy, share)


def _in_time(text: _Text, predictor: str) -> Iterator[Row]:
    question = text.question
    documents = [one for one in text.counted(predictor) if len(one.chosen[0]) > goodpred.PROMPT][:SIMULATED]
    if len(documents) < 2:
        return
    for only in (None,) if predictor == NONE else (None, *range(1, question.distance + 1)):
        outcome, timely = goodpred.run(
            documents,
            question.layers.experts,
            question.layers.active,
            slots=0.5,
            link=question.link,
            distances=only or AHEAD,
            only=only,
        )
        for metric, value in (
            ("GOODPRED", timely.goodpred),
            ("fetch rate", timely.fetch_rate),
            ("needed of what was copied", outcome.accuracy),
            ("in time of what was needed", outcome.fetch_rate),
            ("seconds per token", outcome.tpot_seconds),
        ):
            if value == value:
                yield Row(
                    text=text.name,
                    predictor=predictor,
                    metric=metric,
                    value=value,
                    ahead=only or 0,
                    policy="lru",
                    slots=0.5,
                )
