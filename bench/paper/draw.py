"""The development table as text, and one figure of all parts, from the CSV and the published numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stage import published, record

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#a0aec0"
PREDICTED = ("prefetch only", "preemption only", "preemption + reorder", "everything")


def table(folder: Path, error: float) -> str:
    """Return the authors' development table, ours beside theirs, as Markdown."""
    theirs, rows = published()["development"], _rows(folder)
    columns = theirs["columns"]
    lines = [
        f"Mean absolute error of the four columns that were not fitted: {error:.1%}",
        "",
        "| cache | " + " | ".join(f"{name}: ms, theirs, deviation" for name in columns) + " |",
        "|" + "---|" * (len(columns) + 1),
    ]
    for i, share in enumerate(theirs["shares"]):
        cells = []
        for name, column in columns.items():
            ours = rows[f"development, {share:.1%}", name, "time"].p50
            cells.append(f"{ours:.1f}, {column['ms'][i]:.1f}, {ours / column['ms'][i] - 1:+.0%}")
        lines.append(f"| {share:.1%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(folder: Path) -> None:
    """Draw paper.png: the table, speedups over three baselines, models, the ablation, and what the gain depends on."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = _rows(folder)
    figure, axes = plt.subplots(2, 4, figsize=(17, 7.4), constrained_layout=True)
    _development(axes[0][0], rows, "time", "ms", "ms per token")
    _development(axes[0][1], rows, "hits", "hits", "hit ratio")
    _bars(axes[0][2], rows)
    _models(axes[0][3], rows)
    _ablation(axes[1][0], rows)
    _sweep(axes[1][1], rows, "slots", "share of experts in slots")
    _sweep(axes[1][2], rows, "batch", "texts side by side")
    _sweep(axes[1][3], rows, "bits", "bits per weight of an expert")
    figure.suptitle("Simulated (solid, blue) beside published (dashed, orange): RTX 4090, PCIe 4.0, transformers' loop")
    figure.savefig(folder / "paper.png", dpi=110)
    plt.close(figure)


def _rows(folder: Path) -> dict[tuple[str, str, str], record.Row]:
    return {(row.case, row.variant, row.metric): row for row in record.latest(folder / "paper.csv")}


def _development(axes: Any, rows: dict[Any, record.Row], metric: str, cells: str, label: str) -> None:
    theirs = published()["development"]
    markers = dict(zip(theirs["columns"], "osv^D", strict=True))
    for name, column in theirs["columns"].items():
        ours = [rows[f"development, {share:.1%}", name, metric].p50 for share in theirs["shares"]]
        shares = [100 * share for share in theirs["shares"]]
        axes.plot(shares, ours, color=BLUE, marker=markers[name], label=name, lw=1.2, ms=5)
        axes.plot(shares, column[cells], color=ORANGE, marker=markers[name], ls="--", lw=1.0, ms=4)
    axes.set(xlabel="experts in slots, %", ylabel=label, title=f"DeepSeek-MoE-16B, {label}")
    axes.legend(fontsize=7)


def _bars(axes: Any, rows: dict[Any, record.Row]) -> None:
    theirs, names = published()["speedup"], ("static", "lru", "layer")
    labels, ours, others = [], [], []
    for stage in ("prefill", "decode"):
        for name in names:
            labels.append(f"{stage}\nover {name}")
            ours.append(rows["all models", f"everything / {name}", stage].p50)
            others.append(theirs[stage][name])
    _pairs(axes, labels, ours, others)
    axes.set(ylabel="times as fast", title="everything over the baselines, mean of models")


def _models(axes: Any, rows: dict[Any, record.Row]) -> None:
    cases = sorted({case for case, variant, _ in rows if variant == "all" and "%" in case})
    for shift, (stage, over, color) in enumerate((("decode", "lru", BLUE), ("prefill", "lru", GREY))):
        ratios = [rows[case, over, stage].p50 / rows[case, "all", stage].p50 for case in cases]
        axes.barh([i + 0.2 - 0.4 * shift for i in range(len(cases))], ratios, 0.38, color=color, label=stage)
    axes.axvline(1.0, color=GREY, lw=0.8)
    axes.set_yticks(range(len(cases)), [case.removesuffix(".0%") + " %" for case in cases], fontsize=7)
    axes.set(xlabel="everything, times as fast as LRU", title="by model and share in slots, where it fits")
    axes.legend(fontsize=7)


def _ablation(axes: Any, rows: dict[Any, record.Row]) -> None:
    theirs = published()["ablation"]
    cases = [(stage, name) for stage in theirs for name in theirs[stage]]
    ours = [rows["ablation", name, stage].p50 for stage, name in cases]
    _pairs(axes, [f"{stage}\n{name}" for stage, name in cases], ours, [theirs[s][n] for s, n in cases])
    axes.set(ylabel="times as fast as LRU", title="ablation, half of the experts in slots")


def _pairs(axes: Any, labels: Sequence[str], ours: Sequence[float], theirs: Sequence[float]) -> None:
    places = range(len(labels))
    axes.bar([i - 0.2 for i in places], ours, 0.38, color=BLUE, label="simulated")
    axes.bar([i + 0.2 for i in places], theirs, 0.38, color=ORANGE, label="published")
    axes.axhline(1.0, color=GREY, lw=0.8)
    axes.set_xticks(list(places), labels, fontsize=7)
    axes.legend(fontsize=7)


def _sweep(axes: Any, rows: dict[Any, record.Row], name: str, label: str) -> None:
    found = [
        (float(case.split()[1]), row.p50)
        for (case, variant, _), row in rows.items()
        if case.startswith(f"{name} ") and variant == "everything / lru"
    ]
    axes.plot(*zip(*sorted(found), strict=True), color=BLUE, marker="o", label="simulated")
    if known := published()["sensitivity"].get(name):
        axes.plot([float(x) for x in known], [*known.values()], color=ORANGE, marker="s", ls="--", label="published")
        axes.legend(fontsize=7)
    axes.axhline(1.0, color=GREY, lw=0.8)
    axes.set(xlabel=label, ylabel="decode, times as fast as LRU", title=f"gain against {label}", ylim=(0.9, None))
