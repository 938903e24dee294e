"""The benchmark of copying ahead over a GPU's bus: rehearsed without one, and what watches its worker."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench"


@pytest.fixture(autouse=True)
def _bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the benchmark's modules importable, as they are where it runs."""
    monkeypatch.syspath_prepend(str(BENCH))


def run(out: Path, *args: str) -> str:
    """Run the benchmark as a person does, without a GPU."""
    done = subprocess.run(
        [sys.executable, BENCH / "proactive_gpu.py", "--out", out, "--quick", *args],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rehearsal_goes_on_where_it_stopped(tmp_path: Path) -> None:
    picked = (
        "--only",
        "proactive: prefill, 16",
        "layers: Qwen3-30B, T 1, 50",
        "layers-25gbps: DeepSeek-V2-Lite, T 1, 50",
    )
    run(tmp_path, *picked)
    found = {path.stem: rows_of(path) for path in tmp_path.glob("*.csv")}
    assert {"proactive", "layers", "layers-25gbps"} == found.keys()
    rows = [row for of in found.values() for row in of]
    assert "failed" not in {row["metric"] for row in rows}
    assert all(float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) for row in rows)
    assert all(row["device"] and row["torch"] and row["triton"] and row["commit"] for row in rows)
    timed = {row["variant"] for row in found["layers"] if row["metric"] == "time"}
    assert timed == {"lru", "preemption + reorder, no prediction", "resident"}
    assert not (tmp_path / "current.json").exists()
    run(tmp_path, *picked)
    assert {path.stem: rows_of(path) for path in tmp_path.glob("*.csv")} == found


def test_the_first_minutes_are_rehearsed(tmp_path: Path) -> None:
    """One run of each, also over a limited link; how soon urgent copies start; others beside it; the ablation."""
    run(tmp_path, "--only", "first-look", "urgent", "others: ", "proactive-25gbps: decode, 50.0%")
    found = {path.stem: rows_of(path) for path in tmp_path.glob("*.csv")}
    assert {"first-look", "first-look-25gbps", "urgent", "others", "proactive-25gbps"} == found.keys()
    rows = [row for of in found.values() for row in of]
    assert "failed" not in {row["metric"] for row in rows}, [row for row in rows if row["metric"] == "failed"]
    looked = {row["variant"] for row in found["first-look"] if row["metric"] == "time"}
    assert looked == {
        "lru",
        "preemption + reorder, no prediction",
        "gate, always",
        "learned, always",
        "all",
        "resident",
    }
    steps = {row["variant"] for row in found["proactive-25gbps"] if row["metric"] == "time"}
    assert {"lru", "static", "+prefetch", "+chunks", "+preemption", "+reorder", "all"} <= steps
    assert any(row["metric"] == "start, p99" for row in found["urgent"])


def test_minutes_end_a_run(tmp_path: Path) -> None:
    assert "are left; run again" in run(tmp_path, "--minutes", "0.0001")
    assert not list(tmp_path.glob("*.csv"))


def test_what_comes_first() -> None:
    import proactive_gpu

    cases = list(map(str, proactive_gpu.cases(quick=False)))
    assert len(cases) == len(set(cases))
    first = cases[:10]
    for text in (
        "first-look: ",
        "proactive: decode, 50.0%",
        "others: ",
        "proactive-25gbps: decode, 50.0%",
        "urgent",
        "prefill, 512",
        "layers: ",
    ):
        assert any(text in case for case in first), text
    assert {case.split(":")[0] for case in cases} >= {
        "proactive-deepseek",
        "proactive-deepseek-25gbps",
        "layers-25gbps",
    }


def test_the_aim_of_urgent_copies_is_that_of_their_link() -> None:
    """Over the product's own defaults, which are compared with others."""
    import urgent

    from promoe_triton.chunking import BUS_LATENCY, DISK_LATENCY

    def nothing() -> Any:
        raise AssertionError("nothing is copied here")

    disk, bus = urgent.disk(nothing, 2, 8), urgent.bus(nothing, None, 2, 8)
    assert (disk.target, bus.target) == (1e-3, 1e-4)
    assert disk.ways()[disk.own].latency == DISK_LATENCY
    assert bus.ways()[bus.own].latency == BUS_LATENCY
    assert "fixed, 4 MiB" in disk.ways().keys() & bus.ways().keys()


@pytest.mark.parametrize(("code", "noted"), [("3", [3]), ("4", [])], ids=["died", "noted it itself"])
def test_a_worker_that_ends_early_is_followed_by_another(code: str, noted: list[int], tmp_path: Path) -> None:
    import watch

    marker, first = tmp_path / "current.json", tmp_path / "first"
    worker = (
        "import pathlib, sys; first = pathlib.Path(sys.argv[1])\n"
        "if first.exists(): sys.exit(0)\n"
        "first.touch(); pathlib.Path(sys.argv[2]).touch(); sys.exit(int(sys.argv[3]))"
    )
    seen: list[Any] = []
    command = [sys.executable, "-c", worker, str(first), str(marker), code]
    assert watch.supervise(command, marker, 60.0, seen.append) == 0
    assert seen == noted
    assert not marker.exists()


def test_models_that_take_turns_decode_all_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    import decoding
    from models import MODEL, prompts
    from subjects import OnDisk

    seen: list[tuple[int, int]] = []
    step = decoding.Decoder.step

    def noted(self: Any, tokens: int) -> None:
        seen.append((id(self), tokens))
        step(self, tokens)

    monkeypatch.setattr(decoding.Decoder, "step", noted)
    ids = prompts(MODEL, 1, 14)
    variants: dict[str, Any] = {"one": {"slots": 0.5, "predictor": "none"}, "other": {"slots": 0.25}}
    runs = decoding.decode_in_turns(OnDisk(MODEL), variants, ids, warm_up=2, turn=4)
    one, other = seen[0][0], seen[1][0]
    assert seen == [(one, 2), (other, 2), (one, 4), (other, 4), (other, 4), (one, 4), (one, 4), (other, 4)]
    assert {name: run.steps for name, run in runs.items()} == {"one": 12, "other": 12}
    assert all(run.counted("decodes") == 12 for run in runs.values())
    assert runs["other"].counted("misses") > runs["one"].counted("misses")
    with pytest.raises(AssertionError, match="whole turns"):
        decoding.decode_in_turns(OnDisk(MODEL), variants, ids, warm_up=2, turn=5)
