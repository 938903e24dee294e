"""Repeats in which the things compared take turns, so that a machine's moods meet all of them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch


def take_turns(variants: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Call every variant once per repeat, each time beginning with another one; return what they returned."""
    names = list(variants)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            taken[name].append(variants[name]())
    return taken


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Divide repeat by repeat."""
    return [a / b for a, b in zip(above, below, strict=True)]


def interval(values: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """Return the 95 % interval of the mean, from means of values drawn again (bootstrap), the same every time."""
    chance = random.Random(0)
    means = sorted(statistics.fmean(chance.choices(values, k=len(values))) for _ in range(draws))
    return means[round(0.025 * draws)], means[round(0.975 * draws) - 1]


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def settle(device: torch.device) -> None:
    """Wait until a device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
