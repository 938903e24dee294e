"""What-if: every combination of some choices, each simulated over the same texts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from promoe_triton.config import Config
from promoe_triton.links.fake import Wire
from promoe_triton.simulation.costs import Costs, Roofline
from promoe_triton.simulation.description import Hardware, Software
from promoe_triton.simulation.routing import Routed, Statistics, Synthetic, passes, popularity_of
from promoe_triton.simulation.shapes import ModelShape
from promoe_triton.simulation.simulator import Outcome, Simulator

PREDICTORS = ("stated", "perfect", "none")
"""As accurate as the statistics (or the trace) say; always right; never asked."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What stays the same in a sweep. texts: as they are routed; the first of them fills the cache and is not counted.

    costs: how long things take on this machine, given a shape (None: a roofline). wire: the link (None: the machine's).
    """

    shape: ModelShape
    hardware: Hardware
    software: Software
    texts: Sequence[Routed]
    costs: Callable[[ModelShape], Costs] | None = None

    def costs_of(self, shape: ModelShape) -> Costs:
        return self.costs(shape) if self.costs else Roofline(self.hardware, self.software, shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One combination. slots: as in `Config`; bits: per weight of a routed expert."""

    slots: int | float | str = 0.5
    batch: int = 1
    prompt: int = 128
    bits: float = 16.0
    predictor: str = "stated"
    chunking: str = "adaptive"
    policy: str = "lru"
    ablation: str = "all"
    distance: int = 2

    def __post_init__(self) -> None:
        if self.predictor not in PREDICTORS:
            raise ValueError(f"predictor must be one of {', '.join(PREDICTORS)}, got {self.predictor!r}")
        if not 0 < self.bits <= 32:
            raise ValueError(f"bits must be in (0, 32], got {self.bits}")

    def config(self, **others: Any) -> Config:
        return Config(
            slots=self.slots,
            predictor="none" if self.predictor == "none" else "auto",
            chunking=self.chunking,  # type: ignore[arg-type]
            policy=self.policy,
            ablation=self.ablation,
            distance=self.distance,
            **others,
        )


def combinations(**values: Sequence[Any]) -> Iterator[Choice]:
    """Yield every combination of these values of `Choice`, the last one changing fastest."""
    names = {field.name for field in fields(Choice)}
    assert values.keys() <= names
    for cells in itertools.product(*values.values()):
        yield Choice(**dict(zip(values, cells, strict=True)))


def simulate(scene: Scene, choice: Choice, **options: Any) -> Outcome:
    """Run one combination. options: further fields of `Config`."""
    shape = replace(scene.shape, bits=choice.bits)
    hardware = scene.hardware
    simulator = Simulator(
        shape,
        scene.costs_of(shape),
        Wire(bandwidth=hardware.link_bandwidth, latency=hardware.link_latency),
        choice.config(**options),
        popularity=popularity_of(scene.texts[: choice.batch]),
        slowed=hardware.slowed,
    )
    texts = [text.truth for text in scene.texts] if choice.predictor == "perfect" else scene.texts
    simulator.run(passes(texts[: choice.batch], prompt=choice.prompt, batch=choice.batch))
    simulator.reset()
    return simulator.run(passes(texts[choice.batch :], prompt=choice.prompt, batch=choice.batch))


def synthetic_texts(shape: ModelShape, statistics: Statistics, count: int, tokens: int) -> list[Routed]:
    """Return made-up texts for a model. Raises ValueError unless there is one beside the first."""
    if count < 2 or tokens < 2:
        raise ValueError(f"two texts of two tokens are needed at least, got {count} of {tokens}")
    synthetic = Synthetic(statistics, [(layer.experts, layer.active) for layer in shape.layers])
    return synthetic.texts(count, tokens)
