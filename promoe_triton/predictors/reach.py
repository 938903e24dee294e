"""Which layers a predictor speaks of, from where it stands, and how many experts it names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from promoe_triton.protocols import Seam


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
