"""Repeats in which the things compared take turns, so that a machine's moods meet all of them alike."""

from __future__ import annotations

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


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def settle(device: torch.device) -> None:
    """Wait until a device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
