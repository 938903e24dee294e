"""Which tiles a table should have: what to try, in which order, and which of it wins. Measures nothing itself.

An entry of a table stands for both products of a layer: the first takes its `gated_columns`, the second its `columns`,
both its depth, warps and stages. So products are measured one by one, and an entry's time is the sum of the two. Of
the entries measured for every problem that one wins whose times, over the best entry's of each problem, have the
smallest geometric mean; within TIE of it, the simplest.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from promoe_triton.kernels.shapes import LayerShape
from promoe_triton.kernels.tiles import Tile, TileTable

CANDIDATES = Path(__file__).with_name("candidates.json")

FORMS = ("rows", "rows_transposed", "grouped")

TIE = 1.01
"""Entries this near to the best are as good; what is simpler is taken then."""

HOPELESS = 2.0
"""A tile so many times slower than the best of one problem is not tried on the others."""

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an entry stands in a table. block: rows of a block of "grouped", 0 for the other forms."""

    form: str
    block: int = 0

    def __str__(self) -> str:
        return f"{self.form} {self.block}" if self.block else self.form


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An entry of a table."""

    columns: int
    gated_columns: int
    depth: int
    warps: int
    stages: int

    @property
    def shared(self) -> tuple[int, int, int]:
        return self.depth, self.warps, self.stages

    @property
    def simplicity(self) -> tuple[int, ...]:
        """What is smaller is simpler: fewer stages, fewer warps, less held by one program."""
        return self.stages, self.warps, self.depth * (self.columns + self.gated_columns), self.columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A layer's call of T tokens."""

    shape: LayerShape
    T: int

    def __str__(self) -> str:
        return f"{self.shape.name}, T {self.T}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """The first ("up") or the second ("down") product of a problem."""

    problem: Problem
    part: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Seconds of one product with one tile, and its relative error; reason: why it does not count, empty if it does."""

    p20: float = math.inf
    p50: float = math.inf
    p80: float = math.inf
    error: float = math.inf
    reason: str = ""


Measure = Callable[[Product, Tile], Measurement]


def size_of(dtype: torch.dtype) -> str:
    """Return what a table calls a type."""
    return "32" if dtype == torch.float32 else "16"


def places(target: str, dtype: torch.dtype, path: Path = CANDIDATES) -> list[Place]:
    """Return all entries of a target's table that there are candidates for."""
    forms = _forms(target, dtype, path)
    blocks = [Place(form="grouped", block=int(block)) for block in forms["grouped"]]
    return [Place(form=form) for form in FORMS if form != "grouped"] + blocks


def parse_forms(names: Sequence[str]) -> tuple[str, ...]:
    """Return forms by name, all where none is named. Raises ValueError."""
    for name in names:
        if name not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {name!r}")
    return tuple(names) or FORMS


def candidates(place: Place, target: str, dtype: torch.dtype, path: Path = CANDIDATES) -> list[Entry]:
    """Return what to try for an entry, the simplest first."""
    lists = _forms(target, dtype, path)[place.form]
    lists = lists[str(place.block)] if place.block else lists
    names = ("columns", "gated_columns", "depth", "warps", "stages")
    every = [Entry(**dict(zip(names, values, strict=True))) for values in itertools.product(*(lists[n] for n in names))]
    return sorted(every, key=lambda entry: entry.simplicity)


def _forms(target: str, dtype: torch.dtype, path: Path) -> Any:
    data = json.loads(path.read_text())
    if target not in data["kinds"]:
        raise ValueError(f"target must be one of {', '.join(data['kinds'])}, got {target!r}")
    return data["candidates"][data["kinds"][target]][size_of(dtype)]


def problems(
    place: Place, table: TileTable, shapes: Sequence[LayerShape], tokens: Sequence[int], dtype: torch.dtype
) -> list[Problem]:
    """Return the calls that the table answers from an entry."""

    def asks(shape: LayerShape, T: int) -> bool:
        call = shape.call(T, dtype)
        if call.by_rows:
            return place.form == ("rows_transposed" if shape.transposed else "rows")
        return place.form == "grouped" and table.block(call) == place.block

    return [Problem(shape=shape, T=T) for shape in shapes for T in tokens if asks(shape, T)]


def table_of(place: Place, entry: Entry, dtype: torch.dtype) -> TileTable:
    """Return a table with this entry and no other."""
    value: Any = asdict(entry)
    form = {place.form: {str(place.block): value} if place.block else value}
    return TileTable(target="tuning", entries={size_of(dtype): form})


def tile_of(place: Place, entry: Entry, product: Product, dtype: torch.dtype) -> Tile:
    """Return the tile that a table with this entry gives for a product: cut to the shape, as always."""
    shape = product.problem.shape
    call = shape.call(product.problem.T, dtype)
    table, of = table_of(place, entry, dtype), shape.up if product.part == "up" else shape.down
    return table.grouped(call, of) if place.block else table.rows(call, of)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The entry that won. ratio: geometric mean of its times over the best; spread: largest (p80 - p20) / p50.

    compared: how many entries, of `entries`, had times for every problem. gain: geometric mean of the times of the
    entry that the table had over this one's, None where those were not measured.
    """

    entry: Entry
    ratio: float
    spread: float
    compared: int
    entries: int
    gain: float | None = None


def choose(times: Mapping[Entry, Sequence[float]]) -> tuple[Entry, float]:
    """Return the winner among entries, each with its time for every problem, and its mean over the best."""
    best = [min(column) for column in zip(*times.values(), strict=True)]
    means = {entry: geometric([t / b for t, b in zip(row, best, strict=True)]) for entry, row in times.items()}
    least = min(means.values())
    winner = min((e for e in times if means[e] <= least * TIE), key=lambda entry: entry.simplicity)
    return winner, means[winner]


def geometric(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


class Search:
    """The measurements of one entry: which come next, and what they say in the end."""

    def __init__(
        self,
        place: Place,
        problems: Sequence[Problem],
        entries: Sequence[Entry],
        dtype: torch.dtype,
        present: Entry | None = None,
    ) -> None:
        """present: what the table has now. Its depth, warps and stages are tried first."""
        self._place, self._problems, self._dtype, self._present = place, problems, dtype, present
        kept = [present, *entries] if present is not None else list(entries)
        self._entries = list(dict.fromkeys(kept))
        self._found: dict[tuple[Product, Tile], Measurement] = {}
        self._best: dict[Product, float] = {}

    def __len__(self) -> int:
        return sum(len(products) for products, _ in self._steps())

    @property
    def entries(self) -> int:
        """How many there are to choose from."""
        return len(self._entries)

    def run(
        self, measure: Measure, prepare: Callable[[Sequence[tuple[Product, Tile]]], object] | None = None
    ) -> Iterator[tuple[Product, Tile, Measurement | None]]:
        """Measure what is not known to be hopeless; yield after each step (None: left out), so a caller may stop.

        prepare: told which tiles come next, to compile them side by side.
        """
        for _, steps in itertools.groupby(self._steps(), key=lambda step: step[1].shared):
            group = list(steps)
            if prepare is not None:
                ahead = [
                    (p, tile_of(self._place, entry, p, self._dtype)) for products, entry in group for p in products
                ]
                prepare([pair for pair in dict.fromkeys(ahead) if pair not in self._found])
            for products, entry in group:
                for product in products:
                    yield self._step(measure, products, product, entry)

    def _step(
        self, measure: Measure, products: Sequence[Product], product: Product, entry: Entry
    ) -> tuple[Product, Tile, Measurement | None]:
        tile = tile_of(self._place, entry, product, self._dtype)
        found = self._found.get((product, tile))
        if found is None and not self._is_hopeless(products, entry):
            found = self._found[product, tile] = measure(product, tile)
            if not found.reason:
                self._best[product] = min(self._best.get(product, math.inf), found.p50)
        return product, tile, found

    def _steps(self) -> Iterator[tuple[list[Product], Entry]]:
        """Return one step for each tile of each part: entries that share it differ in the other part only."""
        seen = set()
        shared = dict.fromkeys(entry.shared for entry in self._entries)
        for group in shared:
            for part in ("up", "down"):
                for entry in (e for e in self._entries if e.shared == group):
                    gated = part == "up" and any(p.shape.gate.gated for p in self._problems)
                    key = part, entry.gated_columns if gated else entry.columns, group
                    if key not in seen:
                        seen.add(key)
                        yield [Product(problem=problem, part=part) for problem in self._problems], entry

    def _is_hopeless(self, products: Sequence[Product], entry: Entry) -> bool:
        """Whether this tile failed, or was far too slow, for another problem."""
        for product in products:
            found = self._found.get((product, tile_of(self._place, entry, product, self._dtype)))
            if found is not None and (found.reason or found.p50 > HOPELESS * self._best[product]):
                return True
        return False

    def choice(self) -> Choice | None:
        """Return the winner of what was measured for every problem; None where nothing was."""
        times = {entry: row for entry in self._entries if (row := self._times(entry)) is not None}
        if not times:
            return None
        winner, ratio = choose(times)
        used = [m for problem in self._problems for m in self._both(winner, problem) or ()]
        gain = None
        if self._present in times:
            gain = geometric([a / b for a, b in zip(times[self._present], times[winner], strict=True)])
        spread = max((m.p80 - m.p20) / m.p50 for m in used)
        return Choice(entry=winner, ratio=ratio, spread=spread, compared=len(times), entries=self.entries, gain=gain)

    def _times(self, entry: Entry) -> list[float] | None:
        pairs = [self._both(entry, problem) for problem in self._problems]
        return None if None in pairs else [sum(m.p50 for m in pair) for pair in pairs if pair is not None]

    def _both(self, entry: Entry, problem: Problem) -> list[Measurement] | None:
        products = [Product(problem=problem, part=part) for part in ("up", "down")]
        found = [self._found.get((p, tile_of(self._place, entry, p, self._dtype))) for p in products]
        right = [m for m in found if m is not None and not m.reason]
        return right if len(right) == len(products) else None


def present_entry(table: TileTable, place: Place, dtype: torch.dtype) -> Entry | None:
    """Return what a table has at a place."""
    forms = table.entries.get(size_of(dtype), {}).get(place.form, {})
    value = forms.get(str(place.block)) if place.block else forms
    return Entry(**value) if value else None


def merged(
    tables: Mapping[str, Any],
    target: str,
    dtype: torch.dtype,
    chosen: Mapping[Place, Choice],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the contents of a file of tables with entries of one target replaced, and what that rests on.

    about: device, versions and date; it is put beside every entry, under "measured".
    """
    result: dict[str, Any] = json.loads(json.dumps(tables))
    table = result.setdefault("targets", {}).setdefault(target, {}).setdefault(size_of(dtype), {})
    measured = result.setdefault("measured", {}).setdefault(target, {})
    for place, choice in chosen.items():
        value: Any = asdict(choice.entry)
        if place.block:
            table.setdefault(place.form, {})[str(place.block)] = value
        else:
            table[place.form] = value
        proof = {"over_best": choice.ratio, "spread": choice.spread, "gain": choice.gain}
        rounded = {name: None if number is None else round(number, 4) for name, number in proof.items()}
        measured[f"{size_of(dtype)} {place}"] = {
            **about,
            **rounded,
            "compared": f"{choice.compared} of {choice.entries}",
        }
    return result


def dumped(tables: Any, depth: int = 0) -> str:
    """Return a file of tables as text, an entry a line."""
    if not isinstance(tables, dict) or (depth and not any(isinstance(value, dict) for value in tables.values())):
        return json.dumps(tables)
    lines = [f"{json.dumps(name)}: {dumped(value, depth + 1)}" for name, value in tables.items()]
    pad = " " * (depth + 1)
    return "{\n" + ",\n".join(pad + line for line in lines) + "\n" + " " * depth + "}" + ("" if depth else "\n")
