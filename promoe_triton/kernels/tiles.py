"""Tiles: a pure function of shapes, types and the device, from a table that is data (`tiles.json`).

The tile of a call follows from the whole call's shape, never from the wave, so that no split into waves shows in
the result. Whoever wants other tiles passes another table.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("tiles.json")

ROWS_TOKENS = 4
"""Up to so many tokens, rows are computed one after the other."""

ROWS_PAIRS = 64
"""And up to so many routed pairs."""

PRECISE_PAIRS = 128
"""Up to so many routed pairs, the rows that are summed are kept in single precision."""

SMALL_SUMS = 128
"""Sums of one row in a tile, at most, where weights have 8 bits: in registers they are there twice, once widened."""

CONTRACTION = {"enable_fp_fusion": True}
"""Contraction of products and sums decides bits, and the compiler's default is not the same in all versions."""


def power_of_2(n: int) -> int:
    """Return the least power of two that is not below n, at least 1. (Triton's own takes microseconds.)"""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What one program computes: `rows` by `columns` of the result, in steps of `depth`."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Return what the compiler is told."""
        return {"num_warps": self.warps, "num_stages": self.stages, **CONTRACTION}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What tiles depend on: T tokens with A of E experts each, and the type of the rows."""

    T: int
    A: int
    E: int
    dtype: torch.dtype

    @property
    def by_rows(self) -> bool:
        """Whether rows are computed one after the other instead of grouped by expert."""
        return self.T <= ROWS_TOKENS and self.T * self.A <= ROWS_PAIRS

    @property
    def sum_dtype(self) -> torch.dtype:
        """The type of the rows that are summed: few cost nothing in single precision, many are moved twice."""
        return torch.float32 if self.T * self.A <= PRECISE_PAIRS else self.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One product: K inputs to N results (`gated`: from 2 N sums), and how the weights lie.

    small: the weights have 8 bits, and become those of the rows in registers.
    """

    N: int
    K: int
    gated: bool
    transposed: bool
    small: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TileTable:
    """The tiles of one kind of device."""

    target: str
    entries: Mapping[str, Any]

    def rows(self, call: Call, shape: Shape) -> Tile:
        """Return the tile of `rows_product`."""
        return _rows(self, call, shape)

    def block(self, call: Call) -> int:
        """Return how many rows the blocks of a schedule have: about twice an expert's share, as far as tiles go."""
        sizes = sorted(map(int, self.entry("grouped", call)))
        share = power_of_2(max(2 * call.T * call.A // max(call.E, 1), 1))
        return max((size for size in sizes if size <= share), default=sizes[0])

    def grouped(self, call: Call, shape: Shape) -> Tile:
        """Return the tile of `grouped_product`."""
        return _grouped(self, call, shape)

    def entry(self, form: str, call: Call) -> Any:
        """Return what the table says of one form of a product."""
        return self.entries["32" if call.dtype == torch.float32 else "16"][form]


@functools.lru_cache(maxsize=1024)
def _rows(table: TileTable, call: Call, shape: Shape) -> Tile:
    entry = table.entry("rows_transposed" if shape.transposed else "rows", call)
    # Two steps at least: with a single one, ptxas for sm_100 spills where registers are left.
    depth = min(entry["depth"], max(power_of_2(shape.K) // 2, 16))
    depth = _depth(depth, shape.K, least=16)
    columns = entry["gated_columns" if shape.gated else "columns"]
    return Tile(rows=1, columns=columns, depth=depth, warps=entry["warps"], stages=entry["stages"])


@functools.lru_cache(maxsize=1024)
def _grouped(table: TileTable, call: Call, shape: Shape) -> Tile:
    rows = table.block(call)
    entry = table.entry("grouped", call)[str(rows)]
    columns = entry["gated_columns" if shape.gated else "columns"]
    if shape.small:
        columns = min(columns, SMALL_SUMS // 2 if shape.gated else SMALL_SUMS)
    columns = min(columns, max(power_of_2(shape.N), 16))
    depth = _depth(entry["depth"], shape.K, least=16)
    return Tile(rows=rows, columns=columns, depth=depth, warps=entry["warps"], stages=entry["stages"])


def _depth(depth: int, K: int, least: int) -> int:
    """Return a step that divides K, if one of two will; no longer than K needs."""
    depth = min(depth, max(power_of_2(K), least))
    half = depth // 2
    return half if K % depth and not K % half and half >= least else depth


@functools.cache
def table_for(target: str, path: Path = TABLE) -> TileTable:
    """Return the shipped tiles of a target ("sm_90", "gfx942")."""
    targets = json.loads(path.read_text())["targets"]
    if target not in targets:
        raise ValueError(f"target must be one of {', '.join(targets)}, got {target!r}")
    return TileTable(target=target, entries=targets[target])


def target_of(device: torch.device) -> str:
    """Return the target whose tiles suit a device; the interpreter takes those of sm_80."""
    if device.type == "cpu":
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    known = {8: "sm_80" if capability == (8, 0) else "sm_120", 9: "sm_90", 10: "sm_100", 11: "sm_100"}
    # All others, 8.6 and 8.9 among them, have 99 KiB of shared memory for a program.
    return known.get(capability[0], "sm_120")
