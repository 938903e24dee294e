"""How fast the simulator is: what an access takes, which is one expert in one call of a layer.

Qwen3-30B-A3B (48 layers of 128 experts, 8 chosen) on an RTX 4060's bus, half of the experts in slots, routing made up:
two prompts of 128 tokens with 64 decoded after each.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import record

from promoe_triton.simulation.description import read_hardware, read_software
from promoe_triton.simulation.routing import Statistics, passes
from promoe_triton.simulation.shapes import MODELS, model_shape
from promoe_triton.simulation.sweep import Choice, Scene, simulate, synthetic_texts

CASES: dict[str, dict[str, Any]] = {
    "lru": {"ablation": "lru"},
    "no prediction": {"predictor": "none"},
    "all": {},
}
PROMPT, TOKENS = 128, 64
MILLION_SECONDS = 20.0


def main() -> None:
    args = record.arguments(__doc__ or "").parse_args()
    record.confine()
    results = record.results(args, "simulating")
    prompt, tokens, repeats = (16, 8, 2) if args.quick else (PROMPT, TOKENS, 5)
    shape = model_shape(str(MODELS / "qwen3-30b-a3b.json"))
    scene = Scene(
        shape=shape,
        # Half of the experts are more than any such card holds; how long it takes to simulate does not depend on that.
        hardware=replace(read_hardware("rtx4060"), memory_bytes=1e12),
        software=read_software("kernels"),
        texts=synthetic_texts(shape, Statistics(), 2, prompt + tokens),
    )
    layers = range(len(shape.layers))
    accesses = sum(len(one.rows(layer)) for one in passes(scene.texts, prompt=prompt) for layer in layers)
    for case, choice in CASES.items():
        if results.has(case):
            continue
        results.begin()
        taken = []
        for _ in range(repeats):
            began = time.perf_counter()
            simulate(scene, Choice(prompt=prompt, **choice), always_predict=True)
            taken.append((time.perf_counter() - began) / accesses * 1e6)
        note = f"{accesses} accesses in each repeat"
        results.write(
            [
                record.row(
                    case, "simulator", "time", "us/access", taken, target=MILLION_SECONDS, better="lower", note=note
                )
            ]
        )


if __name__ == "__main__":
    main()
