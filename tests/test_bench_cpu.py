"""The benchmarks run: each on small shapes, to the end, with rows and verdicts."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("core", {"2.5 misses per layer", "0 misses per layer"}),
        ("predict", {"packaged model", "hidden size 2048, 128 experts"}),
        ("simulating", None),
        ("trust", {"calibration", "50.0% in slots, lru", "50.0% in slots, all"}),
        ("urgent", {"urgent"}),
        ("waiting", {"decode, 50.0% in slots"}),
    ],
)
def test_a_benchmark_runs(name: str, cases: set[str] | None, tmp_path: Path) -> None:
    command = [sys.executable, BENCH / f"{name}.py", "--quick", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with (tmp_path / f"{name}.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert rows
    assert (cases or set()) <= {row["case"] for row in rows}
    assert all(float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) for row in rows)
