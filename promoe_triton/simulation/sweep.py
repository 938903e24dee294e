"""What-if: every combination of some choices, each simulated over the same texts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from promoe_triton.config import Config, format_size
from promoe_triton.errors import PromoeError
from promoe_triton.links.fake import Wire
from promoe_triton.simulation.costs import Costs, Roofline
from promoe_triton.simulation.description import Hardware, Software
from promoe_triton.simulation.routing import Ids, Routed, Statistics, Synthetic, passes, popularity_of, recorded_ids
from promoe_triton.simulation.shapes import ModelShape
from promoe_triton.simulation.simulator import Outcome, Simulator
from promoe_triton.traces import Trace

PREDICTORS = ("stated", "perfect", "none")
"""As accurate as the statistics say; always right; never asked."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What stays the same in a sweep. texts: as they are routed; the first of them fills the cache and is not counted.

    named: the same texts with what real predictors name for them, by predictor.
    costs: how long things take on this machine, given a shape (None: a roofline).
    """

    shape: ModelShape
    hardware: Hardware
    software: Software
    texts: Sequence[Routed]
    named: Mapping[str, Sequence[Routed]] = field(default_factory=dict)
    costs: Callable[[ModelShape], Costs] | None = None

    def texts_of(self, predictor: str) -> Sequence[Routed]:
        """Return the texts with what a predictor names. Raises ValueError where it is not known what that is."""
        if predictor == "perfect":
            return [text.truth for text in self.texts]
        if predictor in PREDICTORS:
            return self.texts
        if predictor not in self.named:
            known = ", ".join((*PREDICTORS, *self.named))
            raise ValueError(f"predictor must be one of {known}, got {predictor!r}")
        return self.named[predictor]

    def first(self, texts: int, tokens: int) -> Scene:
        """Return the scene with so many of its texts, cut to so many tokens."""

        def cut(found: Sequence[Routed]) -> list[Routed]:
            return [text.first(tokens) for text in found[:texts]]

        return replace(self, texts=cut(self.texts), named={name: cut(found) for name, found in self.named.items()})

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
    policy: str = "auto"
    ablation: str = "all"
    distance: int = 2

    def __post_init__(self) -> None:
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
    names = {one.name for one in fields(Choice)}
    assert values.keys() <= names
    for cells in itertools.product(*values.values()):
        yield Choice(**dict(zip(values, cells, strict=True)))


def memory_needed(scene: Scene, choice: Choice) -> int:
    """Return the bytes of fast memory that a combination takes at the end of the scene's texts."""
    shape = replace(scene.shape, bits=choice.bits)
    return shape.memory(choice.config(), choice.batch, max(map(len, scene.texts)))


def check_fits(scene: Scene, choice: Choice) -> None:
    """Raise ValueError where the machine's fast memory cannot hold what a combination takes."""
    needed, hardware = memory_needed(scene, choice), scene.hardware
    if needed > hardware.memory_bytes:
        raise ValueError(
            f"slots={choice.slots!r} of {scene.shape.name} at {choice.bits:g} bits and a batch of {choice.batch} take "
            f"{format_size(needed)} with all other weights, and {hardware.name} has "
            f"{format_size(int(hardware.memory_bytes))}"
        )


def simulate(scene: Scene, choice: Choice, **options: Any) -> Outcome:
    """Run one combination. options: further fields of `Config`.

    Raises ValueError where it does not fit the machine, or asks for predictions that the texts do not state.
    """
    check_fits(scene, choice)
    stated = len(scene.texts[0].named)
    if choice.predictor == "stated" and choice.config().predicts and choice.distance > stated:
        raise ValueError(
            f"predictions are stated up to {stated} layers ahead (--accuracy), and distance={choice.distance} is more"
        )
    shape = replace(scene.shape, bits=choice.bits)
    hardware = scene.hardware
    simulator = Simulator(
        shape,
        scene.costs_of(shape),
        Wire(bandwidth=hardware.link_bandwidth, latency=hardware.link_latency),
        choice.config(**options),
        popularity=popularity_of(scene.texts[: choice.batch]),
        slowed=hardware.slowed,
        link_slowed=hardware.link_slowed,
    )
    if len(scene.texts) < 2 * choice.batch:
        raise ValueError(f"a batch of {choice.batch} needs {2 * choice.batch} texts, and there are {len(scene.texts)}")
    texts = scene.texts_of(choice.predictor)
    simulator.run(passes(texts[: choice.batch], prompt=choice.prompt, batch=choice.batch))
    simulator.reset()
    return simulator.run(passes(texts[choice.batch :], prompt=choice.prompt, batch=choice.batch))


def traced_texts(trace: Trace, shape: ModelShape, statistics: Statistics, tokens: int) -> list[Routed]:
    """Return the documents of a trace that are long enough, the first `tokens` tokens of each.

    What is predicted for them is made up, as accurate as the statistics say: a wrong guess is any expert not chosen.
    Raises PromoeError where the trace is of another model, or too short.
    """
    mine = [(layer.experts, layer.active) for layer in shape.layers]
    if (theirs := [(layer.experts, layer.active) for layer in trace.layers]) != mine:
        raise PromoeError(
            f"{trace.folder} is a trace of another model: its layers have {sorted({*theirs})} experts and active ones "
            f"({len(theirs)} layers), {shape.name} has {sorted({*mine})} ({len(mine)} layers)"
        )
    rng, found = np.random.default_rng(statistics.seed), []
    for document in trace.read():
        if document.tokens < tokens:
            continue
        ids = [recorded_ids(document, index, E)[:tokens] for index, (E, _) in enumerate(mine)]
        named = [
            [_guessed(rng, i, E, share) for i, (E, _) in zip(ids, mine, strict=True)] for share in statistics.accuracy
        ]
        found.append(Routed(ids=ids, named=named))
    if len(found) < 2:
        raise PromoeError(
            f"{trace.folder} has {len(found)} documents of {tokens} tokens and more, and two are needed: "
            "ask for shorter prompts and fewer tokens, or record more text"
        )
    return found


def _guessed(rng: np.random.Generator, ids_TA: Ids, E: int, share: float) -> Ids:
    """Return so large a share of what tokens chose, and in place of the others experts that they did not (-1: none)."""
    order_TE = rng.random((len(ids_TA), E))
    rows_T1, A = np.arange(len(ids_TA))[:, None], ids_TA.shape[1]
    chosen_TE = np.zeros((len(ids_TA), E + 1), dtype=bool)
    chosen_TE[rows_T1, ids_TA] = True  # -1: the last column, which is no expert
    order_TE[chosen_TE[:, :E]] = np.inf
    others_TA = np.argsort(order_TE, axis=1)[:, :A]
    others_TA = np.where(chosen_TE[rows_T1, others_TA], -1, others_TA)
    return np.where(rng.random(ids_TA.shape) < share, ids_TA, others_TA).astype(np.int16)


def synthetic_texts(shape: ModelShape, statistics: Statistics, count: int, tokens: int) -> list[Routed]:
    """Return made-up texts for a model. Raises ValueError unless there is one beside the first."""
    if count < 2 or tokens < 2:
        raise ValueError(f"two texts of two tokens are needed at least, got {count} of {tokens}")
    synthetic = Synthetic(statistics, [(layer.experts, layer.active) for layer in shape.layers])
    return synthetic.texts(count, tokens)
