"""The gates of the kernels, from the rows: what was asked, what was seen at the worst place, met or not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import grid

Row = dict[str, str]

FINE, COARSE = "Qwen3-30B", "Mixtral"
MAIN = tuple(shape.name for shape in grid.MAIN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One number that a gate looks at, and where."""

    value: float
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What must hold everywhere. sign: "at least" or "at most" this much. tokens: where it is asked for."""

    name: str
    must: float
    unit: str
    see: Callable[[Sequence[Row]], Iterable[Seen]]
    at_least: bool = True

    def verdict(self, rows: Sequence[Row]) -> list[str]:
        """Return name, asked, seen, where, and how it stands."""
        asked = f"{'>=' if self.at_least else '<='} {self.must:g} {self.unit}".strip()
        seen = list(self.see(rows))
        if not seen:
            return [self.name, asked, "", "", "not measured"]
        worst = (min if self.at_least else max)(seen, key=lambda one: one.value)
        met = worst.value >= self.must if self.at_least else worst.value <= self.must
        places = f"{worst.place} (worst of {len(seen)})"
        return [self.name, asked, f"{worst.value:.3g} {self.unit}".strip(), places, "met" if met else "NOT met"]


def layer(rows: Sequence[Row], variant: str, mode: str, residency: str = "100") -> dict[tuple[str, int], Row]:
    """Return the main shapes' rows of a variant, by shape and T."""
    return {
        (row["shape"], int(row["T"])): row
        for row in rows
        if row["part"] == "layer"
        and (row["variant"], row["mode"], row["residency"]) == (variant, mode, residency)
        and row["shape"] in MAIN
    }


def against(rival: str, mode: str, tokens: Callable[[int], bool]) -> Callable[[Sequence[Row]], Iterable[Seen]]:
    """Return the rival's median time over ours. Where ours is wrong or fails, that is 0."""

    def see(rows: Sequence[Row]) -> Iterable[Seen]:
        theirs, ours = layer(rows, rival, mode), layer(rows, grid.OURS, mode)
        for (shape, T), row in theirs.items():
            own = ours.get((shape, T))
            if own is None or row["status"] != "ok" or not tokens(T):
                continue
            value = float(row["p50"]) / float(own["p50"]) if own["status"] == "ok" else 0.0
            yield Seen(value=value, place=f"{shape}, T {T}")

    return see


def rate(shape: str, T: int) -> Callable[[Sequence[Row]], Iterable[Seen]]:
    """Return operations per second of our layer's row under a graph, in TFLOPS."""

    def see(rows: Sequence[Row]) -> Iterable[Seen]:
        row = layer(rows, grid.OURS, "graph").get((shape, T))
        if row is not None:
            yield Seen(value=float(row["tflops"]) if row["status"] == "ok" else 0.0, place=f"{shape}, T {T}")

    return see


def bandwidth(shape: str, T: int) -> Callable[[Sequence[Row]], Iterable[Seen]]:
    """Return the bandwidth of our layer's row in percent of the measured copy's."""

    def see(rows: Sequence[Row]) -> Iterable[Seen]:
        row = layer(rows, grid.OURS, "graph").get((shape, T))
        if row is not None:
            share = float(row["gbps"]) / float(row["copy_gbps"]) if row["status"] == "ok" else 0.0
            yield Seen(value=100 * share, place=f"{shape}, T {T}")

    return see


def indirection(rows: Sequence[Row]) -> Iterable[Seen]:
    ours, dense = layer(rows, grid.OURS, "graph"), layer(rows, grid.DENSE, "graph")
    for (shape, T), row in dense.items():
        own = ours.get((shape, T))
        if own is not None and own["status"] == row["status"] == "ok":
            yield Seen(value=100 * (float(own["p50"]) / float(row["p50"]) - 1), place=f"{shape}, T {T}")


def syncs(rows: Sequence[Row]) -> Iterable[Seen]:
    for (shape, T), row in layer(rows, grid.OURS, "eager").items():
        if row["status"] == "ok":
            yield Seen(value=0.0 if row["syncs"] == "0" else 1.0, place=f"{shape}, T {T}")


def precision(rows: Sequence[Row]) -> Iterable[Seen]:
    """Our error over that of transformers' eager loop, on the same call."""
    for mode in ("eager", "interpreter"):
        ours, theirs = layer(rows, grid.OURS, mode), layer(rows, grid.EAGER, mode)
        for (shape, T), row in theirs.items():
            own = ours.get((shape, T))
            if own is not None and own["error"] and row["error"]:
                yield Seen(value=float(own["error"]) / float(row["error"]), place=f"{shape}, T {T}")


def wrong(rows: Sequence[Row]) -> Iterable[Seen]:
    """1 for each of our rows that was wrong, failed or crashed, 0 for those that are right."""
    for row in rows:
        if row["variant"].startswith("ours") and row["status"] != "skipped":
            place = f"{row['shape']}, T {row['T']}, {row['part']}, {row['variant']}, {row['residency']} %"
            yield Seen(value=0.0 if row["status"] == "ok" else 1.0, place=place)


def between(low: int, high: int = 2**31) -> Callable[[int], bool]:
    return lambda T: low <= T <= high


BATCHED, GROUPED = functools.partial(against, grid.BATCHED, "graph"), functools.partial(against, grid.GROUPED, "graph")
EAGER, VLLM = functools.partial(against, grid.EAGER, "eager"), functools.partial(against, "vllm", "graph")

GATES = (
    Gate(name="wrong, failed or crashed rows of ours", must=0, unit="", see=wrong, at_least=False),
    Gate(name="error over HF eager's", must=1.5, unit="x", see=precision, at_least=False),
    Gate(name="over batched_mm, graphed, T 1-16", must=1.8, unit="x", see=BATCHED(between(1, 16))),
    Gate(name="over grouped_mm, graphed, T > 16", must=1.0, unit="x", see=GROUPED(between(17))),
    Gate(name="over grouped_mm, graphed, T 17-1024", must=1.3, unit="x", see=GROUPED(between(17, 1024))),
    Gate(name="over HF eager, eager, T 128-1024", must=15, unit="x", see=EAGER(between(128, 1024))),
    Gate(name="over HF eager, eager, T 1-16", must=5, unit="x", see=EAGER(between(1, 16))),
    Gate(name="over vLLM fused_moe, graphed", must=0.95, unit="x", see=VLLM(between(1))),
    Gate(name="share of copy bandwidth, T 1", must=50, unit="%", see=bandwidth(FINE, 1)),
    Gate(name="share of copy bandwidth, T 8", must=70, unit="%", see=bandwidth(FINE, 8)),
    Gate(name="share of copy bandwidth, T 16", must=75, unit="%", see=bandwidth(FINE, 16)),
    Gate(name="TFLOPS, T 8192, fine experts", must=300, unit="TFLOPS", see=rate(FINE, 8192)),
    Gate(name="TFLOPS, T 8192, coarse experts", must=450, unit="TFLOPS", see=rate(COARSE, 8192)),
    Gate(name="slots over stacked weights, graphed", must=3, unit="%", see=indirection, at_least=False),
    Gate(name="host waits, everything resident", must=0, unit="", see=syncs, at_least=False),
)


def summary(rows: Sequence[Row]) -> str:
    """Return the table of all gates, as text."""
    lines = [["gate", "asked", "seen", "where", ""], *(gate.verdict(rows) for gate in GATES)]
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
