"""How long one copy may be (paper, section on chunked prefetching, and beyond it: chunks without a fixed size)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal, NamedTuple

from promoe_triton.protocols import PAGE

ChunkingName = Literal["adaptive", "fixed", "tensor", "expert"]

SHORTEST = 256 << 10
"""Bytes below which a chunk costs more than it is worth."""

UNMEASURED = 1 << 20
"""Bytes of a speculative chunk before the link's bandwidth is known."""


class Budgets(NamedTuple):
    """The most bytes of the next chunk: of what somebody waits for, and of speculation (0: none of it now)."""

    urgent: int
    speculative: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunking:
    """A way to cut transfers.

    ``adaptive``: at most `longest` bytes; of speculation no more in flight than takes `latency` seconds, and never
    by the last free lane, so that an urgent copy starts at once. ``fixed``: `longest` bytes, whatever they are for.
    ``tensor``: one range of the source at a time, as the paper does. ``expert``: not at all.
    """

    name: ChunkingName
    longest: int
    latency: float

    @property
    def whole(self) -> bool:
        """Whether an expert is one chunk."""
        return self.name == "expert"

    def budgets(self, bandwidth: float, lanes: int, speculating: int) -> Budgets:
        """Return how long the next chunk may be on a link of so many lanes, so many of them with speculation."""
        if self.name in ("tensor", "expert"):
            return Budgets(sys.maxsize, sys.maxsize)
        if self.name == "fixed":
            return Budgets(self.longest, self.longest)
        most = max(lanes - 1, 1)
        if speculating >= most:
            return Budgets(self.longest, 0)
        share = int(bandwidth * self.latency / most) // PAGE * PAGE if bandwidth else UNMEASURED
        return Budgets(self.longest, min(max(share, SHORTEST), self.longest))
