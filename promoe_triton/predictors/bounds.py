"""Predictors that bound the others: nothing, chance, and the truth as it was recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from promoe_triton.predictors.passes import PassCounter
from promoe_triton.predictors.reach import Reach, RoutedLayers
from promoe_triton.protocols import Observation, Prediction, Seam

Recording = Sequence[Mapping[int, Tensor]]
"""Routing as it happened: for each pass through the model the chosen experts int64[T, A] by layer."""


class NoPredictor:
    """Says nothing: what is fetched is fetched on demand."""

    def predict(self, seen: Observation) -> Sequence[Prediction]:
        """Return no predictions."""
        return ()


class RandomPredictor:
    """Names experts drawn with equal chances, from a seed: what a prediction is worth that knows nothing."""

    stateless = True

    def __init__(self, layers: RoutedLayers, reach: Reach, seed: int = 0) -> None:
        self._layers = layers
        self._reach = reach
        self._generator = torch.Generator().manual_seed(seed)

    def predict(self, seen: Observation) -> Sequence[Prediction]:
        """Draw experts of the layers in reach, without repetition; scores are uniform in [0, 1)."""
        targets = list(self._reach.targets(self._layers.stacks, seen.layer, seen.seam))
        if not targets:
            return ()
        drawn_HE = torch.rand(len(targets), max(self._layers.experts), generator=self._generator)
        return self._reach.rank(drawn_HE.to(seen.device), targets, self._layers, seen.tokens)


class OraclePredictor:
    """Names the experts that the layers in reach asked for when this very run was recorded, and no others.

    recording: see `RoutingRecorder`. Says nothing where nothing was recorded. Scores count tokens.
    """

    def __init__(self, recording: Recording, layers: RoutedLayers, reach: Reach) -> None:
        self._recording = recording
        self._layers = layers
        self._reach = reach
        self._passes = PassCounter()

    def predict(self, seen: Observation) -> Sequence[Prediction]:
        """Look the layers in reach up, in the pass that this observation belongs to."""
        now = self._passes.of(seen)
        named = []
        for layer, steps in self._reach.targets(self._layers.stacks, seen.layer, seen.seam):
            ids_TA = self._recording[now + steps].get(layer) if now + steps < len(self._recording) else None
            if ids_TA is None:
                continue
            E = self._layers.experts[layer]
            counts_E = torch.bincount(ids_TA.flatten(), minlength=E)[:E]
            scores, ids = counts_E.to(seen.device, torch.float32).sort(descending=True, stable=True)
            asked = int((counts_E > 0).sum())
            named.append(Prediction(layer=layer, steps=steps, expert_ids=ids[:asked], scores=scores[:asked]))
        return named


class RoutingRecorder:
    """Keeps the routing of every pass, for an oracle: a predictor that says nothing and remembers.

    passes: the most it keeps; later ones are not recorded.
    """

    def __init__(self, passes: int) -> None:
        self._most = passes
        self._passes = PassCounter()
        self._kept: list[dict[int, Tensor]] = []

    def predict(self, seen: Observation) -> Sequence[Prediction]:
        """Note a routing, and return no predictions."""
        now = self._passes.of(seen)
        while len(self._kept) <= min(now, self._most - 1):
            self._kept.append({})
        if seen.seam is Seam.ROUTED and seen.expert_ids_TA is not None and now < self._most:
            self._kept[now][seen.layer] = seen.expert_ids_TA.detach().cpu().clone()
        return ()

    @property
    def recording(self) -> Recording:
        return self._kept
