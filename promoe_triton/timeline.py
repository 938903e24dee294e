"""What happened when: spans of computing, copying and waiting, for a person to look at."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promoe_triton.protocols import Chunk

MOST = 200_000
"""Spans kept; the oldest go first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something on one lane, from `begin` to `end` in seconds by the link's clock; at once where both are the same.

    nbytes: copied in it; offset: from which byte of an expert on.
    """

    lane: str
    name: str
    kind: str
    begin: float
    end: float
    nbytes: int = 0
    offset: int = 0


class Timeline:
    """Spans as they end, from any thread. Bounded."""

    def __init__(self, most: int = MOST) -> None:
        self.spans: deque[Span] = deque(maxlen=most)

    def add(self, lane: str, name: str, kind: str, begin: float, end: float, nbytes: int = 0, offset: int = 0) -> None:
        self.spans.append(Span(lane=lane, name=name, kind=kind, begin=begin, end=end, nbytes=nbytes, offset=offset))

    def copied(self, lane: str, chunk: Chunk, begin: float, end: float) -> None:
        """Add the copying of a chunk."""
        key, kind = chunk.transfer.key, "speculation" if chunk.speculative else "urgent"
        name, nbytes = f"layer {key.layer} expert {key.expert}", chunk.end - chunk.begin
        self.add(lane, name, kind, begin, end, nbytes, chunk.begin)

    def trace(self) -> dict[str, Any]:
        """Return the spans as a Chrome trace, times in microseconds since the first."""
        spans = sorted(self.spans, key=lambda span: span.begin)
        lanes = {lane: i for i, lane in enumerate(sorted({span.lane for span in spans}, key=_order))}
        start = spans[0].begin if spans else 0.0
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": i, "args": {"name": lane}} for lane, i in lanes.items()
        ]
        events += [
            {
                "name": span.name,
                "cat": span.kind,
                "pid": 1,
                "tid": lanes[span.lane],
                "ts": (span.begin - start) * 1e6,
            }
            | ({"ph": "X", "dur": (span.end - span.begin) * 1e6} if span.end > span.begin else {"ph": "i", "s": "t"})
            | ({"args": {"offset": span.offset, "bytes": span.nbytes}} if span.nbytes else {})
            for span in spans
        ]
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def save(self, path: Path | str) -> None:
        """Write a trace that chrome://tracing and Perfetto open."""
        Path(path).write_text(json.dumps(self.trace()))


def _order(lane: str) -> tuple[bool, str]:
    return not lane.startswith("compute"), lane
