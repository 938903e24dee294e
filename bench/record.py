"""Where measurements go: one CSV per benchmark, one row per number, with the machine and the time it was taken."""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu"
CORES = 2
PLACE = ("device", "driver", "torch", "triton", "transformers")
"""Columns in which rows agree that were measured on the same thing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured number.

    case: what was run; variant: which of the things compared ran it; metric, unit: what was measured.
    p20, p50, p80: over `repeats` repeats, in which the variants took turns. Ratios are taken per repeat.
    target: what the project wants the number to be (empty: none); better: which way is good.
    """

    case: str
    variant: str
    metric: str
    unit: str
    p20: float
    p50: float
    p80: float
    repeats: int
    target: float | None = None
    better: str = "higher"
    note: str = ""

    def line(self) -> str:
        return (
            f"  {self.case:<34} {self.variant:<26} {self.metric:<26} {self.p50:>10.4g} {self.unit:<10} "
            f"[{self.p20:.4g}, {self.p80:.4g}]{self.verdict()}{'  ' + self.note if self.note else ''}"
        )

    def verdict(self) -> str:
        if self.target is None:
            return ""
        met = self.p50 >= self.target if self.better == "higher" else self.p50 <= self.target
        return f"  target {'>=' if self.better == 'higher' else '<='} {self.target:g}: {'met' if met else 'NOT met'}"


def row(
    case: str,
    variant: str,
    metric: str,
    unit: str,
    values: Sequence[float],
    *,
    target: float | None = None,
    better: str = "higher",
    note: str = "",
) -> Row:
    """Return the row of these repeats: median and 20th and 80th percentile."""
    p20, p50, p80 = percentiles(values)
    return Row(
        case=case,
        variant=variant,
        metric=metric,
        unit=unit,
        p20=p20,
        p50=p50,
        p80=p80,
        repeats=len(values),
        target=target,
        better=better,
        note=note,
    )


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return (values[0],) * 3
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Seconds since some time in the past: of the clock, of all cores at work, of this process and its children."""

    clock: float
    busy: float
    own: float

    @classmethod
    def now(cls) -> Usage:
        user, nice, system, _idle, _wait, irq, soft, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
        ticks = user + nice + system + irq + soft
        return cls(clock=time.monotonic(), busy=ticks / os.sysconf("SC_CLK_TCK"), own=sum(os.times()[:4]))

    def others(self, since: Usage) -> float:
        """Return how many cores other programs kept at work in the meantime, on average."""
        return max(self.busy - since.busy - (self.own - since.own), 0.0) / max(self.clock - since.clock, 1e-9)


def wait_for_quiet(most: float = 0.25, patience: float = 1800.0) -> None:
    """Wait until other programs leave the machine alone for five seconds; give up after `patience` seconds."""
    until = time.monotonic() + patience
    while True:
        before = Usage.now()
        time.sleep(5.0)
        others = Usage.now().others(before)
        if others <= most:
            return
        if time.monotonic() > until:
            print(f"  other programs keep {others:.1f} cores busy; measuring all the same", flush=True)
            return


class Results:
    """One benchmark's CSV. What is measured again is appended: the last row of a kind is the one that counts."""

    def __init__(
        self,
        folder: Path,
        name: str,
        force: bool = False,
        wait: bool = False,
        about: Mapping[str, str] | None = None,
        only: str = "",
    ) -> None:
        """Open a file. about: what its rows say of where and when; rows of elsewhere do not count. None: this CPU.

        only: what must be in a case's name, for it to be measured.
        """
        self.path = folder / f"{name}.csv"
        self._force, self._wait, self._only = force, wait, only
        self._about = about
        self._since = Usage.now()

    def begin(self) -> None:
        """Call before measuring a case: waits for other programs if asked to, and counts their use from here."""
        if self._wait:
            wait_for_quiet()
        self._since = Usage.now()

    def has(self, case: str, metric: str | None = None) -> bool:
        """Whether to skip this case because its rows are there already, or it was not asked for."""
        if self._only not in case:
            return True
        if self._force or not self.path.exists():
            return False
        rows = [row for row in read(self.path) if row["case"] == case and metric in (None, row["metric"])]
        about = self._about or {}
        return any(all(row[name] == about[name] for name in PLACE if name in about) for row in rows)

    def write(self, rows: Iterable[Row]) -> None:
        """Append the rows of a finished case, and show them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.path.exists()
        now = Usage.now()
        others = f"{now.others(self._since):.2f}"
        about = self._about or provenance()
        self._since = now
        names = [field.name for field in fields(Row)]
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if fresh:
                writer.writerow([*names, *about, "others"])
            for result in rows:
                values = [getattr(result, name) for name in names]
                cells = [f"{v:.6g}" if isinstance(v, float) else "" if v is None else v for v in values]
                writer.writerow([*cells, *about.values(), others])
                print(result.line(), flush=True)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def latest(path: Path) -> list[Row]:
    """Return the rows that count: the last of each case, variant and metric."""
    if not path.exists():
        return []
    found = {}
    for cells in read(path):
        found[cells["case"], cells["variant"], cells["metric"]] = Row(
            case=cells["case"],
            variant=cells["variant"],
            metric=cells["metric"],
            unit=cells["unit"],
            p20=float(cells["p20"]),
            p50=float(cells["p50"]),
            p80=float(cells["p80"]),
            repeats=int(cells["repeats"]),
            target=float(cells["target"]) if cells["target"] else None,
            better=cells["better"],
            note=cells["note"],
        )
    return list(found.values())


def verdicts(path: Path) -> list[str]:
    """Return a line for each number that has a target."""
    return [row.line() for row in latest(path) if row.target is not None]


@cache
def provenance() -> dict[str, str]:
    """Return what every row says about where and when it was taken.

    The last column, `others`, is how many cores other programs kept at work meanwhile: near 0 on a quiet machine.
    """
    return {
        "device": device(),
        "threads": str(CORES),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "accelerate": version("accelerate"),
        "commit": commit(),
        "date": now(),
    }


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def commit() -> str:
    """Return the commit of this tree; "unknown" in a copy without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=8"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def device() -> str:
    """Name the processor, what it can do for matrix products, and how much of it is used."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(about.get("flags", "").split())
    widest = next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags), "no avx2")
    model = f"{about.get('model name', platform.processor())} family {about.get('cpu family', '?')}"
    used = min(CORES, len(os.sched_getaffinity(0)))
    return f"{model} model {about.get('model', '?')} ({widest}); {used} of {os.cpu_count()} cores; {memory() >> 30} GiB"


def memory() -> int:
    """Return the machine's RAM in bytes, to the next GiB: firmware keeps some of it."""
    kib = int(Path("/proc/meminfo").read_text().split()[1])
    return -(-kib // 2**20) * 2**30


def confine(cores: int = CORES) -> None:
    """Keep this process and all its threads on the machine's last `cores` cores, and torch at as many threads."""
    import torch

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
    torch.set_num_threads(cores)


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes and few repeats: to see that it runs")
    parser.add_argument("--out", type=Path, help=f"folder for the CSV (default: {RESULTS.relative_to(ROOT)})")
    parser.add_argument("--wait", action="store_true", help="before each case, wait until other programs are idle")
    parser.add_argument("--case", default="", help="only cases with this in their name")
    parser.add_argument("--force", action="store_true", help="measure again what the CSV has already")
    return parser


def folder(args: argparse.Namespace) -> Path:
    """Return where the CSV go. Quick runs go to a temporary folder unless told otherwise."""
    quick = Path(tempfile.gettempdir()) / "promoe-bench-quick"
    place: Path = args.out or (quick if args.quick else RESULTS)
    return place


def results(args: argparse.Namespace, name: str) -> Results:
    """Open the CSV these arguments ask for."""
    return Results(
        folder(args), name, force=args.force or (args.quick and not args.out), wait=args.wait, only=args.case
    )
