"""From what the model passes by to what is copied ahead: a predictor's rankings, told to the core.

Predictions are hints. Whatever goes wrong with one, the output is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from promoe_triton.predictors.taps import Taps
from promoe_triton.protocols import ExpertKey, Observation, Prediction, Predictor, Seam

if TYPE_CHECKING:
    from promoe_triton.runtime import ModelRuntime

PROMPT = 32
"""Tokens from which on a call counts as a prompt: it uses nearly every expert, whatever is predicted."""

PROBE = 32
"""Where no prediction is worth a copy, only every so many is made."""

SMOOTHING = 0.1
"""The share of the newest layer in the time that a layer takes."""


class Way(NamedTuple):
    """Where a prediction comes from: from which seam, over how many layers, for how many tokens (powers of two)."""

    seam: Seam
    ahead: int
    tokens: int


class Outlook(NamedTuple):
    """What was seen, and what it was taken to mean: not read by the host yet."""

    seen: Observation
    predictions: Sequence[Prediction]

    @property
    def tensors(self) -> list[Tensor]:
        """Return what the host must know to act on it."""
        return [prediction.expert_ids for prediction in self.predictions]


class Ranking(NamedTuple):
    """A prediction on the host."""

    steps: int
    experts: list[ExpertKey]


def read(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return integer (or boolean) tensors as lists. On a device the host waits once for all of them."""
    if not tensors or tensors[0].is_cpu:
        return [tensor.tolist() for tensor in tensors]
    numbers = torch.cat([tensor.flatten().long() for tensor in tensors]).tolist()
    ends = list(accumulate(tensor.numel() for tensor in tensors))
    return [numbers[end - tensor.numel() : end] for end, tensor in zip(ends, tensors, strict=True)]


class Prefetcher:
    """Asks a predictor at every seam, and speculates on what it says as far as time allows.

    No more is queued than the link can bring until the layer comes (paper, section on stride prefetching): its
    bandwidth, times the time that layers take beside waiting.
    """

    def __init__(self, runtime: ModelRuntime, predictor: Predictor) -> None:
        self._runtime = runtime
        self._predictor = predictor
        self._taps: Taps | None = None
        self._layer_seconds = 0.0
        self._last = (0.0, 0.0)
        self._skipped: dict[tuple[int, Seam], int] = {}

    def watch(self, model: nn.Module, paths: Sequence[str]) -> None:
        """Put hooks on the model that show what cannot be seen from its experts."""
        self.remove()
        self._taps = Taps(model, paths, self.passed, first_only=True)

    def remove(self) -> None:
        """Take the hooks off. Idempotent."""
        if self._taps is not None:
            self._taps.remove()
            self._taps = None

    def routed(self, layer: int, x_TD: Tensor, expert_ids_TA: Tensor | None, now: float) -> Outlook | None:
        """Return what follows from a layer's routing, at the time `now`; ids None: it does not tell them by token."""
        stalled = self._runtime.counters.stall_seconds
        then, before = self._last
        self._last = (now, stalled)
        taken = now - then - (stalled - before)
        if then and len(x_TD) < PROMPT:
            self._layer_seconds += (taken - self._layer_seconds) * (SMOOTHING if self._layer_seconds else 1.0)
        if expert_ids_TA is None or self._hopeless(layer, Seam.ROUTED):
            return None
        if self._taps is not None:
            seen = self._taps.routed(layer, expert_ids_TA, x_TD)
        else:
            seen = Observation(layer=layer, state_TD=x_TD, expert_ids_TA=expert_ids_TA)
        return None if seen is None else self._look(seen)

    def passed(self, seen: Observation) -> None:
        """The model has passed another seam. Another thread's forward may be inside: then it is not looked at."""
        if self._runtime.is_settled or self._hopeless(seen.layer, seen.seam):
            return
        # What a predictor learns it must be able to change in calls outside of inference mode as well.
        with torch.inference_mode(False), torch.no_grad(), self._runtime.inside() as alone:
            if alone and (ahead := self._look(seen)) is not None:
                self.speculate(ahead, self._runtime.read(ahead.tensors))

    def _look(self, seen: Observation) -> Outlook | None:
        predictions = self._predictor.predict(seen)
        return Outlook(seen, predictions) if predictions and seen.tokens < PROMPT else None

    def speculate(self, ahead: Outlook, named: Sequence[Sequence[int]]) -> None:
        """Queue what was predicted as far as time allows. named: the predictions' experts, as the host read them."""
        rankings = []
        seen = ahead.seen
        for prediction, experts in zip(ahead.predictions, named, strict=True):
            layer = self._runtime.layers[prediction.layer]
            keys = [layer.keys[e] for e in experts if e < layer.layout.experts]
            if keys and not layer.resident:
                rankings.append(Ranking(prediction.steps, keys))
        if rankings:
            link = self._runtime.open_link()
            link.tell(lambda: self._queue(seen, rankings, link.bandwidth))

    def _hopeless(self, layer: int, seam: Seam) -> bool:
        """Whether to leave out this prediction, as those from here have come to nothing."""
        place = (layer, seam)
        left = self._skipped.get(place, 0)
        if left > 0:
            self._skipped[place] = left - 1
        return left > 0

    def _queue(self, seen: Observation, rankings: Sequence[Ranking], bandwidth: float) -> None:
        """Tell the core, nearest layer first."""
        core = self._runtime.core
        promising = False
        for steps, keys in rankings:
            position = core.position_of(keys[0].layer, steps)
            ahead = position - core.position
            way = Way(seen.seam, ahead, seen.tokens.bit_length())
            window = bandwidth * self._layer_seconds * ahead - core.queued(position)
            core.predict(position, keys, window, way)
            promising |= any(core.admission.worthy(way, keys[0].layer))
        if not promising:
            self._skipped[seen.layer, seen.seam] = PROBE - 1
