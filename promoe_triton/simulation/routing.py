"""Which experts tokens choose, and which are predicted for them: made up to stated statistics, cut into passes.

Letters: T tokens, L layers, E experts, A active ones, H distances.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from promoe_triton.protocols import ExpertKey
from promoe_triton.traces import Document

Ids = NDArray[np.int16]


def recorded_ids(document: Document, layer: int, experts: int) -> Ids:
    """Return what a document's tokens chose in a layer of so many experts, int16 [T, A]; -1: no expert."""
    ids_TA = document.expert_ids_TA(layer).numpy()
    return np.where(ids_TA < experts, ids_TA, -1).astype(np.int16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """A text as a model routes it.

    ids: by layer, int16 [T, A]; -1: no expert. named: by distance - 1 and layer, int16 [T, A], what is predicted for a
    layer from so many layers before it, most likely first; empty: nothing is predicted.
    """

    ids: Sequence[Ids]
    named: Sequence[Sequence[Ids]] = ()

    def __len__(self) -> int:
        return len(self.ids[0])

    def first(self, tokens: int) -> Routed:
        """Return the first so many tokens."""
        return Routed(ids=[i[:tokens] for i in self.ids], named=[[i[:tokens] for i in h] for h in self.named])

    @property
    def truth(self) -> Routed:
        """The same, with a perfect predictor."""
        return Routed(ids=self.ids, named=[self.ids] * 64)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Tokens that go through the model together: a prompt, or one token of each of several texts.

    context: tokens before them, in each of so many `texts`. ids, named: as in `Routed`, of these tokens.
    """

    prefill: bool
    context: int
    texts: int
    tokens: int
    ids: Sequence[Ids]
    named: Sequence[Sequence[Ids]]

    def rows(self, layer: int) -> dict[int, int]:
        """Return how many rows each expert has in a layer: for one token in the order chosen, else by number."""
        if self.tokens == 1:
            return dict.fromkeys([e for e in self.ids[layer][0].tolist() if e >= 0], 1)
        ids_TA = self.ids[layer]
        experts, counts = np.unique(ids_TA[ids_TA >= 0], return_counts=True)
        return dict(zip(experts.tolist(), counts.tolist(), strict=True))

    def ranked(self, distance: int, layer: int, experts: int) -> list[int]:
        """Return what was predicted for a layer from so many layers before it, most likely first."""
        if distance > len(self.named):
            return []
        ids_TA = self.named[distance - 1][layer]
        if len(ids_TA) == 1:
            return [e for e in ids_TA[0].tolist() if e >= 0]
        # Those that most tokens will want come first (paper: the scores of a batch are summed and ranked).
        weight_TA = np.broadcast_to(1.0 / (1.0 + 0.01 * np.arange(ids_TA.shape[1])), ids_TA.shape)
        known = ids_TA >= 0
        scores_E = np.bincount(ids_TA[known], weights=weight_TA[known], minlength=experts)
        return [e for e in np.argsort(-scores_E, kind="stable").tolist() if scores_E[e] > 0]


def passes(texts: Sequence[Routed], *, prompt: int, batch: int = 1) -> Iterator[Pass]:
    """Cut texts into passes, `batch` of them side by side: a prompt each, then a token at a time.

    Raises ValueError where a text has no token beyond its prompt.
    """
    if prompt < 1 or batch < 1:
        raise ValueError(f"prompt and batch must be at least 1, got {prompt} and {batch}")
    for first in range(0, len(texts) - batch + 1, batch):
        beside = texts[first : first + batch]
        length = min(map(len, beside))
        if length <= prompt:
            raise ValueError(f"a text of {length} tokens has none to decode after a prompt of {prompt}")
        yield _cut(beside, 0, prompt, prefill=True)
        for token in range(prompt, length):
            yield _cut(beside, token, token + 1, prefill=False)


def _cut(texts: Sequence[Routed], begin: int, end: int, prefill: bool) -> Pass:
    def joined(ids: Sequence[Ids]) -> Ids:
        return ids[0][begin:end] if len(ids) == 1 else np.concatenate([one[begin:end] for one in ids])

    L, H = len(texts[0].ids), 0 if prefill else len(texts[0].named)
    return Pass(
        prefill=prefill,
        context=begin,
        texts=len(texts),
        tokens=len(texts) * (end - begin),
        ids=[joined([text.ids[i] for text in texts]) for i in range(L)],
        named=[[joined([text.named[h][i] for text in texts]) for i in range(L)] for h in range(H)],
    )


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What made-up routing is like.

    popularity: share of all choices that fall to the most popular quarter of a layer's experts (0.25: all alike).
    reuse: share of a token's experts that the token before it chose as well. accuracy: by distance from 1 on, the share
    of the experts predicted that are chosen.
    """

    popularity: float = 0.45
    reuse: float = 0.35
    accuracy: tuple[float, ...] = (0.847, 0.797, 0.747, 0.697)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.25 <= self.popularity < 1 or not 0 <= self.reuse < 1:
            raise ValueError(
                f"popularity must be in [0.25, 1) and reuse in [0, 1), got {self.popularity} and {self.reuse}"
            )
        if not all(0 < share <= 1 for share in self.accuracy):
            raise ValueError(f"accuracies must be in (0, 1], got {self.accuracy}")


class Synthetic:
    """Routing from scores: each expert's popularity, and a state that moves slowly from token to token.

    A token chooses the A experts with the largest scores; a prediction is made from the scores with noise, so that it
    errs where a choice was close. How unequal popularity is, how slowly the state moves and how much noise there is
    follow from the statistics asked for, by bisection on a sample.
    """

    def __init__(self, statistics: Statistics, layers: Sequence[tuple[int, int]]) -> None:
        """layers: E and A of each."""
        self._layers = layers
        self._statistics = statistics
        self._rng = np.random.default_rng(statistics.seed)
        self._popularity = [self._rng.standard_normal(E) for E, _ in layers]
        self._laws = {pair: _Law(statistics, *pair) for pair in dict.fromkeys(layers)}

    def text(self, tokens: int) -> Routed:
        """Return a text that is independent of all others, but for the experts' popularity."""
        ids: list[Ids] = []
        named: list[list[Ids]] = [[] for _ in self._statistics.accuracy]
        for (E, A), popularity_E in zip(self._layers, self._popularity, strict=True):
            law = self._laws[E, A]
            scores_TE = law.scores(self._rng, popularity_E, tokens)
            ids.append(_best(scores_TE, A))
            for h, noise in enumerate(law.noises):
                named[h].append(_best(scores_TE + noise * self._rng.standard_normal(scores_TE.shape), A))
        return Routed(ids=ids, named=named)

    def texts(self, count: int, tokens: int) -> list[Routed]:
        return [self.text(tokens) for _ in range(count)]


class _Law:
    """The parameters that give the statistics asked for, for layers of E experts of which A are chosen."""

    SAMPLE = 1500

    def __init__(self, statistics: Statistics, E: int, A: int) -> None:
        self._E, self._A = E, A
        self.skew = self.pull = 0.0
        self.skew = _solve(lambda skew: self._popular(skew), statistics.popularity, 0.0, 8.0)
        self.pull = _solve(lambda pull: self._reused(pull), statistics.reuse, 0.0, 0.9999)
        self.noises = [_solve(lambda noise: -self._accuracy(noise), -share, 0.0, 16.0) for share in statistics.accuracy]

    def scores(self, rng: np.random.Generator, popularity_E: NDArray[np.float64], tokens: int) -> NDArray[np.float64]:
        state_TE = rng.standard_normal((tokens, self._E))
        fresh = np.sqrt(1.0 - self.pull**2)
        for token in range(1, tokens):
            state_TE[token] = self.pull * state_TE[token - 1] + fresh * state_TE[token]
        return state_TE + self.skew * popularity_E

    @cached_property
    def _ranked_E(self) -> NDArray[np.float64]:
        """Popularity as a normal variable has it: the sample's own luck is no part of it."""
        from statistics import NormalDist

        return np.array([NormalDist().inv_cdf((e + 0.5) / self._E) for e in range(self._E)])

    def _sample(self) -> NDArray[np.float64]:
        return self.scores(np.random.default_rng(1), self._ranked_E, self.SAMPLE)

    def _popular(self, skew: float) -> float:
        self.skew = skew
        counts_E = np.bincount(_best(self._sample(), self._A).ravel(), minlength=self._E)
        return float(np.sort(counts_E)[-max(self._E // 4, 1) :].sum() / counts_E.sum())

    def _reused(self, pull: float) -> float:
        self.pull = pull
        chosen_TE = _chosen(_best(self._sample(), self._A), self._E)
        return float((chosen_TE[1:] & chosen_TE[:-1]).sum() / chosen_TE[1:].sum())

    def _accuracy(self, noise: float) -> float:
        scores_TE = self._sample()
        guess_TE = scores_TE + noise * np.random.default_rng(2).standard_normal(scores_TE.shape)
        chosen_TE = _chosen(_best(scores_TE, self._A), self._E)
        return float((chosen_TE & _chosen(_best(guess_TE, self._A), self._E)).sum() / chosen_TE.sum())


def _solve(share: object, wanted: float, low: float, high: float) -> float:
    """Return where a rising function of one variable reaches a value; an end where it never does."""
    assert callable(share)
    for _ in range(18):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) < wanted else (low, middle)
    return (low + high) / 2


def _best(scores_TE: NDArray[np.float64], A: int) -> Ids:
    """Return the A experts with the largest scores of each token, largest first."""
    found_TA = np.argpartition(-scores_TE, A - 1, axis=1)[:, :A]
    order_TA = np.argsort(-np.take_along_axis(scores_TE, found_TA, 1), axis=1)
    return np.take_along_axis(found_TA, order_TA, 1).astype(np.int16)


def _chosen(ids_TA: Ids, E: int) -> NDArray[np.bool_]:
    chosen_TE = np.zeros((len(ids_TA), E), dtype=bool)
    np.put_along_axis(chosen_TE, ids_TA.astype(np.int64), True, 1)
    return chosen_TE


def popularity_of(texts: Iterable[Routed]) -> dict[ExpertKey, float]:
    """Return how often each expert was chosen."""
    found: dict[ExpertKey, float] = {}
    for text in texts:
        for layer, ids_TA in enumerate(text.ids):
            experts, counts = np.unique(ids_TA, return_counts=True)
            for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
                key = ExpertKey(layer, expert)
                found[key] = found.get(key, 0.0) + count
    return found
