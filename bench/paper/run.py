"""The counterparts of the paper's tables and figures, simulated: make paper.

Models are described by their configurations, the machine by promoe_triton/simulation/hardware/rtx4090.json, the routing
and the rest by `fitted.json` (see fit.py). What is compared is in `published.json`. Everything goes to one CSV; the
figures are drawn from it.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from draw import draw, table
from stage import PAPER_MODELS, Fitted, choice_of, published, record, run, scene

from promoe_triton.simulation.sweep import Scene, memory_needed

DEVELOPMENT = {
    "lru": {"ablation": "lru"},
    "prefetch only": {"ablation": "+prefetch"},
    "preemption only": {"ablation": "preemption"},
    "preemption + reorder": {"ablation": "all", "predictor": "none"},
    "everything": {"ablation": "all"},
}
STEPS = ("lru", "+prefetch", "+chunks", "+preemption", "+reorder")
SHARES = (0.25, 0.5, 0.75)
PROMPT = 128


class Length:
    """How much is simulated: texts (the first fills the cache), and tokens decoded of each."""

    def __init__(self, quick: bool) -> None:
        self.texts, self.tokens = (2, 8) if quick else (3, 64)
        self.models = PAPER_MODELS[:1] if quick else PAPER_MODELS


def development(fitted: Fitted, length: Length, results: record.Results) -> float:
    """Write the authors' development table, ours beside theirs; return the mean absolute error of what is predicted."""
    table, rows, errors = published()["development"], [], []
    of = scene("deepseek-moe-16b", fitted, length.texts, 1 + length.tokens, roomy=True)
    for column, choice in DEVELOPMENT.items():
        theirs = table["columns"][column]
        for share, hits, ms in zip(table["shares"], theirs["hits"], theirs["ms"], strict=True):
            found = run(of, slots=share, **choice)
            deviation = found.tpot_seconds * 1e3 / ms - 1.0
            if column != "lru":
                errors.append(abs(deviation))
            case = f"development, {share:.1%}"
            rows += [
                one(case, column, "time", "ms/token", found.tpot_seconds * 1e3, f"theirs {ms}"),
                one(case, column, "hits", "share", found.hit_ratio, f"theirs {hits}"),
                one(case, column, "deviation", "%", 100 * deviation, "fitted" if column == "lru" else "predicted"),
            ]
    resident = run(of, slots=1.0, ablation="lru").tpot_seconds * 1e3
    rows.append(one("development, 100.0%", "lru", "time", "ms/token", resident, "theirs 54-58"))
    error = fmean(errors)
    rows.append(one("development", "predicted columns", "mean absolute error", "%", 100 * error, "of 20 times"))
    results.write(rows)
    return error


PREDICTION_SECONDS = 200e-6
"""Of theirs per layer, on a CPU (paper, section on the learned predictor)."""


def reasons(fitted: Fitted, length: Length, results: record.Results) -> None:
    """Predict more as theirs does, one difference after the other: how much of the disagreement is each?

    Theirs names experts two layers ahead only, here it is two and one; and it takes longer. It runs beside the model:
    counted in full is the most that it can cost.
    """
    table, rows = published()["development"], []
    of = scene("deepseek-moe-16b", fitted, length.texts, 1 + length.tokens, roomy=True)
    second = replace(of, texts=[replace(t, named=[[np.full_like(i, -1) for i in t.ids], t.named[1]]) for t in of.texts])
    slower = replace(of.software, predict=PREDICTION_SECONDS / fitted.launch_seconds)
    ways = {"two layers ahead only": second, "and a prediction of 200 us": replace(second, software=slower)}
    for column in ("prefetch only", "everything"):
        theirs = table["columns"][column]["ms"]
        for (way, changed), (share, ms) in itertools.product(ways.items(), zip(table["shares"], theirs, strict=True)):
            taken = run(changed, slots=share, **DEVELOPMENT[column]).tpot_seconds * 1e3
            case = f"reasons, {share:.1%}"
            rows.append(one(case, f"{column}, {way}", "time", "ms/token", taken, f"theirs {ms}"))
            rows.append(one(case, f"{column}, {way}", "deviation", "%", 100 * (taken / ms - 1.0)))
    results.write(rows)


def one(case: str, variant: str, metric: str, unit: str, value: float, note: str = "") -> record.Row:
    return record.row(case, variant, metric, unit, [value], note=note)


def speedups(fitted: Fitted, length: Length, results: record.Results) -> None:
    """Everything on, over static, LRU and whole layers, for the paper's models at those cache sizes that fit.

    A model that does not fit at 16 bits per weight at all is taken at 4, and not counted in the means.
    """
    over: dict[tuple[str, str], list[float]] = {}
    for model in length.models:
        of = scene(model, fitted, length.texts, PROMPT + length.tokens)
        fits = [one_speedup(of, f"{model}, {share:.1%}", {"slots": share}, results, over) for share in SHARES]
        if not any(fits):
            for share in SHARES:
                one_speedup(of, f"{model} at 4 bits, {share:.1%}", {"slots": share, "bits": 4.0}, results, {})
    theirs = published()["speedup"]
    results.write(
        [
            one(
                "all models",
                f"everything / {name}",
                stage,
                "x",
                fmean(ratios),
                f"up to {max(ratios):.2f}, of {len(ratios)} that fit; theirs {theirs[stage][name]}",
            )
            for (stage, name), ratios in over.items()
        ]
    )


def one_speedup(
    of: Scene, case: str, choice: dict[str, Any], results: record.Results, over: dict[tuple[str, str], list[float]]
) -> bool:
    """Write what one model gains with some experts in slots, and add it to `over`; whether it fits."""
    needed, room = memory_needed(of, choice_of(**choice)), of.hardware.memory_bytes
    note = "" if needed <= room else f"left out: more than the {room / 1e9:.0f} GB there are"
    results.write([one(case, "slots and all other weights", "memory", "GB", needed / 1e9, note)])
    if note:
        return False
    found = {name: run(of, ablation=name, prompt=PROMPT, **choice) for name in ("static", "layer", "lru", "all")}
    rows = []
    for name, outcome in found.items():
        rows.append(one(case, name, "prefill", "ms", outcome.ttft_seconds * 1e3))
        rows.append(one(case, name, "decode", "ms/token", outcome.tpot_seconds * 1e3))
        rows.append(one(case, name, "hits", "share", outcome.hit_ratio))
        if name != "all":
            for stage, field in (("prefill", "ttft_seconds"), ("decode", "tpot_seconds")):
                over.setdefault((stage, name), []).append(getattr(outcome, field) / getattr(found["all"], field))
    results.write(rows)
    return True


def ablation(fitted: Fitted, length: Length, results: record.Results) -> None:
    """Each technique on top of the one before (paper, section on the breakdown)."""
    of = scene("deepseek-moe-16b", fitted, length.texts, PROMPT + length.tokens)
    rows, theirs = [], published()["ablation"]
    found = {name: run(of, slots=0.5, ablation=name, prompt=PROMPT) for name in STEPS}
    for name in STEPS[1:]:
        for stage, field in (("prefill", "ttft_seconds"), ("decode", "tpot_seconds")):
            ratio = getattr(found["lru"], field) / getattr(found[name], field)
            note = f"theirs {theirs[stage][name]}" if name in theirs[stage] else ""
            rows.append(one("ablation", name, stage, "x", ratio, note))
    results.write(rows)


def sensitivity(fitted: Fitted, length: Length, results: record.Results) -> None:
    """How the gain over LRU moves with the size of the cache, the batch, and the bits per weight."""
    model = "deepseek-moe-16b"
    sweeps: dict[str, list[dict[str, Any]]] = {
        "slots": [{"slots": share} for share in (0.125, 0.25, 0.375, 0.5, 0.75)],
        "batch": [{"batch": batch} for batch in (1, 2, 4, 8)],
        "bits": [{"bits": bits} for bits in (16.0, 8.0, 4.0)],
    }
    for name, choices in sweeps.items():
        rows = []
        for choice in choices:
            batch = choice.get("batch", 1)
            of = scene(model, fitted, max(length.texts, 2 * batch), 16 + length.tokens, roomy=True)
            found = {
                step: run(of, ablation=step, prompt=16, **{"slots": 0.5} | choice) for step in ("static", "lru", "all")
            }
            case = f"{name} {choice[name]:g}"
            rows += [one(case, step, "decode", "ms/step", o.tpot_seconds * 1e3) for step, o in found.items()]
            gain = found["lru"].tpot_seconds / found["all"].tpot_seconds
            rows.append(one(case, "everything / lru", "decode", "x", gain))
        results.write(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one model and a few tokens, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder for the CSV and the figure (default: bench/results/paper)")
    args = parser.parse_args()
    folder = args.out or (record.ROOT / "bench" / "results" / "paper")
    if args.quick and args.out is None:
        folder = Path(tempfile.gettempdir()) / "promoe-paper-quick"
    (folder / "paper.csv").unlink(missing_ok=True)
    fitted, length = Fitted.read(), Length(args.quick)
    results = record.Results(folder, "paper")
    error = development(fitted, length, results)
    for part in (speedups, ablation, sensitivity, reasons):
        part(fitted, length, results)
    if find_spec("matplotlib"):
        draw(folder)
    print(table(folder, error))


if __name__ == "__main__":
    main()
