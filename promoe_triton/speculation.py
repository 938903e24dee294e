"""How much of what is predicted is copied ahead: no more than time allows, and only where it has been worth it.

Pure, as `core` is: told the time and what was predicted, so that a running model and a simulated one share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from promoe_triton.core import Core
from promoe_triton.protocols import ExpertKey, Seam
from promoe_triton.trial import Trial

PROMPT = 32
"""Tokens from which on a call counts as a prompt: it uses nearly every expert, whatever is predicted."""

PROBE = 32
"""Where no prediction is worth a copy, only every so many is made."""

SMOOTHING = 0.1
"""The share of the newest layer in the time that a layer takes."""


LONGEST = 4.0
"""As so many layers counts what took longer, at most: whoever calls may have paused between two passes."""


class Way(NamedTuple):
    """Where a prediction comes from: from which seam, over how many layers, for how many tokens (powers of two)."""

    seam: Seam
    ahead: int
    tokens: int


class Place(NamedTuple):
    """Where in the model a prediction is made."""

    layer: int
    seam: Seam


class _Pass(NamedTuple):
    """A pass over the model: how many tokens, and when its first layer had routed. absent: `Core.absent` then."""

    tokens: int
    began: float
    absent: int


class Ranking(NamedTuple):
    """A prediction on the host: experts of one layer, most likely first, `steps` tokens from now."""

    steps: int
    experts: Sequence[ExpertKey]


class Speculation:
    """Follows how long layers take, and tells the core what was predicted as far as the link can bring it in time.

    No more is queued than the link can bring until the layer comes (paper, section on stride prefetching): its
    bandwidth, times the time that layers take beside waiting. always: predict in every pass that is no prompt, also
    where passes are faster without (`Trial`). predicting: whether this pass has predictions; predicted: how many had so
    far, prompts left out.
    """

    def __init__(self, always: bool = False) -> None:
        self._always = always
        self._layer_seconds = 0.0
        self._last = (0.0, 0.0)
        self._skipped: dict[Place, int] = {}
        self._layer, self._first_layer = -1, 0
        self._layers = self._most_layers = 0
        self._pass: _Pass | None = None
        self._trials: dict[int, Trial] = {}
        self.predicting = True
        self.predicted = 0

    def routed(self, layer: int, tokens: int, now: float, stalled: float, absent: int) -> None:
        """A layer has routed so many tokens at the time `now`.

        stalled: seconds that layers have waited in all. absent: `Core.absent` before this layer's gate.
        """
        if layer <= self._layer or self._pass is None:
            self._begin(layer, _Pass(tokens, now, absent))
        self._layer = layer
        self._layers += 1
        then, before = self._last
        self._last = (now, stalled)
        taken = now - then - (stalled - before)
        if self._layer_seconds:
            taken = min(taken, LONGEST * self._layer_seconds)
        if then and tokens < PROMPT:
            self._layer_seconds += (taken - self._layer_seconds) * (SMOOTHING if self._layer_seconds else 1.0)

    def _begin(self, layer: int, this: _Pass) -> None:
        """A pass begins at this layer, and with that the one before it has ended."""
        before, self._pass, self.predicting = self._pass, this, True
        layers, self._layers = self._layers, 0
        self._first_layer = min(self._first_layer, layer) if before else layer
        self._most_layers = max(self._most_layers, layers)
        # Where another thread's forward came between, a pass has not all layers, or the next begins in the middle.
        is_whole = layers == self._most_layers and layer == self._first_layer
        if before is not None and is_whole and max(before.tokens, this.tokens) < PROMPT and not self._always:
            self._trial(before).note(this.began - before.began, this.absent - before.absent)
        if this.tokens < PROMPT:
            self.predicting = self._always or self._trial(this).predicting
            self.predicted += self.predicting

    def _trial(self, of: _Pass) -> Trial:
        """Batches of about one size (powers of two) go together: they take about as long."""
        return self._trials.setdefault(of.tokens.bit_length(), Trial())

    def leaves_out(self, place: Place, learns: bool = False) -> bool:
        """Whether not to ask for this prediction: those from here have come to nothing, or this pass has none.

        learns: a predictor that may learn is asked in a pass without predictions as well.
        """
        if not self.predicting:
            return not learns
        left = self._skipped.get(place, 0)
        if left > 0:
            self._skipped[place] = left - 1
        return left > 0

    def queue(self, core: Core, place: Place, tokens: int, rankings: Sequence[Ranking], bandwidth: float) -> None:
        """Tell the core what was predicted from `tokens` tokens, nearest layer first. bandwidth: bytes per second."""
        promising = False
        for steps, keys in rankings:
            position = core.position_of(keys[0].layer, steps)
            ahead = position - core.position
            way = Way(place.seam, ahead, tokens.bit_length())
            window = bandwidth * self._layer_seconds * ahead - core.queued(position)
            promising |= core.predict(position, keys, window, way)
        if not promising:
            self._skipped[place] = PROBE - 1
