"""What all parts of the reproduction share: models, machine, published numbers, and what was fitted."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import record

from promoe_triton.simulation.description import Hardware, Software, read_hardware, read_software
from promoe_triton.simulation.routing import Routed, Statistics
from promoe_triton.simulation.shapes import MODELS, ModelShape, model_shape
from promoe_triton.simulation.simulator import Outcome
from promoe_triton.simulation.sweep import Choice, Scene, simulate, synthetic_texts

__all__ = ["record"]  # found by way of this module

HERE = Path(__file__).resolve().parent
PAPER_MODELS = ("deepseek-moe-16b", "deepseek-v2-lite", "qwen1.5-moe-a2.7b", "qwen2-57b-a14b", "mixtral-8x7b")
FITTED = HERE / "fitted.json"
ACCURACY = (0.847, 0.797, 0.747)
"""By distance (paper, section on the learned predictor: 84.7 % on average, about 5 points less per further layer)."""

PAPER_LINK: dict[str, Any] = {"depth": 1, "always_predict": True}
"""The paper's copies run one after the other, each of one tensor."""


def published() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HERE / "published.json").read_text())
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What was fitted to the LRU and the 100 % column of the development table, and nothing else."""

    popularity: float
    reuse: float
    launch_seconds: float
    link_bandwidth: float

    @classmethod
    def read(cls) -> Fitted:
        return cls(**json.loads(FITTED.read_text())["values"])

    def hardware(self) -> Hardware:
        machine = read_hardware("rtx4090")
        return replace(machine, launch_seconds=self.launch_seconds, link_bandwidth=self.link_bandwidth)

    def statistics(self) -> Statistics:
        return Statistics(popularity=self.popularity, reuse=self.reuse, accuracy=ACCURACY)


@cache
def shape_of(name: str) -> ModelShape:
    return model_shape(str(MODELS / f"{name}.json"))


@cache
def texts_of(name: str, statistics: Statistics, count: int, tokens: int) -> list[Routed]:
    return synthetic_texts(shape_of(name), statistics, count, tokens)


def scene(
    name: str, fitted: Fitted, count: int, tokens: int, software: Software | None = None, *, roomy: bool = False
) -> Scene:
    """Return a model on the fitted machine, with `count` texts, the first of which fills the cache.

    roomy: with as much memory as is asked for. The development table has three quarters of DeepSeek-MoE-16B, and all of
    it, in slots: more than a card of 24 GB holds, so it is of another machine, or of a part of the model.
    """
    machine = fitted.hardware()
    return Scene(
        shape=shape_of(name),
        hardware=replace(machine, memory_bytes=1e12) if roomy else machine,
        software=software or read_software("loop"),
        texts=texts_of(name, fitted.statistics(), count, tokens),
    )


def choice_of(**choice: Any) -> Choice:
    return Choice(**{"chunking": "tensor", "policy": "lru", "prompt": 1} | choice)


def run(of: Scene, **choice: Any) -> Outcome:
    return simulate(of, choice_of(**choice), **PAPER_LINK)
