"""From what the model passes by to what is copied ahead: a predictor's rankings, told to the core.

Predictions are hints. Whatever goes wrong with one, the output is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from promoe_triton.predictors.taps import Taps
from promoe_triton.protocols import Observation, Prediction, Predictor, Seam
from promoe_triton.speculation import PROMPT, Place, Ranking, Speculation

if TYPE_CHECKING:
    from promoe_triton.runtime import ModelRuntime

logger = logging.getLogger(__name__)


class Outlook(NamedTuple):
    """What was seen, and what it was taken to mean: not read by the host yet."""

    seen: Observation
    predictions: Sequence[Prediction]

    @property
    def tensors(self) -> list[Tensor]:
        """Return what the host must know to act on it."""
        return [prediction.expert_ids for prediction in self.predictions]


def read(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return integer (or boolean) tensors as lists. On a device the host waits once for all of them."""
    if not tensors or tensors[0].is_cpu:
        return [tensor.tolist() for tensor in tensors]
    if len(tensors) == 1:
        return [tensors[0].flatten().tolist()]
    numbers = torch.cat([tensor.flatten().long() for tensor in tensors]).tolist()
    ends = list(accumulate(tensor.numel() for tensor in tensors))
    return [numbers[end - tensor.numel() : end] for end, tensor in zip(ends, tensors, strict=True)]


class Prefetcher:
    """Asks a predictor at every seam, and speculates on what it says as far as time allows (`Speculation`)."""

    def __init__(self, runtime: ModelRuntime, predictor: Predictor) -> None:
        self._runtime = runtime
        self._predictor = predictor
        self._taps: Taps | None = None
        self._speculation = Speculation(runtime.config.always_predict)
        self._learns = not getattr(predictor, "stateless", False)
        # From where which layers were spoken of: one that keeps nothing goes on speaking of those.
        self._spoken_of: dict[Place, set[int]] = {}
        self._has_warned = False

    @property
    def predicted(self) -> int:
        """Passes with predictions so far, prompts left out."""
        return self._speculation.predicted

    def watch(self, model: nn.Module, paths: Sequence[str]) -> None:
        """Put hooks on the model that show what cannot be seen from its experts."""
        self.remove()
        self._taps = Taps(model, paths, self.passed, first_only=True)

    def remove(self) -> None:
        """Take the hooks off. Idempotent."""
        if self._taps is not None:
            self._taps.remove()
            self._taps = None

    def routed(self, layer: int, x_TD: Tensor, expert_ids_TA: Tensor | None, now: float, absent: int) -> Outlook | None:
        """Return what follows from a layer's routing, at the time `now`; ids None: it does not tell them by token.

        absent: `Core.absent` at that time.
        """
        self._speculation.routed(layer, len(x_TD), now, self._runtime.stall_seconds, absent)
        if expert_ids_TA is None or self._leaves_out(Place(layer, Seam.ROUTED)):
            return None
        if self._taps is not None:
            seen = self._taps.routed(layer, expert_ids_TA, x_TD)
        else:
            seen = Observation(layer=layer, state_TD=x_TD, expert_ids_TA=expert_ids_TA)
        return None if seen is None else self._look(seen)

    def passed(self, seen: Observation) -> None:
        """The model has passed another seam. Another thread's forward may be inside: then it is not looked at."""
        if self._runtime.is_settled or self._leaves_out(Place(seen.layer, seen.seam)):
            return
        # What a predictor learns it must be able to change in calls outside of inference mode as well.
        with torch.inference_mode(False), torch.no_grad(), self._runtime.inside() as alone:
            if alone and (ahead := self._look(seen)) is not None:
                self.speculate(ahead, self._runtime.read(ahead.tensors))

    def _leaves_out(self, place: Place) -> bool:
        """Whether not to ask for a prediction: nothing would come of it, or all layers it speaks of are resident."""
        layers, spoken_of = self._runtime.layers, self._spoken_of.get(place)
        if spoken_of and not self._learns and all(layers[layer].resident for layer in spoken_of):
            return True
        return self._speculation.leaves_out(place, self._learns)

    def _look(self, seen: Observation) -> Outlook | None:
        predictions = self._predictor.predict(seen) or ()
        if seen.tokens >= PROMPT or not self._speculation.predicting:
            return None
        predictions = [prediction for prediction in predictions if self._is_sound(prediction, seen)]
        place = Place(seen.layer, seen.seam)
        self._spoken_of.setdefault(place, set()).update(prediction.layer for prediction in predictions)
        return Outlook(seen, predictions) if predictions else None

    def _is_sound(self, prediction: Prediction, seen: Observation) -> bool:
        """Whether a prediction can be followed. One of a layer that is not there, say, is not, and is logged once."""
        layers, ids = len(self._runtime.layers), prediction.expert_ids
        sound = 0 <= prediction.layer < layers and prediction.steps >= 0 and ids.dim() == 1
        sound = sound and not ids.is_floating_point() and ids.device == seen.device
        if not sound and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s names experts in a way that cannot be followed, and is not listened to where it does: expected "
                "layers from 0 to %d, steps of 0 or more, and int64 [n] on %s; got layer %s, steps %s, %s %s on %s",
                type(self._predictor).__name__,
                layers - 1,
                seen.device,
                prediction.layer,
                prediction.steps,
                ids.dtype,
                [*ids.shape],
                ids.device,
            )
        return sound

    def speculate(self, ahead: Outlook, named: Sequence[Sequence[int]]) -> None:
        """Queue what was predicted as far as time allows. named: the predictions' experts, as the host read them."""
        rankings = []
        seen = ahead.seen
        for prediction, experts in zip(ahead.predictions, named, strict=True):
            layer = self._runtime.layers[prediction.layer]
            keys = [layer.keys[e] for e in experts if 0 <= e < layer.layout.experts]
            if keys and not layer.resident:
                rankings.append(Ranking(prediction.steps, keys))
        if rankings:
            link, place = self._runtime.open_link(), Place(seen.layer, seen.seam)
            queue, core = self._speculation.queue, self._runtime.core
            link.tell(lambda: queue(core, place, seen.tokens, rankings, link.bandwidth))
