"""`promoe-triton tune`: measure tiles on the GPU at hand and write a table of the best. Nothing else ever tunes."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from promoe_triton.cli.generation import check_exists
from promoe_triton.cli.output import print_note, print_table, steps_progress
from promoe_triton.errors import PromoeError

if TYPE_CHECKING:
    import torch

    from promoe_triton.kernels.measuring import Measurer
    from promoe_triton.kernels.shapes import LayerShape
    from promoe_triton.kernels.tiles import TileTable
    from promoe_triton.kernels.tuning import Choice, Place

DTYPES = ("bfloat16", "float16", "float32")


def tune(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Tune for this model's layers: a folder, config.json or id.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The table to write, or to put this GPU's entries into.")] = Path(
        "tiles.json"
    ),
    shape: Annotated[
        list[str] | None,
        typer.Option(help="A layer as D/F/E/A or by name; may be repeated (default: the benchmark's)."),
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens per call; may be repeated (default: 1 to 8192).")
    ] = None,
    form: Annotated[
        list[str] | None, typer.Option(help="rows, rows_transposed or grouped; may be repeated (default: all).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: bfloat16, float16 or float32.")] = "bfloat16",
    minutes: Annotated[float | None, typer.Option(help="End after so many minutes with what was measured.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where measurements are kept (default: OUT.measurements.jsonl).")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Tiles compiled side by side (default: up to 8).")] = None,
) -> None:
    """Measure tiles of the Triton kernels on this GPU and write a table of the best.

    Every tile is compared with float64 before it counts. What was measured is kept: run again, it goes on.
    """
    import torch

    from promoe_triton.kernels.measuring import Kept, Measurer, default_jobs, device_to_tune, target_to_tune
    from promoe_triton.kernels.tuning import TOKENS, parse_forms

    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if minutes is not None and minutes <= 0:
        raise ValueError(f"--minutes must be above 0, got {minutes:g}")
    if any(T < 1 for T in tokens or ()):
        raise ValueError(f"--tokens must be 1 or more, got {min(tokens or ())}")
    forms = parse_forms(form or ())
    shapes = shapes_to_tune(model, shape or ())
    device = device_to_tune()
    base = read_tables(out)
    check_writable(out)
    kept = Kept(cache or out.with_name(f"{out.name}.measurements.jsonl"))
    torch_dtype = getattr(torch, dtype)
    measurer = Measurer(device, torch_dtype, shapes, kept, default_jobs() if jobs is None else jobs)
    tuning = Tuning(
        target=target_to_tune(device),
        dtype=torch_dtype,
        measurer=measurer,
        base=base,
        until=None if minutes is None else time.monotonic() + 60 * minutes,
    )
    chosen = tuning.run(forms, shapes, tokens or TOKENS, lambda tables: write_tables(out, tables))
    if not chosen:
        raise PromoeError(f"nothing was tuned: {tuning.why_nothing}")
    print_table(
        ["entry", "columns", "gated", "depth", "warps", "stages", "compared", "before / now", "spread"],
        [row_of(place, choice) for place, choice in chosen.items()],
        title=f"{tuning.target}, {dtype}: {out}",
    )
    print_note("before / now: time of the entry that the table had over this one's, a geometric mean over all calls.")
    if tuning.left:
        print_note(f"Time is up: {tuning.left} entries were not finished. Run again to go on where this ended.")


class Tuning:
    """One run of the command: place by place, each written as soon as it is chosen."""

    def __init__(
        self,
        *,
        target: str,
        dtype: torch.dtype,
        measurer: Measurer,
        base: dict[str, Any],
        until: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.target, self._dtype, self._measurer = target, dtype, measurer
        targets = base["targets"]
        # A target that is new has no entry of its own yet, and its table must have them all.
        self._base = {**base, "targets": {**targets, target: targets.get(target) or targets["sm_80"]}}
        self._until, self._clock = until, clock
        self.left = 0
        self.why_nothing = "none of these shapes and tokens is answered by these forms"

    def run(
        self,
        forms: Sequence[str],
        shapes: Sequence[LayerShape],
        tokens: Sequence[int],
        write: Callable[[dict[str, Any]], object],
    ) -> dict[Place, Choice]:
        """Tune every entry that some call asks for; return what was chosen."""
        from promoe_triton.kernels.tiles import TileTable
        from promoe_triton.kernels.tuning import merged, places

        table = TileTable(target=self.target, entries=self._base["targets"][self.target])
        chosen: dict[Place, Choice] = {}
        for place in places(self.target, self._dtype):
            if place.form not in forms:
                continue
            choice = self._tune(place, table, shapes, tokens)
            if choice is not None:
                chosen[place] = choice
                write(merged(self._base, self.target, self._dtype, chosen, self._about(shapes)))
        return chosen

    def _tune(
        self, place: Place, table: TileTable, shapes: Sequence[LayerShape], tokens: Sequence[int]
    ) -> Choice | None:
        from promoe_triton.kernels.tuning import Search, candidates, present_entry, problems

        calls = problems(place, table, shapes, tokens, self._dtype)
        if not calls:
            return None
        if self._is_over():
            self.left += 1
            self.why_nothing = "the time was up before all calls of any entry were measured"
            return None
        present = present_entry(table, place, self._dtype)
        search = Search(place, calls, candidates(place, self.target, self._dtype), self._dtype, present)
        self._measurer.next_entry()
        with steps_progress(f"{place}", len(search)) as step:
            for product, tile, found in search.run(self._measurer, self._measurer.prepare):
                what = "left out" if found is None else found.reason or f"{found.p50 * 1e6:.1f} us"
                step(f"{product.problem}, {product.part}, {tile.rows}x{tile.columns}x{tile.depth}: {what}")
                if self._is_over():
                    self.left += 1
                    break
        choice = search.choice()
        if choice is None:
            self.why_nothing = f"no tile of {place} was measured, or right, for all of {len(calls)} calls"
        return choice

    def _is_over(self) -> bool:
        return self._until is not None and self._clock() >= self._until

    def _about(self, shapes: Sequence[LayerShape]) -> dict[str, Any]:
        from promoe_triton.kernels.measuring import device_to_tune
        from promoe_triton.kernels.provenance import about_device, source_hash

        about = about_device(device_to_tune())
        return {
            **{name: about[name] for name in ("device", "driver", "torch", "triton")},
            "source": source_hash(),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "shapes": [str(shape) for shape in shapes],
        }


def shapes_to_tune(model: str | None, names: Sequence[str]) -> list[LayerShape]:
    """Return the layers named, those of a model, or the benchmark's main ones."""
    from promoe_triton.kernels.shapes import MAIN

    shapes = [parse_shape(name) for name in names]
    if model is not None:
        shapes += shapes_of_model(model)
    return list(dict.fromkeys(shapes)) or list(MAIN)


def parse_shape(text: str) -> LayerShape:
    """Return a layer from "D/F/E/A", with silu between halves, or from the name of one of the benchmark's."""
    from promoe_triton.kernels.shapes import SHAPES, LayerShape

    if text in SHAPES:
        return SHAPES[text]
    numbers = text.split("/")
    if len(numbers) != 4 or not all(number.isdecimal() and int(number) for number in numbers):
        raise ValueError(f"--shape must be D/F/E/A in whole numbers, or one of {', '.join(SHAPES)}; got {text!r}")
    D, F, E, A = map(int, numbers)
    if A > E:
        raise ValueError(f"--shape {text}: {A} experts per token are more than there are ({E})")
    return LayerShape(name=text, D=D, F=F, E=E, A=A)


def shapes_of_model(name: str) -> list[LayerShape]:
    """Return the layers of a model, from its configuration. Raises PromoeError where tiles are not all there is."""
    from promoe_triton.backends.gates import fused_gate
    from promoe_triton.cli.needs import active_experts
    from promoe_triton.kernels.shapes import LayerShape
    from promoe_triton.loading import read_configuration, skeleton_of
    from promoe_triton.patch._swap import find_experts

    check_exists(name)
    model: Any = skeleton_of(name, {"config": read_configuration(name)})
    found = find_experts(model)
    active = active_experts(model, {path: layout.experts for path, layout in found.items()})
    if active is None:
        raise PromoeError(f"{name} does not say how many experts a token gets; give its layers with --shape D/F/E/A")
    shapes = []
    for A, (path, layout) in zip(active, found.items(), strict=True):
        module = model.get_submodule(path)
        tensors = {tensor.name: tensor.shape for tensor in layout.spec(module).tensors}
        if len(layout.up) != 1 or len(layout.down) != 1:
            raise PromoeError(f"{path} is no pair of two products; give its layers with --shape D/F/E/A")
        transposed = layout.down[0] in layout.transposed
        D, F = tensors[layout.down[0]][::-1] if transposed else tensors[layout.down[0]]
        up_rows = tensors[layout.up[0]][-1 if layout.up[0] in layout.transposed else 0]
        gate = fused_gate(module, layout, up_rows == 2 * F)
        if gate is None:
            raise PromoeError(f"the activation of {path} is not one of the kernels'; give its layers with --shape")
        shapes.append(
            LayerShape(
                name=type(model).__name__,
                D=D,
                F=F,
                E=layout.experts,
                A=A,
                gate=gate,
                transposed=transposed,
                biased=layout.up_bias is not None,
            )
        )
    return list(dict.fromkeys(shapes))


def read_tables(out: Path) -> dict[str, Any]:
    """Return the tables that entries are put into: those of the file, or the shipped ones where it is new."""
    from promoe_triton.kernels.tiles import TABLE

    place = out if out.exists() else TABLE
    try:
        tables: Any = json.loads(place.read_text())
    except (ValueError, OSError) as error:
        raise PromoeError(f"cannot put entries into {place}, it is no table of tiles: {error}") from error
    if not isinstance(tables, dict) or not isinstance(tables.get("targets"), dict):
        raise PromoeError(f'cannot put entries into {place}: expected a JSON object with "targets"')
    return tables


def check_writable(out: Path) -> None:
    """Raise PromoeError, before anything is measured, where the table could not be written in the end."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = not out.exists()
        with out.open("a"):
            pass
        if fresh:
            out.unlink()
    except OSError as error:
        raise PromoeError(f"cannot write {out}: {error.strerror or error}; name another file with --out") from error


def write_tables(out: Path, tables: dict[str, Any]) -> None:
    """Exchange the file for a new one in one step."""
    from promoe_triton.kernels.tuning import dumped

    fresh = out.with_name(f"{out.name}.new")
    fresh.write_text(dumped(tables))
    fresh.replace(out)


def row_of(place: Place, choice: Choice) -> list[str]:
    entry = choice.entry
    tile = [entry.columns, entry.gated_columns, entry.depth, entry.warps, entry.stages]
    gain = "?" if choice.gain is None else f"{choice.gain:.2f}x"
    return [f"{place}", *map(str, tile), f"{choice.compared} of {choice.entries}", gain, f"{choice.spread:.1%}"]
