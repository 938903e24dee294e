"""What devices can do, from a file with its sources: programs on a multiprocessor, the least time of a layer."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from promoe_triton.kernels.shapes import LayerShape

DEVICES = Path(__file__).with_name("devices.json")

RESERVED = 1024
"""Bytes of shared memory that CUDA takes of every program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One kind of device; bytes and operations per second, and what a multiprocessor has of everything."""

    target: str
    device: str
    source: str
    bandwidth: float
    flops: Mapping[str, float]
    processors: int
    registers: int
    threads: int
    blocks: int
    shared: int
    shared_of_block: int

    @property
    def is_nvidia(self) -> bool:
        return self.target.startswith("sm_")

    def occupancy(self, *, registers: int, shared: int, warps: int) -> int:
        """Return how many programs of so many warps fit one multiprocessor at once."""
        if self.is_nvidia:
            # Registers are given to warps in 256s, and four schedulers share them.
            by_registers = self.registers // _up(max(registers, 1) * 32, 256) // 4 * 4 // warps
            memory = _up(shared + RESERVED, 128)
            return min(by_registers, self.shared // memory, self.threads // (32 * warps), self.blocks)
        # A wave has 64 lanes; each of the four units keeps at most eight waves, and its registers come in eights.
        units = 4
        waves = min(8, self.registers // units // 64 // _up(max(registers, 1), 8))
        by_shared = self.shared // shared if shared else self.blocks
        return min(waves * units // warps, by_shared, self.threads // (64 * warps), self.blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one stage of a call moves and computes, at least."""

    bytes: float
    flops: float

    def seconds(self, device: Device, dtype: torch.dtype) -> float:
        """Return the time a device takes at its peaks."""
        return max(self.bytes / device.bandwidth, self.flops / device.flops[str(8 * dtype.itemsize)])


def work(shape: LayerShape, T: int, dtype: torch.dtype) -> dict[str, Work]:
    """Return the least work of each stage, with tokens that choose among all experts alike."""
    size, R, call = dtype.itemsize, T * shape.A, shape.call(T, dtype)
    experts = shape.E * (1 - (1 - shape.A / shape.E) ** T)
    sums = call.sum_dtype.itemsize

    def product(rows: int, columns: int, K: int, out: int) -> Work:
        weights = experts * columns * (K + shape.biased) * size
        return Work(bytes=weights + rows * K * size + out, flops=2.0 * R * columns * K)

    stages = {
        "up": product(T, shape.up_rows, shape.D, R * shape.F * size),
        "down": product(R, shape.D, shape.F, R * shape.D * sums),
        "combine": Work(bytes=R * shape.D * sums + T * shape.D * size, flops=R * shape.D),
    }
    if not call.by_rows:
        # Ids and weights are read, order and rows of pairs written.
        stages = {"schedule": Work(bytes=R * (8 + size + 8), flops=0.0), **stages}
    return stages


@functools.cache
def devices(path: Path = DEVICES) -> dict[str, Device]:
    """Return all known devices by target."""
    return {target: Device(target=target, **facts) for target, facts in json.loads(path.read_text())["targets"].items()}


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
