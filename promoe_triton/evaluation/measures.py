"""What predictions and caches come to on replayed documents, as rows of one table.

Letters: T tokens, K experts named, A active ones, E experts, N rows looked at together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from promoe_triton.evaluation.caches import Mask, hit_ratio
from promoe_triton.evaluation.replay import From, Replayed
from promoe_triton.simulation.routing import Ids

ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One number.

    text: which trace. predictor, policy, slots (a share): of what it is, empty where it does not matter. source, ahead:
    from where layers were spoken of, and how far ahead that is. layer: which one, or "all". k: of how many experts.
    """

    text: str
    metric: str
    value: float
    predictor: str = ""
    source: str = ""
    ahead: int = 0
    layer: str = ALL
    k: int = 0
    policy: str = ""
    slots: float = 1.0


def accuracy(text: str, predictor: str, documents: Sequence[Replayed], active: Sequence[int]) -> Iterator[Row]:
    """Yield for every source and layer, and all layers of a source: accuracy@k and recall@k, at A / 2, A and 2 A.

    accuracy@k: share of the k experts named first that were chosen. recall@k: share of the chosen ones among them.
    """
    for place in _places(documents):
        for layer, pairs in _by_layer(documents, place):
            A = active[layer if layer >= 0 else 0]
            hit_NK, asked_N = _right(pairs)
            for k in sorted({max(A // 2, 1), A, min(2 * A, hit_NK.shape[1])}):
                right = float(hit_NK[:, :k].sum())
                named = f"{layer}" if layer >= 0 else ALL
                common = {"text": text, "predictor": predictor, "source": place.seam, "ahead": place.ahead}
                yield Row(metric="accuracy", value=right / (k * len(hit_NK)), layer=named, k=k, **common)  # type: ignore[arg-type]
                yield Row(metric="recall", value=right / float(asked_N.sum()), layer=named, k=k, **common)  # type: ignore[arg-type]


def calibration(text: str, predictor: str, documents: Sequence[Replayed]) -> Iterator[Row]:
    """Yield by rank what share of the experts named at it was chosen."""
    for place in _places(documents):
        hit_NK, _ = _right([pair for layer, pairs in _by_layer(documents, place) if layer < 0 for pair in pairs])
        for rank, share in enumerate(hit_NK.mean(0).tolist(), 1):
            yield Row(
                text=text,
                predictor=predictor,
                metric="chosen at rank",
                value=share,
                source=place.seam,
                ahead=place.ahead,
                k=rank,
            )


def on_misses(
    text: str,
    predictor: str,
    documents: Sequence[Replayed],
    resident: Sequence[Sequence[Mask]],
    active: int,
    policy: str,
    slots: float,
) -> Iterator[Row]:
    """Yield the same for experts that a cache does not hold: precision of those named, recall of those missed.

    resident: by document and layer, bool [T, E]. Of the experts named first, A (also by layer) and 2 A are looked at.
    """
    for place in _places(documents):
        for k in (active, 2 * active):
            by_layer: dict[str, NDArray[np.int64]] = {}
            for document, masks in zip(documents, resident, strict=True):
                for layer, found in enumerate(document.named):
                    if place in found:
                        known_T = found[place][:, 0] >= 0
                        one = _missed(found[place][known_T, :k], document.chosen[layer][known_T], masks[layer][known_T])
                        by_layer[f"{layer}"] = by_layer.get(f"{layer}", _NONE) + one
            common = {"text": text, "predictor": predictor, "source": place.seam, "ahead": place.ahead}
            common |= {"k": k, "policy": policy, "slots": slots}
            for which, (right, named, missed) in [*by_layer.items(), (ALL, sum(by_layer.values(), _NONE))]:
                if named and missed and (which == ALL or k == active):
                    yield Row(metric="precision on misses", value=right / named, layer=which, **common)  # type: ignore[arg-type]
                    yield Row(metric="recall on misses", value=right / missed, layer=which, **common)  # type: ignore[arg-type]


_NONE = np.zeros(3, np.int64)


def _missed(named_TK: Ids, chosen_TA: Ids, resident_TE: Mask) -> NDArray[np.int64]:
    """Return, [3], how many of the experts named were missed and chosen, how many were absent, how many were missed."""
    absent_TE = ~resident_TE
    wanted_TE = _mask(chosen_TA, resident_TE.shape[1]) & absent_TE
    guessed_TE = _mask(named_TK, resident_TE.shape[1]) & absent_TE
    return np.array([(wanted_TE & guessed_TE).sum(), guessed_TE.sum(), wanted_TE.sum()])


def hits(
    text: str, policy: str, slots: float, documents: Sequence[Replayed], resident: Sequence[Sequence[Mask]]
) -> Iterator[Row]:
    """Yield hit ratios of a cache, by layer and of all."""
    ratios = []
    for layer in range(len(documents[0].chosen)):
        chosen_NA = np.concatenate([document.chosen[layer] for document in documents])
        resident_NE = np.concatenate([masks[layer] for masks in resident])
        ratios.append(hit_ratio(resident_NE, chosen_NA))
        yield Row(text=text, metric="hit ratio", value=ratios[-1], layer=f"{layer}", policy=policy, slots=slots)
    yield Row(text=text, metric="hit ratio", value=float(np.mean(ratios)), policy=policy, slots=slots)


def _places(documents: Sequence[Replayed]) -> list[From]:
    return sorted({place for document in documents for found in document.named for place in found})


Pair = tuple[Ids, Ids]


def _by_layer(documents: Sequence[Replayed], place: From) -> Iterator[tuple[int, list[Pair]]]:
    """Yield (named, chosen) of every layer spoken of from a place, of the tokens it was spoken of; last -1: of all."""
    every: list[Pair] = []
    for layer in range(len(documents[0].chosen)):
        pairs = []
        for document in documents:
            named_TK = document.named[layer].get(place)
            if named_TK is not None:
                known_T = named_TK[:, 0] >= 0
                pairs.append((named_TK[known_T], document.chosen[layer][known_T]))
        if pairs:
            yield layer, pairs
        every += pairs
    yield -1, every


def _right(pairs: Sequence[Pair]) -> tuple[Mask, NDArray[np.int64]]:
    """Return which of the experts named were chosen, [N, K], and how many were chosen, [N]."""
    named_NK, chosen_NA = (np.concatenate([pair[i] for pair in pairs]) for i in range(2))
    hit_NK = ((named_NK[:, :, None] == chosen_NA[:, None, :]) & (named_NK[:, :, None] >= 0)).any(-1)
    return hit_NK, (chosen_NA >= 0).sum(1)


def _mask(ids_TK: Ids, experts: int) -> Mask:
    found_TE = np.zeros((len(ids_TK), experts + 1), dtype=bool)
    np.put_along_axis(found_TE, np.where(ids_TK < 0, experts, ids_TK).astype(np.int64), True, 1)
    return found_TE[:, :-1]


def named_at(places: Mapping[From, Ids], place: From, like: Ids, active: int) -> Ids:
    """Return what was named from a place, at most A experts; nothing where it said nothing."""
    found = places.get(place)
    return np.full((len(like), active), -1, np.int16) if found is None else found[:, :active]
