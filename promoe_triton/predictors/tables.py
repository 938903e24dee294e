"""Predictors that learn tables while the model runs: what a token asks for, and what followed what.

Both keep frequencies in tables of a fixed size, and forget slowly: a row that has seen `MEMORY` tokens gives old
ones less weight with each new one. Everything stays where the observations are; nothing waits for the host.

Letters: T tokens, A active experts per token, E experts (of the largest layer), L layers, H distances, W rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from promoe_triton.predictors.passes import PassCounter
from promoe_triton.predictors.reach import Reach, Target
from promoe_triton.protocols import Observation, Prediction, Seam

MEMORY = 1024.0
"""How many tokens a row remembers."""


class Frequencies:
    """How often each of E experts followed each of W causes: one row per cause, and one for all of them together.

    That last row, W, stands in for what a cause has not shown yet, with the weight of one token.
    """

    def __init__(self, causes: int, experts: int, device: torch.device) -> None:
        self.anything = causes
        # One column more, for ids that stand for no expert.
        self._sums_WE = torch.zeros(causes + 1, experts + 1, device=device)
        self._seen_W = torch.zeros(causes + 1, device=device)

    @property
    def nbytes(self) -> int:
        return self._sums_WE.nbytes + self._seen_W.nbytes

    def learn(self, causes_N: Tensor, ids_NA: Tensor, counted_N: Tensor | None = None) -> None:
        """Count that causes_N[n] was followed by experts ids_NA[n]; ids from E on, and where not counted, are not."""
        E = self._sums_WE.shape[1] - 1
        chosen_NE = torch.zeros(len(causes_N), E + 1, device=causes_N.device).scatter_(1, ids_NA.clamp(max=E), 1.0)
        tokens_N = torch.ones(len(causes_N), device=causes_N.device) if counted_N is None else counted_N.float()
        self._sums_WE.index_add_(0, causes_N, chosen_NE * tokens_N[:, None])
        self._seen_W.index_add_(0, causes_N, tokens_N)
        self._sums_WE[self.anything].add_(tokens_N @ chosen_NE)
        self._seen_W[self.anything].add_(tokens_N.sum())
        self._fade(causes_N)
        self._fade(torch.full_like(causes_N[:1], self.anything))

    def _fade(self, rows_N: Tensor) -> None:
        # Rows that are named twice are read before any is written: both writes are the same.
        faded_N = (MEMORY / self._seen_W[rows_N]).clamp(max=1.0)
        self._sums_WE[rows_N] = self._sums_WE[rows_N] * faded_N[:, None]
        self._seen_W[rows_N] = self._seen_W[rows_N].clamp(max=MEMORY)

    def forget(self, causes_N: Tensor, where_N: Tensor) -> None:
        """Empty the row of causes_N[n] where where_N[n]; repeated causes must agree."""
        keep_N = (~where_N).float()
        self._sums_WE[causes_N] = self._sums_WE[causes_N] * keep_N[:, None]
        self._seen_W[causes_N] = self._seen_W[causes_N] * keep_N

    def expected(self, causes_N: Tensor, experts: int) -> Tensor:
        """Return the sum over causes_N of the first experts' frequencies after each, [experts]."""
        usual_E = self._sums_WE[self.anything, :experts] / self._seen_W[self.anything].clamp(min=1.0)
        share_N = 1.0 / (self._seen_W[causes_N] + 1.0)
        return share_N @ self._sums_WE[causes_N, :experts] + share_N.sum() * usual_E


class HistoryPredictor:
    """Ranks a later layer's experts by how often they followed the ones that are asked for now.

    A table per layer and distance, learned from each token's own way through the layers; the last layer's experts
    speak of the next token's first layers, learned where passes have as many rows, or one, as in decoding. Says
    nothing before attention, where no experts are known yet.

    experts, active: by layer, how many it has and how many it chooses per token. stacks: see `Reach.targets`.
    Its tables hold H * (E + 2) * (E + 2) numbers per layer.
    """

    def __init__(self, experts: Sequence[int], active: Sequence[int], stacks: Sequence[str], reach: Reach) -> None:
        self._experts = experts
        self._active = active
        self._stacks = stacks
        self._reach = reach
        self._E = max(experts)
        self._passes = PassCounter()
        self._pass = 0
        # By layer: the rows it routed last, and in which pass.
        self._routed: dict[int, tuple[int, Tensor]] = {}
        self._ahead: dict[tuple[int, Target], Frequencies] = {}
        self._before: dict[int, list[tuple[int, Target]]] = {}
        for layer in range(len(experts)):
            seams = (Seam.ROUTED, Seam.LEFT) if layer == self._last(layer) else (Seam.ROUTED,)
            for target in (t for seam in seams for t in reach.targets(stacks, layer, seam)):
                self._before.setdefault(target.layer, []).append((layer, target))

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self._ahead.values())

    def predict(self, seen: Observation) -> Sequence[Prediction]:
        """Learn from a routing, and rank what usually follows it."""
        self._pass = self._passes.of(seen)
        if seen.seam is Seam.ENTERED:
            return ()
        if seen.seam is Seam.ROUTED:
            if seen.expert_ids_TA is None:
                return ()
            self._learn(seen.layer, seen.expert_ids_TA)
        now, ids_TA = self._routed.get(seen.layer, (-1, None))
        if now != self._pass or ids_TA is None:
            return ()
        return [
            prediction
            for target in self._reach.targets(self._stacks, seen.layer, seen.seam)
            if (prediction := self._expect(seen.layer, target, ids_TA)) is not None
        ]

    def _expect(self, layer: int, target: Target, ids_TA: Tensor) -> Prediction | None:
        table = self._ahead.get((layer, target))
        if table is None:
            return None
        E = self._experts[target.layer]
        scores_E = table.expected(ids_TA.flatten().clamp(max=self._E), E)
        best = scores_E.topk(self._reach.named(E, self._active[target.layer], len(ids_TA)))
        return Prediction(layer=target.layer, steps=target.steps, expert_ids=best.indices, scores=best.values)

    def _learn(self, layer: int, ids_TA: Tensor) -> None:
        for source, target in self._before.get(layer, ()):
            when, causes_TA = self._routed.get(source, (-1, ids_TA[:0]))
            if when != self._pass - target.steps:
                continue
            if target.steps and len(ids_TA) == 1:
                causes_TA = causes_TA[-1:]
            if len(causes_TA) != len(ids_TA):
                continue
            if (source, target) not in self._ahead:
                # One cause more, for ids that stand for no expert.
                self._ahead[source, target] = Frequencies(self._E + 1, self._experts[layer], ids_TA.device)
            causes = causes_TA.clamp(max=self._E)
            effects = ids_TA.repeat_interleave(causes.shape[1], dim=0)
            self._ahead[source, target].learn(causes.flatten(), effects)
        self._routed[layer] = (self._pass, ids_TA)

    def _last(self, layer: int) -> int:
        return max(i for i, stack in enumerate(self._stacks) if stack == self._stacks[layer])


class TokenPredictor:
    """Ranks a layer's experts by how often this token asked for them (paper, section on iteration-wise tables).

    One row per token id and layer, in tables of at most `nbytes`: where the vocabulary has more tokens than there
    are rows, ids that are equal modulo the rows share one, and it belongs to the latest of them, or the highest of
    one call. A token without a row is taken for the average one. Says nothing about the next token, which is not
    known, nor about a layer before its first routing.

    experts, active: by layer, how many it has and how many it chooses per token. stacks: see `Reach.targets`.
    """

    def __init__(
        self,
        experts: Sequence[int],
        active: Sequence[int],
        stacks: Sequence[str],
        reach: Reach,
        vocabulary: int,
        nbytes: int = 64 << 20,
    ) -> None:
        # A row's frequencies, how many tokens it has seen, and (int64) whose it is; and the average token's.
        per_row = 4 * sum(E + 4 for E in experts)
        self._rows = max(1, min(vocabulary, nbytes // per_row - 1))
        self._experts = experts
        self._active = active
        self._stacks = stacks
        self._reach = reach
        self._tables: dict[int, Frequencies] = {}
        self._owners: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._tables.values()) + sum(o.nbytes for o in self._owners.values())

    def predict(self, seen: Observation) -> Sequence[Prediction]:
        """Learn from a routing, and rank what these tokens usually ask for."""
        if seen.token_ids_T is None:
            return ()
        ids_TA = seen.expert_ids_TA
        if seen.seam is Seam.ROUTED and ids_TA is not None and len(ids_TA) == len(seen.token_ids_T):
            self._learn(seen.layer, seen.token_ids_T, ids_TA)
        return [
            self._expect(target.layer, seen.token_ids_T)
            for target in self._reach.targets(self._stacks, seen.layer, seen.seam)
            if target.steps == 0 and target.layer in self._tables
        ]

    def _expect(self, layer: int, tokens_T: Tensor) -> Prediction:
        table, rows_T, E = self._tables[layer], tokens_T % self._rows, self._experts[layer]
        known_T = self._owners[layer][rows_T] == tokens_T
        scores_E = table.expected(torch.where(known_T, rows_T, table.anything), E)
        best = scores_E.topk(self._reach.named(E, self._active[layer], len(tokens_T)))
        return Prediction(layer=layer, steps=0, expert_ids=best.indices, scores=best.values)

    def _learn(self, layer: int, tokens_T: Tensor, ids_TA: Tensor) -> None:
        if layer not in self._tables:
            self._tables[layer] = Frequencies(self._rows, self._experts[layer], ids_TA.device)
            self._owners[layer] = torch.full((self._rows,), -1, device=ids_TA.device)
        owners, rows_T = self._owners[layer], tokens_T % self._rows
        before_T = owners[rows_T]
        owners.scatter_reduce_(0, rows_T, tokens_T, "amax", include_self=False)
        self._tables[layer].forget(rows_T, before_T != owners[rows_T])
        self._tables[layer].learn(rows_T, ids_TA, counted_N=owners[rows_T] == tokens_T)
