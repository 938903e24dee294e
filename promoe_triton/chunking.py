"""How long one copy may be (paper, section on chunked prefetching, and beyond it: chunks without a fixed size)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal, NamedTuple

from promoe_triton.protocols import PAGE

ChunkingName = Literal["adaptive", "fixed", "tensor", "expert"]

SHORTEST = 1 << 20
"""Bytes below which a chunk costs more than it is worth: fewer in flight leave the disk idle, and then look like a
slower disk, for which fewer still would be let."""

DISK_LATENCY = 4e-3
"""Seconds of speculation in flight where experts come from a disk: fewer cost bandwidth."""

BUS_LATENCY = 2.5e-4
"""Seconds of it from the host's memory to a device: copies that were issued are done in their order, so that an urgent
one waits for all of them, and nothing follows before a layer looks again."""

UNMEASURED = 1 << 20
"""Bytes of a speculative chunk before the link's bandwidth is known."""


class Budgets(NamedTuple):
    """The most bytes of the next chunk: of what somebody waits for, and of speculation (0: none of it now)."""

    urgent: int
    speculative: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunking:
    """A way to cut transfers.

    ``adaptive``: at most `longest` bytes; of speculation no more in flight than takes `latency` seconds, in as few
    chunks as that allows, and never by the last free lane, so that an urgent copy starts at once. ``fixed``: `longest`
    bytes, whatever they are for. ``tensor``: one range of the source at a time, as the paper does. ``expert``: as
    fixed, but a copy that has begun is not overtaken.
    """

    name: ChunkingName
    longest: int
    latency: float

    @property
    def overtake(self) -> bool:
        """Whether an urgent copy may pass another between two of its chunks."""
        return self.name != "expert"

    def in_flight(self, bandwidth: float) -> int:
        """Return how many bytes of speculation may be in flight (``adaptive``)."""
        return max(int(bandwidth * self.latency), SHORTEST) if bandwidth else UNMEASURED

    def budgets(self, bandwidth: float, lanes: int, speculating: int) -> Budgets:
        """Return how long the next chunk may be on a link of so many lanes, so many of them with speculation."""
        if self.name == "tensor":
            return Budgets(sys.maxsize, sys.maxsize)
        if self.name != "adaptive":
            return Budgets(self.longest, self.longest)
        longest, in_flight = self.longest, self.in_flight(bandwidth)
        most = min(-(-in_flight // longest), max(lanes - 1, 1))
        if speculating >= most:
            return Budgets(longest, 0)
        return Budgets(longest, min(in_flight // most // PAGE * PAGE, longest))
