"""Figures of the kernels, from the CSV alone: times and roof, share of the roof, speed over rivals, waves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grid
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import table
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, str]

STYLES = {
    grid.OURS: ("#1f5fa8", "o-"),
    grid.DENSE: ("#7fb0e0", "o--"),
    grid.ONE_BY_ONE: ("#12365f", "s-"),
    grid.BACKEND: ("#2f74bd", "^:"),
    grid.GROUPED: ("#c98a1b", "s-"),
    grid.BATCHED: ("#7a5ea8", "D-"),
    grid.EAGER: ("#8a8f98", "v-"),
    grid.COMPILED[0]: ("#7a5ea8", "D:"),
    grid.COMPILED[1]: ("#c98a1b", "s:"),
    "vllm": ("#2e8b57", "P-"),
    "liger": ("#c0392b", "X-"),
}
RED, GREY = "#c0392b", "#8a8f98"
SHADES = ("#12365f", "#4c8fd0", "#c98a1b", "#2e8b57", "#7a5ea8", "#8c564b", "#8a8f98", "#d6a5c9")
MODES = ("graph", "eager", "interpreter")
"""The first that a variant has is drawn: what cannot be captured is drawn as it runs without a graph."""


def best_mode(rows: Sequence[Row], part: str, shape: str, variant: str, residency: str = "100") -> list[Row]:
    """Return the timed rows of one line, by T, all in one mode."""
    for mode in MODES:
        found = [
            row
            for row in rows
            if (row["part"], row["shape"], row["variant"], row["residency"]) == (part, shape, variant, residency)
            and row["mode"] == mode
            and row["status"] == "ok"
        ]
        if found:
            return sorted(found, key=lambda row: int(row["T"]))
    return []


def unique(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def shapes_of(rows: Sequence[Row]) -> list[str]:
    known = [shape.name for shape in (*grid.MAIN, *grid.FURTHER, *grid.TINY)]
    return [name for name in known if any(row["shape"] == name and row["status"] == "ok" for row in rows)]


def panels(count: int, width: float = 3.9, height: float = 3.3) -> tuple[Figure, list[Axes]]:
    if not count:
        raise LookupError("nothing for it was measured")
    columns = 3 if count in (3, 5, 6) else min(count, 4)
    lines = -(-count // columns)
    size = (max(width * columns, 6.5), height * lines + 0.6)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for spare in axes.flat[count:]:
        spare.set_visible(False)
    return figure, list(axes.flat[:count])


def tokens_axis(axes: Axes, rows: Sequence[Row]) -> None:
    ticks = sorted({int(row["T"]) for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{T}" for T in ticks], fontsize=7)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("tokens", fontsize=8)
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(alpha=0.25, lw=0.5)


def numbers(rows: Sequence[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def line(axes: Axes, found: Sequence[Row], variant: str) -> Any:
    color, style = STYLES.get(variant, (GREY, ".-"))
    times = numbers(found, "p50")
    whiskers = [
        [max(p50 - low, 0.0) for p50, low in zip(times, numbers(found, "p20"), strict=True)],
        [max(high - p50, 0.0) for p50, high in zip(times, numbers(found, "p80"), strict=True)],
    ]
    label = f"{variant} ({found[0]['mode']})"
    return axes.errorbar(
        [int(row["T"]) for row in found], times, whiskers, fmt=style, color=color, ms=3.5, lw=1.2, label=label
    )


def times(rows: Sequence[Row]) -> Figure:
    """Draw the time of the layer over T, a panel for each shape, with the roof below."""
    layer = [row for row in rows if row["part"] == "layer"]
    shapes = shapes_of(layer)
    figure, axes = panels(len(shapes))
    for ax, shape in zip(axes, shapes, strict=True):
        drawn = []
        for variant in STYLES:
            found = best_mode(layer, "layer", shape, variant)
            if found:
                line(ax, found, variant)
                drawn += found
        roof = best_mode(layer, "layer", shape, grid.OURS)
        ax.plot([int(r["T"]) for r in roof], numbers(roof, "roof"), "--", color=RED, lw=1.2, label="measured roof")
        ax.set_yscale("log")
        tokens_axis(ax, drawn)
        ax.set_title(shape, fontsize=9)
    axes[0].set_ylabel("us per layer", fontsize=8)
    legend(figure, axes)
    figure.suptitle("Time of one layer, everything resident", fontsize=10)
    return figure


def roofs(rows: Sequence[Row]) -> Figure:
    """Draw the share of the measured roof: the layer's, and each kernel's."""
    parts = [part for part in ("layer", *grid.KERNELS) if part != "schedule"]
    parts = [part for part in parts if any(row["part"] == part and row["status"] == "ok" for row in rows)]
    shapes = shapes_of(rows)
    figure, axes = panels(len(parts))
    for ax, part in zip(axes, parts, strict=True):
        drawn = []
        for shape, color in zip(shapes, SHADES, strict=False):
            found = best_mode(rows, part, shape, grid.OURS)
            if found:
                shares = [100 * share for share in numbers(found, "share")]
                ax.plot([int(r["T"]) for r in found], shares, "o-", ms=3.5, lw=1.2, color=color, label=shape)
                drawn += found
        ax.axhline(100, color=RED, lw=1.2, ls="--", label="measured roof")
        ax.set_ylim(bottom=0)
        tokens_axis(ax, drawn)
        ax.set_title("the layer" if part == "layer" else part, fontsize=9)
    axes[0].set_ylabel("% of the roof", fontsize=8)
    legend(figure, axes)
    figure.suptitle("Share of the roof: the larger of bytes over bandwidth and operations over rate", fontsize=10)
    return figure


def speedups(rows: Sequence[Row]) -> Figure:
    """Draw rivals' time over ours; both in the rival's mode."""
    layer = [row for row in rows if row["part"] == "layer"]
    shapes = shapes_of(layer)
    figure, axes = panels(len(shapes))
    for ax, shape in zip(axes, shapes, strict=True):
        drawn = []
        for variant, (color, style) in STYLES.items():
            if variant.startswith("ours"):
                continue
            theirs = best_mode(layer, "layer", shape, variant)
            pairs = [(row, own) for row in theirs if (own := counterpart(layer, row)) is not None]
            if pairs:
                ratios = [float(row["p50"]) / float(own["p50"]) for row, own in pairs]
                label = f"over {variant} ({theirs[0]['mode']})"
                ax.plot([int(r["T"]) for r, _ in pairs], ratios, style, color=color, ms=3.5, lw=1.2, label=label)
                drawn += theirs
        ax.axhline(1, color=RED, lw=1.2, ls="--", label="as fast")
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        tokens_axis(ax, drawn or layer)
        ax.set_title(shape, fontsize=9)
    axes[0].set_ylabel("times as fast", fontsize=8)
    legend(figure, axes)
    figure.suptitle("Speed of one layer over others, everything resident, in the same mode", fontsize=10)
    return figure


def counterpart(layer: Sequence[Row], row: Row) -> Row | None:
    same = ("shape", "T", "mode", "residency")
    found = [
        r for r in layer if r["variant"] == grid.OURS and r["status"] == "ok" and all(r[n] == row[n] for n in same)
    ]
    return found[0] if found else None


def waves(rows: Sequence[Row]) -> Figure:
    """Draw what splitting a call into waves costs, over the share of experts that are resident."""
    layer = [row for row in rows if row["part"] == "layer" and row["status"] == "ok"]
    shapes = [
        shape for shape in shapes_of(layer) if any(r["shape"] == shape and r["residency"] != "100" for r in layer)
    ]
    if not shapes:
        raise LookupError("no residency but 100 % was measured")
    figure, axes = panels(len(shapes))
    for ax, shape in zip(axes, shapes, strict=True):
        mode = best_mode(layer, "layer", shape, grid.OURS)[0]["mode"]
        mine = [row for row in layer if row["shape"] == shape and row["mode"] == mode]
        tokens = sorted({int(row["T"]) for row in mine if row["residency"] != "100"})
        for T, color in zip(tokens, SHADES, strict=False):
            whole = next(
                (r for r in mine if int(r["T"]) == T and r["residency"] == "100" and r["variant"] == grid.OURS), None
            )
            if whole is None:
                continue
            for variant, style in ((grid.OURS, "o-"), (grid.ONE_BY_ONE, "s:")):
                found = [r for r in mine if int(r["T"]) == T and r["variant"] == variant]
                found.sort(key=lambda r: int(r["residency"]))
                if found:
                    ratios = [float(r["p50"]) / float(whole["p50"]) for r in found]
                    label = f"T {T}" + (", one by one" if variant == grid.ONE_BY_ONE else "")
                    places = [int(r["residency"]) for r in found]
                    ax.plot(places, ratios, style, color=color, ms=4, lw=1.2, label=label)
        ax.axhline(1, color=RED, lw=1.2, ls="--", label="one pass")
        ax.set_xlabel("% of the experts resident", fontsize=8)
        ax.tick_params(labelsize=7)
        ax.grid(alpha=0.25, lw=0.5)
        ax.set_title(f"{shape} ({mode})", fontsize=9)
    axes[0].set_ylabel("time over that of one pass", fontsize=8)
    legend(figure, axes)
    figure.suptitle(
        "What computing in two waves costs (dotted: a wave for each missing expert); no copies", fontsize=10
    )
    return figure


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, each label once."""
    labels: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    figure.legend(labels.values(), labels.keys(), fontsize=7, loc="outside right center", frameon=False)


def provenance(figure: Figure, rows: Sequence[Row]) -> None:
    cells = rows[-1]
    first = (
        f"{cells['device']} · driver {cells['driver'] or 'none'} · torch {cells['torch']} · triton {cells['triton']}"
    )
    roof = f"copy {float(cells['copy_gbps']):.0f} GB/s, product {float(cells['matmul_tflops']):.3g} TFLOPS"
    where = f"{cells['dtype']} · {roof} · {cells['commit']} · {cells['date']}"
    text = f"{first} · transformers {cells['transformers']}\n{where}"
    figure.supxlabel(f"{text} · medians, whiskers p20 to p80", fontsize=6, color=GREY)


FIGURES = {"times": times, "roofs": roofs, "speedups": speedups, "waves": waves}


def all_figures(folder: Path) -> None:
    """Draw what the CSV of a folder has rows for, beside it."""
    rows = table.latest(folder / "kernels.csv")
    if not any(row["status"] == "ok" for row in rows):
        return
    for name, draw in FIGURES.items():
        try:
            figure = draw(rows)
        except LookupError as reason:
            print(f"no figure {name}: {reason}")
            continue
        provenance(figure, rows)
        figure.savefig(folder / f"kernels_{name}.png", dpi=140)
        plt.close(figure)
        print(f"drew kernels_{name}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the kernels' figures from the CSV, beside it.")
    default = Path(__file__).resolve().parents[1] / "results" / "gpu"
    parser.add_argument("--out", type=Path, default=default, help="folder with kernels.csv")
    all_figures(parser.parse_args().out)
