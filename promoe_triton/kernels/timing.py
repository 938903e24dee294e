"""Time calls that rotate over their inputs: under a CUDA graph, as a host launches them, or in the interpreter.

Each repeat runs all calls once; its time divided by their number is one sample. Work on a GPU is timed by events.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

LEAST, MOST = 7, 200
"""Repeats."""

Calls = Sequence[Callable[[], object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of one call: quantiles over `repeats`."""

    p20: float
    p50: float
    p80: float
    repeats: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Times:
        p20, p50, p80 = (samples[0],) * 3
        if len(samples) > 1:
            cuts = statistics.quantiles(samples, n=10, method="inclusive")
            p20, p50, p80 = cuts[1], statistics.median(samples), cuts[7]
        return cls(p20=p20, p50=p50, p80=p80, repeats=len(samples))

    @property
    def spread(self) -> float:
        return (self.p80 - self.p20) / self.p50


def time_graph(calls: Calls, seconds: float) -> Times:
    """Capture all calls in one CUDA graph and time its replays. The calls have run before, so all is compiled.

    Whatever happens, nothing of the graph is left: its memory is a pool of its own, which others cannot use.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph: Any = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        return _events(graph.replay, len(calls), seconds)
    finally:
        graph.reset()
        # The allocator keeps what a graph gave back until it is asked for it.
        torch.cuda.empty_cache()


def time_eager(calls: Calls, seconds: float) -> Times:
    """Time calls as the host launches them, one after the other: what is longer of launching and computing."""

    def all_of_them() -> None:
        for call in calls:
            call()

    return _events(all_of_them, len(calls), seconds)


def _events(action: Callable[[], object], calls: int, seconds: float) -> Times:
    """Repeat an action on the GPU for about so many seconds."""

    def repeat(times: int) -> list[float]:
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
        for begin, end in marks:
            begin.record()
            action()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in marks]

    action()
    torch.cuda.synchronize()
    estimate = min(repeat(2))
    repeats = min(max(int(seconds / max(estimate, 1e-6)), LEAST), MOST)
    return Times.of([taken / calls for taken in repeat(repeats)])


def time_host(calls: Calls, seconds: float) -> Times:
    """Time calls that compute on the CPU."""
    samples: list[float] = []
    until = time.perf_counter() + seconds
    while not samples or (len(samples) < LEAST and time.perf_counter() < until):
        began = time.perf_counter()
        for call in calls:
            call()
        samples.append((time.perf_counter() - began) / len(calls))
    return Times.of(samples)


def cache_bytes(device: torch.device) -> int:
    """Return the size of a GPU's L2 cache; nothing has to be evicted where kernels are interpreted."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))
