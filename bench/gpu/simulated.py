"""`promoe-triton simulate` beside the decoding that was measured on the H200: what its descriptions are good for.

The demo model with experts of 9.4 MB, half of them in slots, over the bus as it is and held to less, by the packaged
`h200.json` and the software "kernels". What launches cost is taken from the run with everything in slots, and the
host's work for absent experts from the one without prediction; the others are predicted.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import record
from models import MODEL

from promoe_triton.simulation.description import read_hardware, read_software
from promoe_triton.simulation.routing import Statistics
from promoe_triton.simulation.shapes import LayerShape, ModelShape, model_shape
from promoe_triton.simulation.sweep import Choice, Scene, simulate, synthetic_texts

FOLDER = record.ROOT / "bench" / "results" / "nvidia-h200"
LINKS = {"first-look": 42e9, "first-look-25gbps": 24e9, "first-look-8gbps": 7.9e9}
"""Bytes per second that the link was seen to bring in those runs."""
VARIANTS: dict[str, dict[str, Any]] = {
    "resident": {"slots": 1.0, "ablation": "lru"},
    "lru": {"ablation": "lru"},
    "preemption + reorder, no prediction": {"predictor": "none"},
    "gate, always": {},
}
FITTED = {("first-look", "resident"), ("first-look", "preemption + reorder, no prediction")}
GATE = (0.784, 0.684)
"""Of the experts that the gate names one and two layers ahead, the share that is chosen (results/predictors)."""
EXPERT_BYTES, PROMPT, TOKENS = 9_400_000, 16, 40


def inflated() -> ModelShape:
    """Return the shape of the demo model with large experts."""
    small = model_shape(str(MODEL))
    weights = EXPERT_BYTES // 2 // 3
    return replace(
        small,
        layers=tuple(
            LayerShape(experts=one.experts, active=one.active, up_weights=2 * weights, down_weights=weights)
            for one in small.layers
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for simulated.csv")
    out: Path = parser.parse_args().out
    shape, machine = inflated(), read_hardware("h200")
    scene = Scene(
        shape=shape,
        hardware=machine,
        software=read_software("kernels"),
        texts=synthetic_texts(shape, Statistics(accuracy=GATE), 3, PROMPT + TOKENS),
    )
    (out / "simulated.csv").unlink(missing_ok=True)
    results = record.Results(out, "simulated")
    for name, bandwidth in LINKS.items():
        real = {row.variant: row.p50 for row in record.latest(FOLDER / f"{name}.csv") if row.metric == "time"}
        on_link = replace(scene, hardware=replace(machine, link_bandwidth=bandwidth))
        rows = []
        for variant, choice in VARIANTS.items():
            if variant in real:
                outcome = simulate(on_link, Choice(prompt=PROMPT, **choice), always_predict=True)
                ours, note = outcome.tpot_seconds * 1e3, "fitted" if (name, variant) in FITTED else "predicted"
                rows.append(record.row(name, variant, "simulated", "ms/token", [ours], note=f"real {real[variant]}"))
                off = 100 * (ours / real[variant] - 1.0)
                rows.append(record.row(name, variant, "deviation", "%", [off], note=note))
        results.write(rows)


if __name__ == "__main__":
    main()
