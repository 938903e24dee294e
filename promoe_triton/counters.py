"""What a patched model has done so far: counted while it runs, read as one snapshot."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import Any

from promoe_triton.config import format_size
from promoe_triton.core import Tally


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """What became of the experts that were copied ahead for a layer, or for all; only such as were not in a slot.

    on_time: needed, and there. late: needed, and still on their way. dropped: given up on their way; evicted: gone from
    their slots before they were needed. bytes_copied: ahead of need; of those bytes_useful were needed (bytes_late of
    them of experts that were late), and bytes_wasted were for nothing.
    """

    on_time: int
    late: int
    dropped: int
    evicted: int
    bytes_copied: int
    bytes_useful: int
    bytes_late: int
    bytes_wasted: int

    @classmethod
    def of(cls, tallies: Iterable[Tally]) -> Ahead:
        tallies = list(tallies)
        return cls(
            on_time=sum(tally.on_time for tally in tallies),
            late=sum(tally.late for tally in tallies),
            dropped=sum(tally.dropped for tally in tallies),
            evicted=sum(tally.evicted for tally in tallies),
            bytes_copied=sum(tally.copied for tally in tallies),
            bytes_useful=sum(tally.useful for tally in tallies),
            bytes_late=sum(tally.late_copied for tally in tallies),
            bytes_wasted=sum(tally.copied - tally.useful - tally.unproven for tally in tallies),
        )

    @property
    def wasted(self) -> int:
        """Experts that were to be copied ahead for nothing, whatever had come of them."""
        return self.dropped + self.evicted

    @property
    def experts(self) -> int:
        return self.on_time + self.late + self.wasted

    @property
    def accuracy(self) -> float:
        """The share of them that was needed."""
        return _share(self.on_time + self.late, self.experts)

    @property
    def fetch_rate(self) -> float:
        """The share of those needed that was there in time."""
        return _share(self.on_time, self.on_time + self.late)

    @property
    def goodpred(self) -> float:
        """Accuracy times fetch rate (paper, section on stride prefetching), live, on what was absent when predicted.

        What was predicted and not worth a copy, or too much for the link, is in none of them.
        """
        return _share(self.on_time, self.experts)

    def as_dict(self) -> dict[str, Any]:
        names = ("wasted", "accuracy", "fetch_rate", "goodpred")
        return asdict(self) | {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """A snapshot of a patched model's statistics.

    experts, slots: over the whole model. slot_bytes: memory set aside for slots.
    hits, misses: expert accesses found ready in a slot, or not; an access is one expert in one call of a layer.
    evictions: experts that left a slot for another.
    bytes_read: bytes the link has copied, with what alignment reads along.
        Neither is counted where everything is resident on a GPU: the host would wait for it.
    stall_seconds: time layers waited for copies: the host, or a GPU by itself. From the host's memory to a GPU an
        expert counts as there (a hit, or copied ahead on time) once its copy was issued, `Config.latency` ago at most.
    host_reads: how often the host waited for what a GPU had computed: once per call of a layer that is not resident,
        and once before the first layer and after the last, where something is predicted there.
    predicted: passes with predictions, prompts left out: the more, the more they are worth (`Config.always_predict`).
    copied_ahead: what prefetching did, by layer. Empty without slots.
    link_seconds: time in which the link was copying, filling the slots at the start left out; run_seconds: the time
        that all passes took; link_bandwidth: bytes per second while it was copying, lately.
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
    host_reads: int
    predicted: int
    copied_ahead: tuple[Ahead, ...]
    link_seconds: float
    link_bandwidth: float
    run_seconds: float
    prefills: int
    decodes: int
    ttft_seconds: float
    tpot_seconds: float

    @property
    def hit_ratio(self) -> float:
        return _share(self.hits, self.hits + self.misses)

    @property
    def ahead(self) -> Ahead:
        """What prefetching did, over all layers."""
        names = [field.name for field in fields(Ahead)]
        return Ahead(**{name: sum(getattr(layer, name) for layer in self.copied_ahead) for name in names})

    @property
    def link_utilisation(self) -> float:
        """The share of the running time in which the link was copying."""
        return _share(self.link_seconds, self.run_seconds)

    def as_dict(self) -> dict[str, Any]:
        derived = {
            "hit_ratio": self.hit_ratio,
            "ahead": self.ahead.as_dict(),
            "link_utilisation": self.link_utilisation,
            "copied_ahead": [layer.as_dict() for layer in self.copied_ahead],
        }
        return asdict(self) | derived

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
            *self._rows_ahead(),
            ("stalled", f"{self.stall_seconds:.3f} s of {self.run_seconds:.3f} s"),
            ("time to first token", f"{self.ttft_seconds * 1e3:.1f} ms"),
            ("time per output token", f"{self.tpot_seconds * 1e3:.2f} ms"),
        ]

    def _rows_ahead(self) -> list[tuple[str, str]]:
        rows, ahead = [], self.ahead
        if ahead.experts:
            rows = [
                ("predicted", f"in {self.predicted} passes"),
                (
                    "copied ahead",
                    f"{ahead.experts} experts: {ahead.on_time} on time, {ahead.late} late, {ahead.wasted} wasted "
                    f"({format_size(ahead.bytes_wasted)})",
                ),
                (
                    "GOODPRED",
                    f"{ahead.goodpred:.2f}: accuracy {ahead.accuracy:.2f} x fetch rate {ahead.fetch_rate:.2f}, "
                    "of experts that were absent",
                ),
            ]
        if self.link_seconds:
            rows.append(("link", f"busy {self.link_utilisation:.0%} of the time, {format_size(self.link_bandwidth)}/s"))
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


@dataclass(slots=True)
class Counters:
    """Running totals of one patched model. Bounded whatever the length of a generation. now: tells the time."""

    now: Callable[[], float] = time.perf_counter
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    stall_seconds: float = 0.0
    host_reads: int = 0
    run_seconds: float = 0.0
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
        self._began = self.now()
        try:
            yield
        finally:
            self._generation = False
            self._ended = 0.0

    def enter(self, layer: int) -> None:
        """A layer begins; a lower layer than the last one begins a new pass over the model."""
        if (layer <= self._layer or self._layer < 0) and not self._generation:
            self._began = self.now()
        self._layer = layer

    def leave(self, tokens: int) -> None:
        """The last layer ends, and with it a pass over the model with `tokens` tokens."""
        now = self.now()
        if (self._ended == 0.0) if self._generation else (tokens > 1):
            self.prefills += 1
            taken = self.ttft_seconds = now - self._began
        else:
            self.decodes += 1
            taken = now - (self._ended or self._began)
            self.step_seconds.append(taken)
        self.run_seconds += taken
        self._ended = now if self._generation else 0.0

    @property
    def tpot_seconds(self) -> float:
        return median(self.step_seconds) if self.step_seconds else float("nan")
