"""Measure products with tiles on the device at hand, each checked first; what is measured is kept on disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from promoe_triton.errors import PromoeError
from promoe_triton.kernels.checks import IS_INTERPRETED
from promoe_triton.kernels.provenance import about_device, source_hash
from promoe_triton.kernels.samples import Experts, draw_call, draw_experts, sets_needed
from promoe_triton.kernels.shapes import LayerShape
from promoe_triton.kernels.tiles import Tile, target_of
from promoe_triton.kernels.timing import cache_bytes, time_graph, time_host
from promoe_triton.kernels.trials import TOLERANCES, ProductTrial
from promoe_triton.kernels.tuning import Measurement, Product

ROOM = 0.6
"""Share of the free memory that experts may take."""

SECONDS = 0.05
"""How long one tile is timed."""


def device_to_tune() -> torch.device:
    """Return the GPU; the CPU where kernels are interpreted. Raises PromoeError where they cannot run."""
    if torch.cuda.is_available() and not IS_INTERPRETED:
        return torch.device("cuda")
    if IS_INTERPRETED:
        return torch.device("cpu")
    raise PromoeError(
        "tuning measures on a GPU, and torch sees none; tables for other machines cannot be made here (to rehearse it "
        "on the CPU, set TRITON_INTERPRET=1 and give a tiny --shape)"
    )


def target_to_tune(device: torch.device) -> str:
    """Return the target that a table is for. What the interpreter takes says nothing about any GPU: it has its own."""
    return target_of(device) if device.type == "cuda" else "interpreter"


class Kept:
    """Measurements on disk, one a line, so that an interrupted run loses one at most."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Measurement] = {}
        if not path.exists():
            return
        for line in path.read_text().splitlines():
            # A line that was cut off, or is from another version, is measured again.
            with suppress(json.JSONDecodeError, KeyError, TypeError):
                value = json.loads(line)
                self._found[_canonical(value["key"])] = Measurement(**_numbers(value["measurement"]))

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: Mapping[str, Any]) -> Measurement | None:
        return self._found.get(_canonical(key))

    def put(self, key: Mapping[str, Any], measurement: Measurement) -> None:
        self._found[_canonical(key)] = measurement
        value = {name: None if number == math.inf else number for name, number in asdict(measurement).items()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps({"key": key, "measurement": value}) + "\n")


def _canonical(key: Any) -> str:
    return json.dumps(key, sort_keys=True)


def _numbers(value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: math.inf if number is None else number for name, number in value.items()}


class Measurer:
    """Measures products of these shapes, unless they are kept already; holds all of the shapes' experts."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, shapes: Sequence[LayerShape], kept: Kept, jobs: int = 1
    ) -> None:
        """jobs: how many tiles are compiled side by side. Raises PromoeError where the experts do not fit."""
        self._device, self._dtype, self._kept = device, dtype, kept
        self._jobs = jobs if device.type == "cuda" else 1
        self._sets_of = self._plan(shapes)
        self._experts: dict[LayerShape, list[Experts]] = {}
        self._trials: dict[Product, ProductTrial] = {}
        self.measured = 0

    def _plan(self, shapes: Sequence[LayerShape]) -> dict[LayerShape, int]:
        """Return how many sets of experts take turns, for each shape."""
        if self._device.type != "cuda":
            return dict.fromkeys(shapes, 1)
        free, _ = torch.cuda.mem_get_info(self._device)
        total = sum(shape.nbytes(self._dtype) for shape in shapes)
        if total > ROOM * free:
            raise PromoeError(
                f"the experts of these {len(shapes)} shapes take {total / 1e9:.1f} GB, the GPU has {free / 1e9:.1f} GB "
                "free; name fewer with --shape, the rest in another run with the same --out"
            )
        times, cache = int(ROOM * free) // total, cache_bytes(self._device)
        return {shape: min(sets_needed(shape, 1, self._dtype, cache), times) for shape in shapes}

    def next_entry(self) -> None:
        """Forget the calls of the entry before, and what they give."""
        self._trials.clear()

    def key(self, product: Product, tile: Tile) -> dict[str, Any]:
        """Return what a measurement depends on."""
        about = about_device(self._device)
        shape = asdict(product.problem.shape)
        # Two shapes that differ in nothing but their name are one.
        del shape["name"]
        return {
            **{name: about[name] for name in ("device", "driver", "torch", "triton")},
            "source": source_hash(),
            "dtype": str(self._dtype).removeprefix("torch."),
            "shape": shape,
            "T": product.problem.T,
            "part": product.part,
            "tile": asdict(tile),
        }

    def __call__(self, product: Product, tile: Tile) -> Measurement:
        key = self.key(product, tile)
        found = self._kept.get(key)
        if found is None:
            found = self._measure(product, tile)
            self._kept.put(key, found)
            self.measured += 1
        return found

    def prepare(self, ahead: Sequence[tuple[Product, Tile]]) -> None:
        """Compile tiles side by side, by running each once. What fails fails again when it is measured."""
        todo = [pair for pair in ahead if self._kept.get(self.key(*pair)) is None]
        if self._jobs < 2 or not todo:
            return

        def compile_one(pair: tuple[Product, Tile]) -> None:
            with suppress(Exception):
                self._trial(pair[0]).runs(pair[1])[0]()

        for product in dict.fromkeys(product for product, _ in todo):
            self._trial(product)
        with ThreadPoolExecutor(self._jobs) as pool:
            list(pool.map(compile_one, todo))
        torch.cuda.synchronize()

    def _measure(self, product: Product, tile: Tile) -> Measurement:
        try:
            trial = self._trial(product)
            error = trial.error(tile)
            if not error <= TOLERANCES[self._dtype]:
                return Measurement(error=error, reason=f"wrong: {error:.1e} from float64")
            timed = time_graph if self._device.type == "cuda" else time_host
            times = timed(trial.runs(tile), SECONDS)
        # Whatever the compiler has against a tile: another will do.
        except Exception as reason:
            failed = Measurement(reason=f"failed: {type(reason).__name__}: {' '.join(str(reason).split())[:200]}")
            self._check_alive(product, tile, failed)
            return failed
        return Measurement(p20=times.p20, p50=times.p50, p80=times.p80, error=error)

    def _check_alive(self, product: Product, tile: Tile, failed: Measurement) -> None:
        """Raise PromoeError where a tile has taken the GPU down; the next run leaves it out."""
        if self._device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as lost:
            self._kept.put(self.key(product, tile), failed)
            raise PromoeError(
                f"the GPU is lost to this process after {tile} for {product.problem}, {product.part}: {failed.reason}; "
                "run the same command again, it goes on without this tile"
            ) from lost

    def _trial(self, product: Product) -> ProductTrial:
        if product not in self._trials:
            shape, T = product.problem.shape, product.problem.T
            if shape not in self._experts:
                generator = torch.Generator(self._device).manual_seed(1)
                sets = self._sets_of[shape]
                self._experts[shape] = [draw_experts(shape, self._dtype, generator) for _ in range(sets)]
            sets_here = self._experts[shape]
            count = 1 if self._device.type != "cuda" else max(12 if T <= 32 else 4 if T <= 128 else 2, len(sets_here))
            generator = torch.Generator(self._device).manual_seed(T)
            calls = [draw_call(shape, T, self._dtype, generator) for _ in range(count)]
            self._trials[product] = ProductTrial(shape, product.part, sets_here, calls)
        return self._trials[product]


def default_jobs() -> int:
    return min(os.cpu_count() or 1, 8)
