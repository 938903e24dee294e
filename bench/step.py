"""One decode step as a picture: what computes, what is copied ahead, what is waited for.

Decodes held-out text with the demo model inflated to experts of 9.4 MB, half of them in slots, and records a timeline.
Kept is the step whose time is the median of those that drop a copy, where any does (`step.json`, a Chrome trace); the
figure is drawn from that file alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
from decoding import Decoder
from models import MODEL, large_checkpoint, prompts, sizes
from subjects import load

import promoe_triton
from promoe_triton.timeline import Span, Timeline

WARM_UP, TOKENS = 32, 31


def steps_of(model: Any) -> list[list[Span]]:
    """Return the spans of each of some decode steps."""
    decoder = Decoder(model, prompts(MODEL, 1, WARM_UP + TOKENS))
    decoder.step(WARM_UP)
    found = []
    for _ in range(TOKENS):
        with promoe_triton.record_timeline(model) as timeline:
            decoder.step(1)
        found.append(list(timeline.spans))
    return found


def length(spans: Sequence[Span]) -> float:
    own = [span for span in spans if span.lane == "compute"]
    return max(span.end for span in own) - min(span.begin for span in own)


def draw(trace: Path) -> None:
    """Draw the computing lane above, the copying lanes below, and when copies were given up on a lane of their own."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    events = json.loads(trace.read_text())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [event for event in events if event["ph"] == "X"]
    colors = {
        "compute": ("#1f5fa8", "computing experts"),
        "predict": ("#c98a1b", "predicting"),
        "stall": ("#c0392b", "waiting for a copy"),
        "urgent": ("#8a8f98", "copied because a layer waits"),
        "speculation": ("#7fb0e0", "copied ahead"),
    }
    figure, axes = plt.subplots(figsize=(11, 2.8), layout="constrained")
    for event in spans:
        place = len(lanes) - 1 - event["tid"]
        color = colors[event["cat"]][0]
        axes.barh(place, event["dur"] / 1e3, 0.8, left=event["ts"] / 1e3, color=color, lw=0.2, ec="white")
    first: dict[int, float] = {}
    for event in spans:
        if event["cat"] == "compute":
            first.setdefault(int(event["name"].split()[1]), event["ts"] / 1e3)
    for layer, begin in first.items():
        axes.axvline(begin, color="black", lw=0.4, ls=":")
        axes.annotate(f"layer {layer}", (begin, len(lanes) - 0.45), fontsize=6.5)
    for event in events:
        if event["ph"] == "i":
            axes.plot(event["ts"] / 1e3, len(lanes) - 1 - event["tid"], "kx", ms=5)
    copied = {event["tid"] for event in spans}
    names = [name if tid in copied else "given up" for tid, name in lanes.items()]
    axes.set_yticks([len(lanes) - 1 - tid for tid in lanes], names, fontsize=8)
    axes.set_ylim(-0.6, len(lanes) - 0.1)
    axes.set_xlabel("ms", fontsize=8)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color, _ in colors.values()]
    labels = [label for _, label in colors.values()]
    figure.legend(handles, labels, fontsize=7, ncols=len(colors), loc="outside lower center")
    figure.savefig(trace.with_suffix(".png"), dpi=140)
    plt.close(figure)


def main() -> None:
    parser: argparse.ArgumentParser = record.arguments(__doc__ or "")
    parser.add_argument("--scratch", type=Path, help="folder for 5 GB of checkpoint (default: a temporary one)")
    args = parser.parse_args()
    record.confine()
    trace = record.folder(args) / "step.json"
    if args.force or args.quick or not trace.exists():
        nbytes = 1_100_000 if args.quick else 9_400_000
        with large_checkpoint(MODEL, args.scratch, nbytes, "a checkpoint with large experts") as folder:
            model = load(folder, {"slots": sizes(folder).experts // 2})
            steps = steps_of(model)
        steps = [spans for spans in steps if any(span.kind == "dropped" for span in spans)] or steps
        typical = statistics.median_low([length(spans) for spans in steps])
        timeline = Timeline()
        timeline.spans.extend(next(spans for spans in steps if length(spans) == typical))
        trace.parent.mkdir(parents=True, exist_ok=True)
        trace.write_text(json.dumps({**timeline.trace(), "otherData": record.provenance()}) + "\n")
    draw(trace)
    print(f"drew {trace.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
