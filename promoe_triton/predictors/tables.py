"""Predictors that learn tables while the model runs: what a token asks for, and what followed what.

Both keep frequencies in tables of a fixed size, and forget slowly: whenever a layer has routed another `HALF_LIFE`
tokens, all that was counted for it counts half. Everything stays where the observations are.

Letters: T tokens, A active experts per token, E experts (of the largest layer), L layers, H layers predicted at
once, C causes, W rows, N rows of one call, K experts named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from promoe_triton.predictors.passes import PassCounter
from promoe_triton.predictors.reach import Reach, RoutedLayers, Target
from promoe_triton.protocols import Observation, Prediction, Seam

HALF_LIFE = 1 << 16
"""Tokens routed until what was counted before them counts half."""


class _Table:
    """How often each of E experts was chosen after each of W causes, and after any, by layer.

    What a cause has not shown yet is taken from the layer's average, with the weight of one token. Single
    precision; the column E takes what stands for no expert.
    """

    def __init__(self, rows: int, layers: int, experts: int, device: torch.device) -> None:
        self._sums_WE = torch.zeros(rows, experts + 1, device=device)
        self._seen_W = torch.zeros(rows, device=device)
        self._usual_LE = torch.zeros(layers, experts + 1, device=device)
        self._tokens_L = torch.zeros(layers, device=device)
        self._learned = 0

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self._sums_WE, self._seen_W, self._usual_LE, self._tokens_L))

    def chosen(self, ids_TA: Tensor) -> Tensor:
        """Return which experts each token chose, [T, E + 1] of zeros and ones."""
        E = self._sums_WE.shape[1] - 1
        return torch.zeros(len(ids_TA), E + 1, device=ids_TA.device).scatter_(1, ids_TA.clamp(max=E), 1.0)

    def learn(self, rows_N: Tensor, chosen_NE: Tensor, counted_N: Tensor) -> None:
        """Count what was chosen after each of the rows, as often as counted_N (float) says."""
        self._sums_WE.index_add_(0, rows_N, chosen_NE * counted_N[:, None])
        self._seen_W.index_add_(0, rows_N, counted_N)

    def learn_usual(self, layer: int, chosen_TE: Tensor) -> None:
        """Count what some tokens chose, whatever the cause."""
        self._usual_LE[layer] += chosen_TE.sum(0)
        self._tokens_L[layer] += len(chosen_TE)
        self._learned += len(chosen_TE)
        if self._learned > HALF_LIFE * len(self._tokens_L):
            self._learned = 0
            for counts in (self._sums_WE, self._seen_W, self._usual_LE, self._tokens_L):
                counts.mul_(0.5)

    def forget(self, rows_N: Tensor, kept_N: Tensor) -> None:
        """Empty the rows where kept_N is 0 and leave those where it is 1; equal rows must agree."""
        self._sums_WE[rows_N] = self._sums_WE[rows_N] * kept_N[:, None]
        self._seen_W[rows_N] = self._seen_W[rows_N] * kept_N

    def expected(self, rows_NH: Tensor, layers_H: Tensor, known_N: Tensor | None = None) -> Tensor:
        """Return how often each expert of some layers can be expected after the rows, summed over them: [H, E].

        known_N: 0 where a cause has no row of its own and is taken for the average one, else 1.
        """
        usual_HE = self._usual_LE[layers_H] / self._tokens_L[layers_H].clamp(min=1.0)[:, None]
        share_NH = 1.0 / (self._seen_W[rows_NH] + 1.0)
        usual_H = share_NH.sum(0)
        if known_N is not None:
            share_NH = share_NH * known_N[:, None]
            usual_H = (share_NH + (1.0 - known_N)[:, None]).sum(0)
        after_HE = (self._sums_WE[rows_NH] * share_NH[:, :, None]).sum(0)
        return (after_HE + usual_H[:, None] * usual_HE)[:, :-1]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Ahead:
    """What is predicted at one seam of one layer."""

    targets: tuple[Target, ...]
    layers_H: Tensor


def _ahead(layers: RoutedLayers, reach: Reach, layer: int, seam: Seam, device: torch.device) -> _Ahead:
    targets = tuple(reach.targets(layers.stacks, layer, seam))
    return _Ahead(targets=targets, layers_H=torch.tensor([t.layer for t in targets], dtype=torch.int64, device=device))


class HistoryPredictor:
    """Ranks a later layer's experts by how often they followed the ones that are asked for now.

    Learned from each token's own way through the layers. The last layer's experts speak of the next token's first
    layers, learned where a pass has as many tokens as the one before, or one, as in decoding. Says nothing before
    attention, where no experts are known yet. Scores are frequencies, summed over experts and tokens.

    Its table holds 2 * H * (E + 1) * (E + 2) numbers per layer, H the distance.
    """

    def __init__(self, layers: RoutedLayers, reach: Reach) -> None:
        self._layers = layers
        self._reach = reach
        self._E = max(layers.experts)
        self._passes = PassCounter()
        self._pass = 0
        # By layer: the experts it asked for last, and in which pass.
        self._routed: dict[int, tuple[int, Tensor]] = {}
        self._table: _Table | None = None
        self._aheads: dict[tuple[int, Seam], _Ahead] = {}
        # By layer, what is learned from it: the layer it followed, how many passes later, its place in that one's rows.
        self._behind: dict[int, list[tuple[int, int, int]]] = {}
        ends = {stack: layer for layer, stack in enumerate(layers.stacks)}
        for layer in range(len(layers.experts)):
            for seam in (Seam.ROUTED, Seam.LEFT) if layer in ends.values() else (Seam.ROUTED,):
                for place, target in enumerate(reach.targets(layers.stacks, layer, seam)):
                    behind = (layer, target.steps, self._first_place(seam) + place)
                    self._behind.setdefault(target.layer, []).append(behind)

    @property
    def nbytes(self) -> int:
        """Bytes of what was learned."""
        return 0 if self._table is None else self._table.nbytes

    def predict(self, seen: Observation) -> Sequence[Prediction]:
        """Learn from a routing, and rank what usually follows it."""
        self._pass = self._passes.of(seen)
        if seen.seam is Seam.ROUTED and seen.expert_ids_TA is not None and len(seen.expert_ids_TA):
            self._learn(seen.layer, seen.expert_ids_TA)
        when, causes_TA = self._routed.get(seen.layer, (-1, None))
        if self._table is None or causes_TA is None or when != self._pass or seen.seam is Seam.ENTERED:
            return ()
        ahead = self._ahead(seen.layer, seen.seam, causes_TA.device)
        if not ahead.targets:
            return ()
        first_N1 = self._rows(seen.layer, causes_TA.reshape(-1, 1), self._first_place(seen.seam))
        rows_NH = first_N1 + torch.arange(len(ahead.targets), device=first_N1.device)
        scores_HE = self._table.expected(rows_NH, ahead.layers_H)
        return self._reach.rank(scores_HE, ahead.targets, self._layers, len(causes_TA))

    def _first_place(self, seam: Seam) -> int:
        return self._reach.distance if seam is Seam.LEFT else 0

    def _rows(self, layer: int, causes: Tensor, place: int) -> Tensor:
        """Return the rows of causes in a layer: each has one for every place of what may be ahead."""
        return (causes + layer * (self._E + 1)) * (2 * self._reach.distance) + place

    def _learn(self, layer: int, ids_TA: Tensor) -> None:
        if self._table is None:
            L = len(self._layers.experts)
            self._table = _Table(L * (self._E + 1) * 2 * self._reach.distance, L, self._E, ids_TA.device)
        chosen_TE = self._table.chosen(ids_TA)
        self._table.learn_usual(layer, chosen_TE)
        rows = [
            self._rows(source, causes_TA, place)
            for source, steps, place in self._behind.get(layer, ())
            if (causes_TA := self._followed(source, steps, len(ids_TA))) is not None
        ]
        if rows:
            rows_TN = torch.cat(rows, 1)
            effects_NE = chosen_TE.repeat_interleave(rows_TN.shape[1], dim=0)
            self._table.learn(rows_TN.flatten(), effects_NE, effects_NE.new_ones(len(effects_NE)))
        self._routed[layer] = (self._pass, ids_TA.clamp(max=self._E))

    def _followed(self, source: int, steps: int, tokens: int) -> Tensor | None:
        """Return the experts [T, A] that each of so many tokens now follows; None where that is not known."""
        when, causes_TA = self._routed.get(source, (-1, None))
        if causes_TA is None or when != self._pass - steps:
            return None
        if steps and tokens == 1:
            causes_TA = causes_TA[-1:]
        return causes_TA if len(causes_TA) == tokens else None

    def _ahead(self, layer: int, seam: Seam, device: torch.device) -> _Ahead:
        if (layer, seam) not in self._aheads:
            self._aheads[layer, seam] = _ahead(self._layers, self._reach, layer, seam, device)
        return self._aheads[layer, seam]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Claim:
    """The rows of one call's tokens: which are theirs, as 1.0 and 0.0."""

    tokens_T: Tensor
    slots_T: Tensor
    owned_T: Tensor


class TokenPredictor:
    """Ranks a layer's experts by how often this token asked for them (paper, section on iteration-wise tables).

    One row per token id and layer, in tables of about `nbytes` at most: where the vocabulary has more tokens than
    fit, ids that are equal modulo the slots share one, which belongs to the latest of them, or the highest of one
    call. A token without a slot is taken for the average one. Says nothing about the next token, which is not
    known. Scores are frequencies, summed over tokens.

    Raises ValueError where not one token fits in nbytes.
    """

    def __init__(self, layers: RoutedLayers, reach: Reach, vocabulary: int, nbytes: int = 64 << 20) -> None:
        self._layers = layers
        self._reach = reach
        self._L, self._E = len(layers.experts), max(layers.experts)
        # A slot's frequencies, how many tokens it has seen, and (int64) whose it is; the averages beside them.
        per_slot = 4 * self._L * (self._E + 2) + 8
        self._slots = min(vocabulary, (nbytes - per_slot) // per_slot)
        if self._slots < 1:
            raise ValueError(f"a token's row takes {2 * per_slot} bytes, got nbytes={nbytes}")
        self._shared = self._slots < vocabulary
        self._table: _Table | None = None
        self._owners_W: Tensor | None = None
        self._claim: _Claim | None = None
        self._aheads: dict[tuple[int, Seam], _Ahead] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of what was learned."""
        if self._table is None or self._owners_W is None:
            return 0
        return self._table.nbytes + self._owners_W.nbytes

    def predict(self, seen: Observation) -> Sequence[Prediction]:
        """Learn from a routing, and rank what these tokens usually ask for."""
        tokens_T, ids_TA = seen.token_ids_T, seen.expert_ids_TA
        if tokens_T is None or not len(tokens_T) or seen.seam is Seam.LEFT:
            return ()
        if self._table is None:
            self._table = _Table(self._slots * self._L, self._L, self._E, tokens_T.device)
            self._owners_W = torch.full((self._slots,), -1, device=tokens_T.device)
        claim = self._claimed(tokens_T, self._table)
        if seen.seam is Seam.ROUTED and ids_TA is not None and len(ids_TA) == len(tokens_T):
            chosen_TE = self._table.chosen(ids_TA)
            self._table.learn(claim.slots_T * self._L + seen.layer, chosen_TE, claim.owned_T)
            self._table.learn_usual(seen.layer, chosen_TE)
        if (seen.layer, seen.seam) not in self._aheads:
            ahead = _ahead(self._layers, self._reach, seen.layer, seen.seam, tokens_T.device)
            self._aheads[seen.layer, seen.seam] = ahead
        ahead = self._aheads[seen.layer, seen.seam]
        if not ahead.targets:
            return ()
        rows_TH = (claim.slots_T * self._L)[:, None] + ahead.layers_H
        known_T = claim.owned_T if self._shared else None
        scores_HE = self._table.expected(rows_TH, ahead.layers_H, known_T)
        return self._reach.rank(scores_HE, ahead.targets, self._layers, len(tokens_T))

    def _claimed(self, tokens_T: Tensor, table: _Table) -> _Claim:
        """Give the tokens of a call their slots, emptied where another token had them."""
        if self._claim is not None and self._claim.tokens_T is tokens_T:
            return self._claim
        owners_W = self._owners_W
        assert owners_W is not None
        slots_T = tokens_T % self._slots
        owned_T = torch.ones(len(tokens_T), device=tokens_T.device)
        if self._shared:
            before_T = owners_W[slots_T]
            owners_W.scatter_reduce_(0, slots_T, tokens_T, "amax", include_self=False)
            after_T = owners_W[slots_T]
            layers_L = torch.arange(self._L, device=tokens_T.device)
            rows_TL = (slots_T * self._L)[:, None] + layers_L
            kept_T = (before_T == after_T).float()
            table.forget(rows_TL.flatten(), kept_T.repeat_interleave(self._L))
            owned_T = (after_T == tokens_T).float()
        self._claim = _Claim(tokens_T=tokens_T, slots_T=slots_T, owned_T=owned_T)
        return self._claim
