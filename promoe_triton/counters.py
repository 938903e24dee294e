"""What a patched model has done so far: counted while it runs, read as one snapshot."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from promoe_triton.config import format_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """A snapshot of a patched model's statistics.

    experts, slots: over the whole model. slot_bytes: memory set aside for slots.
    hits, misses: expert accesses found ready in a slot, or not; an access is one expert in one call of a layer.
    evictions: experts that left a slot for another.
    bytes_read: bytes the link has copied, with what alignment reads along.
    stall_seconds: time layers waited for copies.
    prefills, decodes: passes over the model: in `generate` the first one is the prefill and all others are
        decode steps; outside it, a pass with a single token is a decode step.
    ttft_seconds: the last prefill, from the start of `generate` to the end of the last MoE layer.
        tpot_seconds: median over the last (at most 512) decode steps, from one step's last MoE layer to the
        next one's. Both are nan before there is one.
    """

    experts: int
    slots: int
    slot_bytes: int
    store: str
    hits: int
    misses: int
    evictions: int
    bytes_read: int
    stall_seconds: float
    prefills: int
    decodes: int
    ttft_seconds: float
    tpot_seconds: float

    @property
    def hit_ratio(self) -> float:
        accesses = self.hits + self.misses
        return self.hits / accesses if accesses else float("nan")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"hit_ratio": self.hit_ratio}

    def rows(self) -> list[tuple[str, str]]:
        """Return label and value pairs, for a table a person reads."""
        share = f"{self.slots / self.experts:.0%}" if self.experts else "none"
        return [
            ("slots", f"{self.slots} of {self.experts} experts ({share}), {format_size(self.slot_bytes)}"),
            ("store", self.store),
            ("hits", f"{self.hits} ({self.hit_ratio:.1%})" if self.hits + self.misses else "0"),
            ("misses", f"{self.misses}"),
            ("evictions", f"{self.evictions}"),
            ("bytes read", format_size(self.bytes_read)),
            ("stalled", f"{self.stall_seconds:.3f} s"),
            ("time to first token", f"{self.ttft_seconds * 1e3:.1f} ms"),
            ("time per output token", f"{self.tpot_seconds * 1e3:.2f} ms"),
        ]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


@dataclass(slots=True)
class Counters:
    """Running totals of one patched model. Bounded whatever the length of a generation."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    stall_seconds: float = 0.0
    prefills: int = 0
    decodes: int = 0
    ttft_seconds: float = float("nan")
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=512))
    _layer: int = -1
    _began: float = 0.0
    _ended: float = 0.0
    _generation: bool = False

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Around `generate`: its first pass is the prefill, timed from here, and all others are decode steps."""
        self._generation = True
        self._began = time.perf_counter()
        try:
            yield
        finally:
            self._generation = False
            self._ended = 0.0

    def enter(self, layer: int) -> None:
        """A layer begins; a lower layer than the last one begins a new pass over the model."""
        if (layer <= self._layer or self._layer < 0) and not self._generation:
            self._began = time.perf_counter()
        self._layer = layer

    def leave(self, tokens: int) -> None:
        """The last layer ends, and with it a pass over the model with `tokens` tokens."""
        now = time.perf_counter()
        if (self._ended == 0.0) if self._generation else (tokens > 1):
            self.prefills += 1
            self.ttft_seconds = now - self._began
        else:
            self.decodes += 1
            self.step_seconds.append(now - (self._ended or self._began))
        self._ended = now if self._generation else 0.0

    @property
    def tpot_seconds(self) -> float:
        return median(self.step_seconds) if self.step_seconds else float("nan")
