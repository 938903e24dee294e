"""The CSV: one row per measured number, appended as soon as it is there, with what it was measured on."""

from __future__ import annotations

import csv
import datetime
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from grid import Cell

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one cell gave in one mode.

    mode: "graph", "eager" or "interpreter". status: "ok"; "wrong": too far from float64, no time is given; "skipped";
    "failed"; "crashed". error: relative, L2, against float64. times in us, of one call. share: of the roof.
    """

    mode: str
    status: str
    reason: str = ""
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    repeats: int = 0
    calls: int = 0
    error: float | None = None
    bound: float | None = None
    syncs: str = ""
    waves: int = 0
    experts: float | None = None
    nbytes: float | None = None
    flops: float | None = None
    roof: float | None = None
    limit: str = ""
    share: float | None = None
    gbps: float | None = None
    tflops: float | None = None

    def line(self, cell: Cell) -> str:
        error = "" if self.error is None else f"error {self.error:.1e}"
        head = (
            f"  {cell.shape:<16} T {cell.T:<5} {cell.part:<14} {cell.variant:<24} {cell.residency:>3} % {self.mode:<11}"
        )
        if self.p50 is None:
            return f"{head} {self.status}: {self.reason} {error}"
        share = "" if self.share is None else f"{self.share:6.1%} of the {self.limit} roof"
        return f"{head} {self.p50:>10.1f} us [{self.p20:.1f}, {self.p80:.1f}] {share}  {error}"


CELL = ("part", "shape", "T", "variant", "residency")
RESULT = tuple(field.name for field in fields(Result))
KEY = (*CELL, "device", "torch", "triton", "transformers", "dtype", "source", "tiles")
"""Rows that agree in these measure the same thing; others are of another machine, or of other kernels."""


class Table:
    """All rows there are; provenance: columns that all rows of this run share."""

    def __init__(self, path: Path, provenance: Mapping[str, str]) -> None:
        self.path = path
        self._provenance = dict(provenance)
        self.columns = [*CELL, *RESULT, *self._provenance]
        self._known = {tuple(row.get(name, "") for name in KEY) for row in read(path)}

    def has(self, cell: Cell) -> bool:
        return self._key(cell) in self._known

    def cells_of(self, cell: Cell) -> dict[str, str]:
        """Return the columns that say what was measured on what."""
        return {**dict(zip(CELL, cell.key, strict=True)), **self._provenance}

    def write(self, cell: Cell, results: Collection[Result]) -> None:
        """Append the rows of one cell, all at once, and show them."""
        append(self.path, self.columns, [{**self.cells_of(cell), **row(result)} for result in results])
        self._known.add(self._key(cell))
        for result in results:
            print(result.line(cell), flush=True)

    def _key(self, cell: Cell) -> tuple[str, ...]:
        return tuple(self.cells_of(cell)[name] for name in KEY)


def row(result: Result) -> dict[str, str]:
    values = {name: getattr(result, name) for name in RESULT}
    return {
        name: f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)
        for name, value in values.items()
    }


def append(path: Path, columns: Collection[str], rows: Collection[Mapping[str, str]]) -> None:
    """Append rows in one write, so that a run that is cut off leaves whole cells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    """Return all rows; of a line that was cut off, those cells that are there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: value or "" for name, value in cells.items() if name} for cells in csv.DictReader(file)]


def latest(path: Path) -> list[dict[str, str]]:
    """Return the rows of the last run's device, kernels and tiles: the last row of each cell and mode."""
    rows = [row for row in read(path) if row.get("status")]
    if not rows:
        return []
    same = [name for name in KEY if name not in CELL]
    found = {
        (*(row[name] for name in CELL), row["mode"]): row
        for row in rows
        if all(row[name] == rows[-1][name] for name in same)
    }
    return list(found.values())


def commit() -> str:
    """Return the commit of this tree; "unknown" in a copy without git."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=8"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
