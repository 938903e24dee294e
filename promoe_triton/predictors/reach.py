"""Which layers a predictor speaks of, from where it stands, and how many experts it names.

Letters: T tokens, A active experts per token, E experts, H targets, K experts named.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from promoe_triton.predictors.places import Place, find_place
from promoe_triton.protocols import Prediction, Seam

ACTIVE = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
"""What routers, blocks and configs call A."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedLayers:
    """The MoE layers of a model in the order of its experts modules.

    experts: E, without those that stand for none. active: A, experts per token. stacks: equal for layers that
    follow each other; an encoder and a decoder, say, are two stacks.
    """

    experts: tuple[int, ...]
    active: tuple[int, ...]
    stacks: tuple[str, ...]


def find_layers(model: nn.Module, experts: Mapping[str, int]) -> RoutedLayers:
    """Return the MoE layers of a model. Raises ValueError where it does not say how many experts a token gets.

    experts: how many experts each experts module has, by its path, in the model's order.
    """
    places = [find_place(model, path) for path in experts]
    return RoutedLayers(
        experts=tuple(experts.values()),
        active=tuple(_active(model, place) for place in places),
        stacks=tuple(place.stack for place in places),
    )


def _active(model: nn.Module, place: Place) -> int:
    block = model.get_submodule(place.block)
    router = model.get_submodule(place.router) if place.router else None
    configs = [getattr(module, "config", None) for module in (router, block, model.get_submodule(place.path), model)]
    for holder, name in itertools.product((router, block, *configs), ACTIVE):
        if isinstance(getattr(holder, name, None), int):
            return int(getattr(holder, name))
    raise ValueError(f"{type(block).__name__} does not say how many experts a token gets; give a width")


class Target(NamedTuple):
    """A layer to predict, `steps` tokens from now."""

    layer: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How far and how wide to predict (paper, section on stride prefetching).

    distance: how many layers ahead; from the last layer's output, how many of the next token's first layers.
    width: experts named per layer and token; None: as many as the layer chooses.
    Raises ValueError where either is below 1.
    """

    distance: int = 1
    width: int | None = None

    def __post_init__(self) -> None:
        if self.distance < 1 or (self.width is not None and self.width < 1):
            raise ValueError(f"distance and width must be 1 or more, got {self.distance} and {self.width}")

    def targets(self, stacks: Sequence[str], layer: int, seam: Seam) -> Iterator[Target]:
        """Yield what is predicted at a seam of a layer, nearest first.

        stacks: by layer, equal for the layers of one stack. A state before attention also speaks of its own
        layer; the output of a stack's last layer of its first layers at the next token.
        """
        mine = [i for i, stack in enumerate(stacks) if stack == stacks[layer]]
        place = mine.index(layer)
        match seam:
            case Seam.ENTERED:
                yield from (Target(i, 0) for i in mine[place : place + 1 + self.distance])
            case Seam.ROUTED:
                yield from (Target(i, 0) for i in mine[place + 1 : place + 1 + self.distance])
            case Seam.LEFT:
                yield from (Target(i, 1) for i in mine[: self.distance])

    def named(self, experts: int, active: int, tokens: int) -> int:
        """Return how many of a layer's experts are named for so many tokens, of `active` experts each."""
        return min(experts, (self.width or active) * tokens)

    def rank(self, scores_HE: Tensor, targets: Sequence[Target], layers: RoutedLayers, tokens: int) -> list[Prediction]:
        """Name the best experts of H targets by their scores [H, E], E that of the largest layer."""
        kinds = {(layers.experts[target.layer], layers.active[target.layer]) for target in targets}
        if len(kinds) > 1:
            alone = ([target] for target in targets)
            return [p for i, one in enumerate(alone) for p in self.rank(scores_HE[i : i + 1], one, layers, tokens)]
        ((E, A),) = kinds
        best_HK, ids_HK = scores_HE[:, :E].topk(self.named(E, A, tokens))
        return [
            Prediction(layer=target.layer, steps=target.steps, expert_ids=ids_K, scores=best_K)
            for target, ids_K, best_K in zip(targets, ids_HK.unbind(), best_HK.unbind(), strict=True)
        ]
