"""What is measured, the most important first: the cells of the benchmark as data.

`residency` is the share of all experts that are in slots when a call begins. The resident ones are computed in one
wave; the others are computed in a second wave, or in one wave for each of them ("one by one"), as if their copies had
landed by then: the time is that of the kernels, that of the link is left out. Waves are masks that lie on the device
beforehand, where the backend sends a table with each launch. All experts lie in slots throughout, and which of them
count as resident is drawn anew for every call. At 0 % there is a single wave, of all experts, through a table of the
wave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from promoe_triton.kernels.shapes import FURTHER, MAIN, SHAPES, TINY, TOKENS, LayerShape

OURS, DENSE, ONE_BY_ONE, BACKEND = "ours", "ours, no slots", "ours, one by one", "ours, backend"
EAGER, BATCHED, GROUPED = "hf eager", "hf batched_mm", "hf grouped_mm"
COMPILED = tuple(f"{name}, compiled" for name in (BATCHED, GROUPED))
OTHERS = ("vllm", "liger")
VARIANTS = (OURS, DENSE, ONE_BY_ONE, BACKEND, EAGER, BATCHED, GROUPED, *COMPILED, *OTHERS)

FIRST = (1, 8, 16, 512, 8192)
KERNELS = {
    "rows, up": (1, 2, 4),
    "rows, down": (1, 2, 4),
    "grouped, up": (8, 16, 32, 128, 512, 2048, 8192),
    "grouped, down": (8, 16, 32, 128, 512, 2048, 8192),
    "schedule": (8, 16, 32, 128, 512, 2048, 8192),
    "combine": (1, 8, 16, 128, 512, 2048, 8192),
}
"""Kernels, and the numbers of tokens each is swept over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One thing to measure. part: "layer", or a kernel's name."""

    part: str
    shape: str
    T: int
    variant: str = OURS
    residency: int = 100

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        return self.part, self.shape, str(self.T), self.variant, str(self.residency)

    def __str__(self) -> str:
        return f"{self.shape}, T {self.T}: {self.part}, {self.variant}, {self.residency} % resident"


def layers(
    shapes: Sequence[LayerShape],
    tokens: Sequence[int],
    variants: Sequence[str] = (OURS,),
    residencies: Sequence[int] = (100,),
) -> Iterator[Cell]:
    for shape in shapes:
        for T in tokens:
            for residency in residencies:
                for variant in variants:
                    yield Cell(part="layer", shape=shape.name, T=T, variant=variant, residency=residency)


def kernels(shapes: Sequence[LayerShape], most: int | None = None) -> Iterator[Cell]:
    for shape in shapes:
        for kernel, tokens in KERNELS.items():
            yield from (Cell(part=kernel, shape=shape.name, T=T) for T in tokens if most is None or most >= T)


def cells() -> list[Cell]:
    """Return everything, in order. What the first eight minutes are for comes first."""
    first = [
        cell
        for shape in MAIN
        for T in FIRST
        for cell in (*layers([shape], [T], (OURS, GROUPED, BATCHED)), *layers([shape], [T], (OURS,), (75,)))
    ]
    return unique(
        [
            *first,
            # What the remaining gates ask for.
            *layers(MAIN, (1, 16, 512, 8192), (DENSE,)),
            *layers(MAIN, (1, 8, 128, 512), (EAGER,)),
            *layers(MAIN, (1, 4, 8, 16, 128, 512, 2048, 8192), OTHERS),
            *layers(MAIN, TOKENS, (OURS, GROUPED, BATCHED)),
            *kernels(MAIN),
            *layers(MAIN, FIRST, (OURS,), (97, 90, 50, 0)),
            *layers(MAIN, (16, 512, 8192), (ONE_BY_ONE,), (97, 75)),
            *layers(MAIN, (1, 16, 512), (BACKEND,)),
            *layers(FURTHER, FIRST, (OURS, GROUPED, BATCHED)),
            *layers(FURTHER, FIRST, (OURS,), (75,)),
            *layers(MAIN, TOKENS, (EAGER,)),
            *layers(MAIN, (1, 8, 16, 512), COMPILED),
        ]
    )


def quick_cells() -> list[Cell]:
    """Return a little of everything, on tiny shapes: for the interpreter."""
    tokens = (1, 8, 40)
    return unique(
        [
            *layers(TINY, tokens, (OURS, GROUPED, BATCHED, EAGER, DENSE, *OTHERS)),
            *layers(TINY, tokens, (OURS,), (75, 0)),
            *layers(TINY, (40,), (ONE_BY_ONE,), (75,)),
            *layers(TINY, (1, 8), (BACKEND,)),
            *kernels(TINY, most=8),
        ]
    )


def unique(cells: Sequence[Cell]) -> list[Cell]:
    return list(dict.fromkeys(cells))


def shape_of(cell: Cell) -> LayerShape:
    return SHAPES[cell.shape]
