"""Telling passes through the model apart by the order of observations alone."""

from __future__ import annotations

from promoe_triton.protocols import Observation, Seam

_ORDER = {Seam.ENTERED: 0, Seam.ROUTED: 1, Seam.LEFT: 2}


class PassCounter:
    """Counts passes from 0: one begins whenever an observation does not come after the one before."""

    def __init__(self) -> None:
        self._pass = 0
        self._last = (-1, -1)

    def of(self, seen: Observation) -> int:
        """Return the pass that the next observation belongs to."""
        place = (seen.layer, _ORDER[seen.seam])
        if place <= self._last:
            self._pass += 1
        self._last = place
        return self._pass
