"""The kernels' benchmark: end to end in the interpreter on tiny shapes; its gates and its table on made-up rows."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

ROOT = Path(__file__).parent.parent
GPU = ROOT / "bench" / "gpu"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the benchmark's modules importable, as they are where it runs."""
    monkeypatch.syspath_prepend(str(GPU))


def run(out: Path, *args: str) -> str:
    """Run the benchmark as a person does, without a GPU."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, GPU / "run.py", "--out", out, "--quick", "--seconds", "0.01", *args],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "kernels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rehearsal_is_right_everywhere_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    picked = (
        "--only",
        "tiny gpt-oss, T 1",
        "tiny gpt-oss, T 8: schedule",
        "tiny, T 8: layer, ours, 75",
        "tiny, T 8: combine",
    )
    said = run(tmp_path, *picked)
    rows = rows_of(tmp_path)
    ours = [row for row in rows if row["variant"].startswith("ours")]
    assert {row["status"] for row in ours} == {"ok"}
    assert {row["residency"] for row in ours} == {"0", "75", "100"}
    assert all(float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) and row["commit"] for row in ours)
    stock = {row["variant"]: row["status"] for row in rows if row["variant"].startswith("hf")}
    assert stock == {"hf eager": "ok", "hf batched_mm": "ok", "hf grouped_mm": "ok"}
    assert {row["status"] for row in rows if row["variant"] in ("vllm", "liger")} == {"skipped"}
    assert "wrong, failed or crashed rows of ours" in said
    assert "0 cells to measure" in run(tmp_path, *picked)
    assert rows_of(tmp_path) == rows
    assert not (tmp_path / "current.json").exists()
    assert (tmp_path / "gates.txt").read_text() in said


def test_figures_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    said = run(tmp_path, "--only", "T 8: schedule")
    assert "no figure times: nothing for it was measured" in said
    assert "no figures" not in said
    assert {row["part"] for row in rows_of(tmp_path)} == {"schedule"}


def test_minutes_end_a_run(tmp_path: Path) -> None:
    assert "are left; run again" in run(tmp_path, "--minutes", "0.0001")
    assert not (tmp_path / "kernels.csv").exists()


def test_what_comes_first(bench: None) -> None:
    import grid

    cells = grid.cells()
    assert len(cells) == len(set(cells))
    first = cells[: 4 * 5 * 4]
    assert {cell.shape for cell in first} == {shape.name for shape in grid.MAIN}
    assert {cell.T for cell in first} == {1, 8, 16, 512, 8192}
    assert {(cell.variant, cell.residency) for cell in first} == {
        ("ours", 100),
        ("ours", 75),
        ("hf grouped_mm", 100),
        ("hf batched_mm", 100),
    }
    assert {cell.residency for cell in cells if cell.part == "layer"} == {0, 50, 75, 90, 97, 100}


def row(shape: str, T: int, variant: str, p50: float, mode: str = "graph", **other: Any) -> dict[str, str]:
    cells = {"part": "layer", "shape": shape, "T": T, "variant": variant, "residency": 100, "mode": mode}
    cells |= {"status": "ok", "p50": p50, "error": 1e-3, "gbps": 1500.0, "copy_gbps": 3000.0, "tflops": 310.0}
    return {name: str(value) for name, value in (cells | {"syncs": "0"} | other).items()}


def test_gates_take_the_worst(bench: None) -> None:
    import gates

    rows = [row("Mixtral", 1, "ours", 10.0), row("Mixtral", 1, "hf batched_mm", 30.0)]
    rows += [row("Qwen3-30B", 1, "ours", 10.0), row("Qwen3-30B", 1, "hf batched_mm", 17.0)]
    found = {gate.name: gate.verdict(rows) for gate in gates.GATES}
    assert found["over batched_mm, graphed, T 1-16"][2:] == ["1.7 x", "Qwen3-30B, T 1 (worst of 2)", "NOT met"]
    assert found["share of copy bandwidth, T 1"][-1] == "met"
    assert found["over grouped_mm, graphed, T > 16"][-1] == "not measured"


@pytest.mark.parametrize("status", ["wrong", "failed", "crashed"])
def test_what_is_wrong_meets_no_gate(bench: None, status: str) -> None:
    import gates

    rows = [row("Qwen3-30B", 8192, "ours", 1.0, status=status, tflops="")]
    rows += [row("Qwen3-30B", 8192, "hf grouped_mm", 99.0)]
    found = {gate.name: gate.verdict(rows)[-1] for gate in gates.GATES}
    assert found["wrong, failed or crashed rows of ours"] == "NOT met"
    assert found["over grouped_mm, graphed, T > 16"] == "NOT met"
    assert found["TFLOPS, T 8192, fine experts"] == "NOT met"


def test_rows_of_other_kernels_do_not_count(bench: None, tmp_path: Path) -> None:
    import grid
    import table

    about = {name: "x" for name in table.KEY if name not in table.CELL}
    cell = grid.Cell(part="layer", shape="tiny", T=1)
    path = tmp_path / "kernels.csv"
    before = table.Table(path, about | {"source": "old"})
    modes = ("graph", "eager")
    before.write(cell, [table.Result(mode=mode, status="ok", p50=1.0, p20=1.0, p80=1.0) for mode in modes])
    now = table.Table(path, about)
    assert before.has(cell)
    assert not now.has(cell)
    now.write(cell, [table.Result(mode="graph", status="wrong", reason="a test")])
    assert [r["status"] for r in table.latest(path)] == ["wrong"]


def test_a_cell_that_kills_its_worker_is_a_row(bench: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import grid
    import run as bench_run
    import table

    about = {name: "x" for name in table.KEY if name not in table.CELL}
    cell = grid.Cell(part="layer", shape="tiny", T=1)
    results = table.Table(tmp_path / "kernels.csv", about)
    noted = {"cell": results.cells_of(cell), "columns": results.columns, "mode": "graph"}
    marker = tmp_path / "current.json"
    marker.write_text(json.dumps(noted))
    bench_run.note_crash(tmp_path, marker, -11)
    assert table.Table(tmp_path / "kernels.csv", about).has(cell)
    assert table.latest(tmp_path / "kernels.csv")[0]["reason"] == "the process ended with -11"


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_of_a_graph(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tens of gigabytes in its pool would else be missing for the next cell; also where its replay fails."""
    from promoe_triton.kernels import timing

    done: list[str] = []
    for name in ("Stream", "current_stream", "stream", "graph", "synchronize", "CUDAGraph"):
        monkeypatch.setattr(timing.torch.cuda, name, MagicMock())
    timing.torch.cuda.CUDAGraph.return_value.reset = lambda: done.append("reset")
    monkeypatch.setattr(timing.torch.cuda, "empty_cache", lambda: done.append("emptied"))
    events = MagicMock(side_effect=torch.OutOfMemoryError() if fails else None)
    monkeypatch.setattr(timing, "_events", events)
    with pytest.raises(torch.OutOfMemoryError) if fails else nullcontext():
        timing.time_graph([lambda: None], 0.1)
    assert events.call_count == 1
    assert done == ["reset", "emptied"]
