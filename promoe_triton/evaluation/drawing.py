"""Figures of an evaluation: accuracy by layer, GOODPRED by distance, hit ratio by cache size (as in the paper)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from promoe_triton.errors import PromoeError
from promoe_triton.evaluation.measures import ALL, Row

DASHES = ("oracle", "belady", "random", "static")
"""Bounds and baselines are drawn thinner."""


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw one row of panels per text. Raises PromoeError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise PromoeError("a figure needs matplotlib: pip install matplotlib") from missing
    texts = list(dict.fromkeys(row.text for row in rows))
    figure = Figure(figsize=(13, 3.9 * len(texts)), layout="constrained")
    FigureCanvasAgg(figure)
    for panels, text in zip(figure.subplots(len(texts), 4, squeeze=False), texts, strict=True):
        mine = [row for row in rows if row.text == text]
        _by_layer(panels[0], mine, text)
        _by_distance(panels[1], mine)
        _calibration(panels[2], mine)
        _by_cache(panels[3], mine)
    figure.savefig(path, dpi=150)


def _lines(axes: Any, rows: Sequence[Row], mine: Sequence[Row], name: str, point: Callable[[Row], Any]) -> None:
    """Draw a line for every predictor or policy, in the same colour in every panel."""
    for number, label in enumerate(dict.fromkeys(getattr(row, name) for row in rows if getattr(row, name))):
        points = sorted(point(row) for row in mine if getattr(row, name) == label)
        if points:
            thin = {"lw": 1.0, "ls": "--", "ms": 3} if label in DASHES else {"lw": 1.8, "ms": 4}
            axes.plot(*zip(*points, strict=True), marker="o", color=f"C{number}", label=label, **thin)


def _chosen(rows: Sequence[Row]) -> int:
    """Return A: the middle one of the k that accuracies are given for."""
    ks = sorted({row.k for row in rows if row.metric == "accuracy"})
    return ks[len(ks) // 2]


def _by_layer(axes: Any, rows: Sequence[Row], text: str) -> None:
    A = _chosen(rows)
    mine = [r for r in rows if (r.metric, r.source, r.ahead, r.k) == ("accuracy", "routed", 1, A) and r.layer != ALL]
    _lines(axes, rows, mine, "predictor", lambda row: (int(row.layer), 100 * row.value))
    axes.set(xlabel="layer predicted, one ahead", ylabel=f"accuracy, {A} experts named (%)", title=text)
    axes.legend(fontsize=7)


def _by_distance(axes: Any, rows: Sequence[Row]) -> None:
    mine = [r for r in rows if r.metric == "GOODPRED" and r.ahead]
    if not mine:
        axes.set_axis_off()
        return
    _lines(axes, rows, mine, "predictor", lambda row: (row.ahead, 100 * row.value))
    axes.set(xlabel="layers ahead", ylabel="GOODPRED (%)", title="accuracy x fetch rate")
    axes.set_xticks(sorted({r.ahead for r in mine}))


def _calibration(axes: Any, rows: Sequence[Row]) -> None:
    mine = [r for r in rows if (r.metric, r.source, r.ahead) == ("chosen at rank", "routed", 1)]
    _lines(axes, rows, mine, "predictor", lambda row: (row.k, 100 * row.value))
    axes.set(xlabel="rank, one layer ahead", ylabel="chosen (%)", title="what a rank is worth")


def _by_cache(axes: Any, rows: Sequence[Row]) -> None:
    mine = [r for r in rows if r.metric == "hit ratio" and r.layer == ALL]
    _lines(axes, rows, mine, "policy", lambda row: (100 * row.slots, 100 * row.value))
    axes.set(xlabel="experts in slots (%)", ylabel="hit ratio (%)", title="nothing copied ahead")
    axes.legend(fontsize=7)
