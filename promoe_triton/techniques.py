"""How much of ProMoE is on: the steps of the paper's ablation (section on the breakdown), each by name."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Technique(enum.Flag):
    """What ProMoE adds to a cache that is filled on demand, one expert at a time."""

    NONE = 0
    PREFETCH = enum.auto()
    """Predicted experts are copied ahead of need."""
    CHUNKS = enum.auto()
    """An urgent copy overtakes another between two of its chunks; else what has begun is copied to its end."""
    PREEMPTION = enum.auto()
    """When the gate is done, stale speculation is dropped and all missing experts are asked for at once."""
    REORDER = enum.auto()
    """Experts are computed in the order in which they are ready."""
    ALL = PREFETCH | CHUNKS | PREEMPTION | REORDER


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of the ablation. static: no expert leaves for one that is less popular; layer: all experts of a
    layer are copied before it is computed.
    """

    techniques: Technique
    static: bool = False
    layer: bool = False


_T = Technique

ABLATION: dict[str, Step] = {
    "static": Step(techniques=_T.NONE, static=True),
    "layer": Step(techniques=_T.CHUNKS | _T.PREEMPTION, static=True, layer=True),
    "lru": Step(techniques=_T.NONE),
    "+prefetch": Step(techniques=_T.PREFETCH),
    "+chunks": Step(techniques=_T.PREFETCH | _T.CHUNKS),
    "+preemption": Step(techniques=_T.PREFETCH | _T.CHUNKS | _T.PREEMPTION),
    "+reorder": Step(techniques=_T.ALL),
    "chunks": Step(techniques=_T.CHUNKS),
    "preemption": Step(techniques=_T.PREEMPTION),
    "reorder": Step(techniques=_T.REORDER),
    "all": Step(techniques=_T.ALL),
}
"""The paper's steps, each on top of the one before, and each technique alone (``+prefetch`` is prefetching alone)."""
