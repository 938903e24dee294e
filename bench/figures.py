"""Draw the figures, from the CSV and nothing else; the targets and roofs in them are rows or columns there."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from record import RESULTS, Row, latest, read

matplotlib.use("Agg")

import matplotlib.pyplot as plt

OURS = "promoe_triton"
BLUE, GREY, PALE, RED, GOLD = "#1f5fa8", "#8a8f98", "#c3c8d0", "#c0392b", "#c98a1b"


def unique(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def find(rows: Sequence[Row], case: str, variant: str, metric: str) -> Row | None:
    matches = [r for r in rows if (r.case, r.variant, r.metric) == (case, variant, metric)]
    return matches[-1] if matches else None


def bars(axes: Axes, places: Sequence[float], rows: Sequence[Row], width: float, color: str, label: str) -> None:
    """Draw medians with a whisker from the 20th to the 80th percentile."""
    heights = [r.p50 for r in rows]
    whiskers = [[max(r.p50 - r.p20, 0.0) for r in rows], [max(r.p80 - r.p50, 0.0) for r in rows]]
    axes.bar(places, heights, width, yerr=whiskers, color=color, label=label, capsize=2, error_kw={"lw": 0.8})


def number(axes: Axes, place: float, row: Row, text: str) -> None:
    axes.annotate(text, (place, row.p80), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=7)


def lines(case: str) -> str:
    """Break a shape's name into lines, to stand below a bar."""
    experts, rest = case.split(", ", 1)
    return f"{experts}\n{rest}"


def provenance(figure: Figure, path: Path) -> None:
    cells = read(path)[-1]
    text = (
        f"{cells['device']}\ntorch {cells['torch']}, transformers {cells['transformers']} · {cells['commit']} · "
        f"{cells['date']} · bars: median, whiskers: p20 to p80"
    )
    figure.supxlabel(text, fontsize=6, color=GREY)


def resident(rows: Sequence[Row]) -> Figure:
    cases, metrics = unique([r.case for r in rows]), unique([r.metric for r in rows])
    stock = ("eager", "batched_mm", "grouped_mm")
    figure, panels = plt.subplots(
        1, len(metrics), figsize=(3.8 * len(metrics) + 1, 3.8), layout="constrained", squeeze=False
    )
    for axes, metric in zip(panels[0], metrics, strict=True):
        shown = [case for case in cases if find(rows, case, "ours / best", metric)]
        for offset, (variant, color) in enumerate(zip((*stock, OURS), (PALE, GOLD, GREY, BLUE), strict=True)):
            found = [find(rows, case, variant, metric) for case in shown]
            places = [i + 0.2 * (offset - 1.5) for i in range(len(shown))]
            bars(axes, places, [r for r in found if r], 0.19, color, variant)
        for i, case in enumerate(shown):
            share, best = find(rows, case, "ours / best", metric), find(rows, case, OURS, metric)
            assert share is not None
            assert best is not None
            assert share.target is not None
            roof = share.target * best.p50 / share.p50
            axes.hlines(roof, i - 0.42, i + 0.42, color=RED, lw=1.2, ls="--", label="target" if i == 0 else None)
            top = max((best, roof_row(best, roof)), key=lambda r: r.p80)
            number(axes, i + 0.3, top, f"{share.p50:.2f}x")
        axes.set_xticks(range(len(shown)), [lines(case) for case in shown], fontsize=6.5)
        axes.set_title(metric, fontsize=10)
        axes.set_ylabel("tokens/s")
        axes.margins(y=0.15)
    figure.legend(*panels[0][0].get_legend_handles_labels(), fontsize=7, loc="outside right center")
    figure.suptitle("Everything resident: tokens/s; the number is ours over the best of the three", fontsize=10)
    return figure


def roof_row(like: Row, height: float) -> Row:
    return replace(like, p20=height, p50=height, p80=height)


def overhead(rows: Sequence[Row]) -> Figure:
    cases = unique([r.case for r in rows])
    stages = unique([r.variant for r in rows if r.metric == "stage"])
    figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    colors = ("#12365f", "#b9cbe2", "#2f74bd", "#9aa9bd", "#7fb0e0", "#5b6472")
    bottom = [0.0] * len(cases)
    for stage, color in zip(stages, colors, strict=True):
        values = [max(r.p50, 0.0) if (r := find(rows, case, stage, "stage")) else 0.0 for case in cases]
        axes.bar([i - 0.21 for i in range(len(cases))], values, 0.38, bottom=bottom, color=color, label=stage)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    whole = [r for case in cases if (r := find(rows, case, "layer - products", "overhead"))]
    bars(axes, [i + 0.21 for i in range(len(cases))], whole, 0.38, GOLD, "layer - products")
    for i, r in enumerate(whole):
        number(axes, i + 0.21, r, f"{r.p50:.0f}")
    target = next(r.target for r in whole if r.target)
    axes.axhline(target, color=RED, lw=1.2, ls="--", label=f"target: {target:g} us")
    axes.set_xticks(range(len(cases)), [lines(case) for case in cases], fontsize=7)
    axes.set_ylabel("us per layer and decode step")
    axes.set_title("What a layer costs beside its matrix products, one token", fontsize=10)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def disk(rows: Sequence[Row]) -> Figure:
    cases = unique([r.case for r in rows])
    columns = -(-len(cases) // 2) if len(cases) > 2 else len(cases)
    figure, panels = plt.subplots(
        -(-len(cases) // columns),
        columns,
        figsize=(4.2 * columns, 5.4),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    order = sorted(cases, key=lambda case: "computing" in case)
    for axes, case in zip(panels.flat, order, strict=False):
        draw_reads(axes, [r for r in rows if r.case == case])
        axes.set_title(case, fontsize=9)
    for axes in panels[:, 0]:
        axes.set_ylabel("GB/s")
    panels.flat[0].legend(fontsize=7)
    figure.suptitle("Experts through the product's link, against plain O_DIRECT reads of the same files", fontsize=10)
    return figure


def draw_reads(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw bandwidth over reads in flight, one line per chunk size; dashed: the target share of the best read."""
    # Those into small buffers and of the experts' ranges are in the CSV only.
    reads = [r for r in rows if r.metric == "bandwidth" and " MiB x " in r.variant and "small" not in r.variant]
    chunks = unique([r.variant.split(" ", 1)[1].rsplit(" x ", 1)[0] for r in reads])
    shades = dict(zip(chunks, (0.35, 0.55, 0.75, 0.95), strict=False))
    for kind, cmap, style in (("preadv", "Greys", "o-"), ("link", "Blues", "s-")):
        for chunk in chunks:
            found = [r for r in reads if r.variant.startswith(f"{kind} {chunk} x ")]
            depths = [int(r.variant.rsplit(" x ", 1)[1]) for r in found]
            if found:
                color = plt.get_cmap(cmap)(shades[chunk])
                axes.plot(depths, [r.p50 for r in found], style, ms=4, lw=1.2, color=color, label=f"{kind} {chunk}")
    best = max((r.p50 for r in reads if r.variant.startswith("preadv")), default=0.0)
    share = next((r for r in rows if r.variant.startswith("default link")), None)
    axes.axhline(best, color=GREY, lw=1, ls=":", label="best plain read")
    if share is not None and share.target is not None:
        axes.axhline(best * share.target, color=RED, lw=1.2, ls="--", label=f"target: {share.target:.0%} of it")
        axes.text(0.02, 0.03, f"default link: {share.p50:.0%} of the best", transform=axes.transAxes, fontsize=8)
    axes.set_xticks([1, 2, 4])
    axes.set_xlabel("reads in flight", fontsize=8)
    axes.set_ylim(bottom=0)


def offload(rows: Sequence[Row]) -> Figure:
    cases = unique([r.case for r in rows])
    figure, panels = plt.subplots(1, len(cases), figsize=(4.6 * len(cases), 3.6), layout="constrained", squeeze=False)
    for axes, case in zip(panels[0], cases, strict=True):
        speeds = [r for r in rows if r.case == case and r.unit == "tokens/s"]
        for i, r in enumerate(speeds):
            bars(axes, [i], [r], 0.6, BLUE if r.variant == OURS else GREY, "")
            number(axes, i, r, f"{r.p50:.3g}")
        ratio = next((r for r in rows if r.case == case and r.unit == "x"), None)
        if ratio is not None and ratio.target is not None:
            ours = next(r for r in speeds if r.variant == OURS)
            roof = ratio.target * ours.p50 / ratio.p50
            axes.axhline(roof, color=RED, lw=1.2, ls="--", label=f"target: {ratio.target:g} x accelerate")
            axes.legend(fontsize=7)
        title = f"{case}: ours is {ratio.p50:.2f} x accelerate" if ratio else case
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(speeds)), [r.variant.replace(", ", ",\n") for r in speeds], fontsize=7)
        axes.set_ylabel("tokens/s while decoding")
        axes.margins(y=0.15)
    figure.suptitle("512 experts, half of them in slots, held-out text", fontsize=10)
    return figure


def beyond_ram(rows: Sequence[Row]) -> Figure:
    cases = unique([r.case for r in rows])
    bound = {"peak of loading over imports": "slots + dense + 100 MB", "peak of the process": "slots + dense + 1 GB"}
    shown = ("slots + dense part", *bound)
    figure, panels = plt.subplots(1, len(cases), figsize=(4.6 * len(cases), 3.6), layout="constrained", squeeze=False)
    for axes, case in zip(panels[0], cases, strict=True):
        found = [r for metric in shown if (r := find(rows, case, OURS, metric))]
        for i, r in enumerate(found):
            bars(axes, [i], [r], 0.6, GREY if i == 0 else BLUE, "")
            number(axes, i, r, f"{r.p50 / 1e3:.2f} GB")
            if r.metric in bound and r.target is not None:
                axes.hlines(r.target, i - 0.4, i + 0.4, color=RED, lw=1.2, ls="--", label=None if i > 1 else "bound")
                axes.annotate(
                    bound[r.metric], (i, r.target), (0, 12), textcoords="offset points", ha="center", fontsize=7
                )
        whole = find(rows, case, OURS, "checkpoint")
        axes.set_title(f"{case}: checkpoint of {whole.p50 / 1e3:.1f} GB" if whole else case, fontsize=9)
        axes.set_xticks(range(len(found)), [r.metric.replace(" of ", "\nof ") for r in found], fontsize=7)
        axes.set_ylabel("anonymous memory, MB")
        axes.margins(y=0.25)
        axes.legend(fontsize=7)
    figure.suptitle("Memory taken by loading and running from slots", fontsize=10)
    return figure


STEPS = {
    "static": PALE,
    "lru": GREY,
    "+prefetch": "#b9cbe2",
    "+chunks": "#7fb0e0",
    "+preemption": "#2f74bd",
    "+reorder": "#1d569c",
    "all": "#12365f",
    "preemption + reorder, no prediction": GOLD,
}


PROMPT_STEPS = {
    "static": PALE,
    "lru": GREY,
    "layer": "#b9cbe2",
    "preemption": "#2f74bd",
    "all": "#12365f",
}
"""Of the ablation of a prompt, in which nothing is predicted."""


def proactive(rows: Sequence[Row]) -> Figure:
    """Draw the ablation as the paper does, and beside it prompts, batches and expert sizes."""
    decode = [c for c in unique([r.case for r in rows]) if re.fullmatch(r"decode, [\d.]+% in slots", c)]
    decode.sort(key=share_of)
    prefill = [c for c in unique([r.case for r in rows]) if c.startswith("prefill")]
    prefill.sort(key=lambda case: int(case.split()[1]))
    figure, panels = plt.subplots(2, 2, figsize=(11, 7), layout="constrained", width_ratios=(3, 2))
    (times, prompts), (speeds, others) = panels
    grouped(times, rows, decode, [f"{share_of(c):g} %" for c in decode], STEPS, "time")
    for i, case in enumerate(decode):
        for variant, style in (("resident", ":"), ("moving what was missed", "--")):
            found = find(rows, case, variant, "time")
            if found:
                label = {":": "everything resident", "--": "moving what was missed"}[style] if i == 0 else None
                axes_line(times, i, found, style, label)
    times.set_ylabel("ms per token")
    times.set_xlabel("experts in slots", fontsize=8)
    times.set_title("Decode", fontsize=10)
    times.legend(fontsize=6.5, ncols=3, loc="upper right")
    grouped(prompts, rows, prefill, [c.split(",")[1].strip() for c in prefill], PROMPT_STEPS, "time")
    prompts.legend(fontsize=6.5, loc="upper left")
    prompts.set_ylabel("ms per prompt")
    prompts.set_title("A prompt after another, half of the experts in slots", fontsize=10)
    for variant, color in STEPS.items():
        found = [(share_of(c), r) for c in decode if (r := find(rows, c, f"{variant} / lru", "speed"))]
        if found:
            shares, ratios = [share for share, _ in found], [r for _, r in found]
            whiskers = [[r.p50 - r.p20 for r in ratios], [r.p80 - r.p50 for r in ratios]]
            speeds.errorbar(shares, [r.p50 for r in ratios], whiskers, fmt="o-", ms=4, color=color, label=variant)
    for case in decode:
        goal = find(rows, case, "all / lru", "speed")
        if goal and goal.target:
            speeds.hlines(goal.target, share_of(case) - 3, share_of(case) + 3, color=RED, lw=1.2, ls="--")
    speeds.axhline(1.0, color=GREY, lw=0.8)
    speeds.set_xlabel("% of the experts in slots", fontsize=8)
    speeds.set_ylabel("decode speed over lru")
    speeds.set_ylim(top=speeds.get_ylim()[1] + 0.2)
    speeds.legend(fontsize=6.5, ncols=2, loc="upper right")
    ratio_bars(others, rows)
    return figure


def share_of(case: str) -> float:
    return float(case.split()[1].rstrip("%"))


def axes_line(axes: Axes, place: int, row: Row, style: str, label: str | None) -> None:
    axes.hlines(row.p50, place - 0.45, place + 0.45, color="black", lw=1, ls=style, label=label)


def grouped(
    axes: Axes,
    rows: Sequence[Row],
    cases: Sequence[str],
    labels: Sequence[str],
    variants: Mapping[str, str],
    metric: str,
) -> None:
    """Draw bars of the variants there are, case by case. variants: their colours."""
    shown = [v for v in variants if any(find(rows, c, v, metric) for c in cases)]
    width = 0.86 / max(len(shown), 1)
    for offset, variant in enumerate(shown):
        found = [(i, r) for i, c in enumerate(cases) if (r := find(rows, c, variant, metric))]
        places = [i + width * (offset - (len(shown) - 1) / 2) for i, _ in found]
        bars(axes, places, [r for _, r in found], width, variants[variant], variant)
    axes.set_xticks(range(len(cases)), labels, fontsize=8)


def ratio_bars(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw the speed of all over lru for batches and sizes, and of chance over no prediction."""
    found = [r for r in rows if r.metric == "speed" and re.search("batch|experts of|chance", r.case)]
    found.sort(key=lambda r: "chance" in r.case)
    labels = [re.sub(r"decode, |, 50.0% in slots", "", r.case).replace(", ", ",\n") for r in found]
    for i, r in enumerate(found):
        bars(axes, [i], [r], 0.6, GOLD if "chance" in r.case else BLUE, "")
        number(axes, i, r, f"{r.p50:.2f}")
    axes.axhline(1.0, color=RED, lw=1, ls="--")
    axes.set_xticks(range(len(found)), labels, fontsize=6, rotation=30, ha="right")
    axes.set_ylabel("speed")
    axes.set_title("all over lru; gold: random predictions over none", fontsize=10)
    axes.margins(y=0.15)


def urgent(rows: Sequence[Row]) -> Figure:
    figure, axes = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
    for way in unique([r.variant for r in rows]):
        late, rate = find(rows, "urgent", way, "start, p99"), share(rows, way)
        early = find(rows, "urgent", way, "start, p50")
        if late and early and rate:
            color = BLUE if way.startswith("adaptive") else GREY
            axes.plot([rate.p50] * 2, [early.p50, late.p50], "-", color=color, lw=1)
            axes.plot([rate.p50], [late.p50], "o", color=color)
            axes.annotate(way, (rate.p50, late.p50), (5, 2), textcoords="offset points", fontsize=7)
    target = next(r.target for r in rows if r.metric == "start, p99" and r.target is not None)
    axes.axhline(target, color=RED, lw=1.2, ls="--", label=f"target: {target:g} ms, 95 % of the bandwidth")
    axes.axvline(0.95, color=RED, lw=1.2, ls="--")
    axes.set_yscale("log")
    axes.set_xlabel("bandwidth while copying ahead, share of the best way", fontsize=8)
    axes.set_ylabel("ms until an urgent copy starts\n(line: from p50, dot: p99)", fontsize=8)
    axes.set_title("Ways to cut copies", fontsize=10)
    axes.margins(x=0.15)
    axes.legend(fontsize=7)
    return figure


def share(rows: Sequence[Row], way: str) -> Row | None:
    return next((r for r in rows if r.variant == way and r.unit == "share of best"), None)


def others(rows: Sequence[Row]) -> Figure:
    """Draw the time of each way over its share of experts on the device."""
    return times_of(rows, "ms/token", "Beside other ways to keep some experts on the GPU")


def layers(rows: Sequence[Row]) -> Figure:
    """Draw the time of layers of real shapes, and below it, dashed, that of their copies."""
    return times_of(rows, "ms/pass", "Layers of real shapes, random weights, recorded routing")


def times_of(rows: Sequence[Row], unit: str, title: str) -> Figure:
    cases = unique([r.case for r in rows if r.metric == "time"])
    columns = min(len(cases), 4)
    lines_ = -(-len(cases) // columns)
    size = (max(3.6 * columns + 1, 8.5), 2.9 * lines_ + 0.6)
    figure, panels = plt.subplots(lines_, columns, figsize=size, layout="constrained", squeeze=False)
    for spare in panels.flat[len(cases) :]:
        spare.set_visible(False)
    for axes, case in zip(panels.flat, cases, strict=False):
        found = [r for r in rows if r.case == case and r.metric == "time"]
        for i, r in enumerate(found):
            bars(axes, [i], [r], 0.6, BLUE if r.variant.startswith((OURS, "preemption")) else GREY, "")
            number(axes, i, r, f"{r.p50:.3g}")
            if copies := find(rows, case, r.variant, "link"):
                axes.hlines(copies.p50, i - 0.35, i + 0.35, color=RED, lw=1.2, ls="--")
        axes.set_xticks(range(len(found)), [r.variant.replace(", ", ",\n") for r in found], fontsize=6)
        axes.set_title(case, fontsize=8)
        axes.set_ylabel(unit)
        axes.margins(y=0.15)
    figure.suptitle(title, fontsize=10)
    return figure


FIGURES: dict[str, Callable[[Sequence[Row]], Figure]] = {
    "resident": resident,
    "overhead": overhead,
    "disk": disk,
    "offload": offload,
    "beyond_ram": beyond_ram,
    "proactive": proactive,
    "urgent": urgent,
    "others": others,
    "layers": layers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the figures from the CSV, beside them.")
    parser.add_argument("--out", type=Path, help="folder with the CSV (default: all of bench/results)")
    args = parser.parse_args()
    folders = [args.out] if args.out else sorted(path for path in RESULTS.parent.iterdir() if path.is_dir())
    for path in (path for folder in folders for path in sorted(folder.glob("*.csv"))):
        # A link or a size of its own has a file of its own: proactive-25gbps.csv.
        draw = FIGURES.get(path.stem.partition("-")[0])
        rows = [row for row in latest(path) if row.metric not in ("failed", "cannot run")]
        if draw is not None and rows:
            figure = draw(rows)
            provenance(figure, path)
            figure.savefig(path.with_suffix(".png"), dpi=140)
            plt.close(figure)
            print(f"drew {path.parent.name}/{path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
