"""A trace shown to a predictor as a model shows it while it decodes: one token at a time, seam by seam.

Letters: T tokens of a document, K experts named, A active ones, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from promoe_triton.predictors.bounds import Recording
from promoe_triton.predictors.reach import RoutedLayers
from promoe_triton.protocols import Observation, Predictor, Seam
from promoe_triton.simulation.routing import Ids, recorded_ids
from promoe_triton.traces import Document


@dataclass(frozen=True, slots=True, order=True)
class From:
    """Where a prediction was made. ahead: layers from there to the one it speaks of, through the end of a token."""

    seam: str
    ahead: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replayed:
    """One document. chosen: by layer, int16 [T, A]. named: for each layer, from where it was spoken of: int16 [T, K].

    Row t is what was named for token t, most likely first; -1: no expert.
    """

    chosen: Sequence[Ids]
    named: Sequence[Mapping[From, Ids]]


def replay(document: Document, layers: RoutedLayers, predictor: Predictor, width: int) -> Replayed:
    """Show a document to a predictor. width: K, how many of the experts it names are kept."""
    chosen = [recorded_ids(document, layer, E) for layer, E in enumerate(layers.experts)]
    named: list[dict[From, Ids]] = [{} for _ in layers.experts]
    firsts = {stack: layer for layer, stack in reversed(list(enumerate(layers.stacks)))}
    lengths = {stack: layers.stacks.count(stack) for stack in firsts}
    for token, seen in _observations(document, layers, firsts):
        for prediction in predictor.predict(seen):
            row = token + prediction.steps
            if row >= document.tokens:
                continue
            stack = layers.stacks[prediction.layer]
            ahead = prediction.layer - seen.layer + prediction.steps * lengths[stack]
            place = From(seen.seam.name.lower(), ahead)
            ids_TK = named[prediction.layer].get(place)
            if ids_TK is None:
                ids_TK = named[prediction.layer][place] = np.full((document.tokens, width), -1, np.int16)
            ids = prediction.expert_ids[:width].tolist()
            ids_TK[row, : len(ids)] = ids
    return Replayed(chosen=chosen, named=named)


def _observations(
    document: Document, layers: RoutedLayers, firsts: Mapping[str, int]
) -> Iterator[tuple[int, Observation]]:
    """Yield what a decoding model passes by, with the number of its token."""
    L = len(layers.experts)
    lasts = {stack: layer for layer, stack in enumerate(layers.stacks)}
    tokens_T = document.token_ids_T.long()
    entered = {layer: document.entered_TD(layer) for layer in firsts.values()}
    states = [document.state_TD(layer) for layer in range(L)]
    ids = [document.expert_ids_TA(layer) for layer in range(L)]
    left_TD = document.left_TD() if len(firsts) == 1 else None
    for t in range(document.tokens):
        now = slice(t, t + 1)
        for layer in range(L):
            stack = layers.stacks[layer]
            before_TD, state_TD = entered.get(layer), states[layer]
            if before_TD is not None:
                yield t, Observation(layer=layer, seam=Seam.ENTERED, state_TD=before_TD[now], token_ids_T=tokens_T[now])
            yield (
                t,
                Observation(
                    layer=layer,
                    state_TD=None if state_TD is None else state_TD[now],
                    expert_ids_TA=ids[layer][now],
                    token_ids_T=tokens_T[now],
                ),
            )
            if left_TD is not None and layer == lasts[stack]:
                yield t, Observation(layer=layer, seam=Seam.LEFT, state_TD=left_TD[now], token_ids_T=tokens_T[now])


def recording(document: Document, layers: int) -> Recording:
    """Return a document as a run of single tokens, for an oracle."""
    ids = [document.expert_ids_TA(layer) for layer in range(layers)]
    return [{layer: ids[layer][t : t + 1] for layer in range(layers)} for t in range(document.tokens)]
