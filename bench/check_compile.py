"""Compile every kernel at every tile that the benchmarks' shapes use, for GPUs that are not here, and judge the result.

One row for each distinct kernel: registers, spills, shared memory, programs that fit a multiprocessor, instructions as
they stand in the code, and the shapes that use it. Then what each shape takes at best, from bytes and FLOPs. Ends
with an error where a rule of `promoe_triton.kernels.rules` is broken.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Kernels are compiled here, so they must not be interpreted, whatever the caller's environment says.
os.environ.pop("TRITON_INTERPRET", None)

import torch

from promoe_triton.kernels.compiled import Compiled, Request, compile_request, request
from promoe_triton.kernels.devices import devices, work
from promoe_triton.kernels.launches import Launch, launches
from promoe_triton.kernels.rules import RULES, TENSOR, Facts, Verdict, judge, occupancy
from promoe_triton.kernels.shapes import FURTHER, MAIN, SHAPES, TOKENS, LayerShape
from promoe_triton.kernels.tiles import TABLE, TileTable, table_for

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "compiled"
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
WORKERS = 2

SHOWN = "sm_90"
"""The target whose least times the README shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What is compiled: a shape, in one type.

    waves: for some of its experts, as when slots are few. ranked, scaled: see `launches`.
    """

    shape: LayerShape
    dtype: torch.dtype = torch.bfloat16
    waves: bool = False
    ranked: bool = False
    scaled: bool = False

    @property
    def name(self) -> str:
        dtype = {torch.bfloat16: "", torch.float16: " fp16", torch.float32: " fp32"}[self.dtype]
        marks = {" in waves": self.waves, " ranked": self.ranked, " scaled": self.scaled}
        return self.shape.name + dtype + "".join(mark for mark, holds in marks.items() if holds)

    def launches(self, T: int, table: TileTable) -> list[Launch]:
        marks = {"waves": self.waves, "ranked": self.ranked, "scaled": self.scaled}
        return launches(self.shape, T, self.dtype, table, **marks)

    @property
    def is_plain(self) -> bool:
        """Whether it is a layer as published: what it takes at best is worth telling."""
        return not (self.waves or self.ranked or self.scaled)


QWEN3, GPT_OSS = SHAPES["Qwen3-30B"], SHAPES["gpt-oss-20b"]
LAYERS = (
    *(Layer(shape=shape) for shape in (*MAIN, *FURTHER)),
    Layer(shape=QWEN3, dtype=torch.float16),
    Layer(shape=QWEN3, dtype=torch.float32),
    Layer(shape=GPT_OSS, dtype=torch.float16),
    Layer(shape=GPT_OSS, dtype=torch.float32),
    *(Layer(shape=shape, waves=True) for shape in (*MAIN, *FURTHER)),
    *(Layer(shape=shape, ranked=True) for shape in MAIN),
    *(Layer(shape=shape, scaled=True) for shape in (QWEN3, GPT_OSS)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """Where a kernel is launched: by a stage of this layer, with so many tokens."""

    layer: Layer
    T: int
    launch: Launch


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One kernel on one target, with all its uses. compiled: None where the compiler failed, as error says."""

    request: Request
    uses: list[Use]
    compiled: Compiled | None
    error: str
    verdict: Verdict
    blocks: int

    @property
    def title(self) -> str:
        launch = self.uses[0].launch
        form = self.request.kernel.rpartition(":")[2].removesuffix("_kernel")
        dtype = dict(self.request.signature).get("x_ptr", "").removeprefix("*")
        if launch.tile is None:
            names = ("E", "A", "D", "BLOCK", "SIZE", "BLOCK_C")
            sizes = [f"{name}={self._constant(name)}" for name in names if name in self.request.names]
            return " ".join(filter(None, (form, dtype, *sizes)))
        kind = {(1, 0): "halves", (1, 1): "turns"}.get(
            (self._constant("IS_GATED"), self._constant("IS_INTERLEAVED")), ""
        )
        size = f"{self._constant('N')}x{self._constant('K')}"
        return " ".join(filter(None, (form, launch.stage, dtype, kind, size)))

    @property
    def tile(self) -> str:
        tile = self.uses[0].launch.tile
        return f"{tile.rows}x{tile.columns}x{tile.depth} w{tile.warps} s{tile.stages}" if tile else ""

    @property
    def users(self) -> str:
        tokens: dict[str, list[int]] = {}
        for use in self.uses:
            tokens.setdefault(use.layer.name, []).append(use.T)
        return "; ".join(f"{name} T={','.join(map(str, sorted(set(Ts))))}" for name, Ts in tokens.items())

    def _constant(self, name: str) -> int:
        return int(self.request.names[name])


def wanted(targets: Sequence[str], tiles: Path) -> dict[Request, list[Use]]:
    """Return every kernel that the shapes launch on these targets with these tiles, each once."""
    found: dict[Request, list[Use]] = {}
    for target in targets:
        table = table_for(target, tiles)
        for layer in LAYERS:
            for T in TOKENS:
                for launch in layer.launches(T, table):
                    use = Use(layer=layer, T=T, launch=launch)
                    found.setdefault(request(launch, target), []).append(use)
    return found


def sample(requests: Sequence[Request], share: float, seed: int) -> list[Request]:
    """Return a share of every target's kernels, the same for the same seed."""
    drawn: list[Request] = []
    for target in dict.fromkeys(one.target for one in requests):
        own = [one for one in requests if one.target == target]
        picked = random.Random(f"{seed} {target}").sample(range(len(own)), math.ceil(share * len(own)))
        drawn += [own[i] for i in sorted(picked)]
    return drawn


def compile_one(one: Request) -> dict[str, Any]:
    """Compile in a worker; what the compiler raises comes back as text."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    try:
        return asdict(compile_request(one))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".strip()}


def compile_all(requests: Iterable[Request]) -> Iterator[tuple[Request, dict[str, Any]]]:
    """Compile in two processes. Whoever is there when one of them dies is tried again, alone."""
    context = multiprocessing.get_context("spawn")
    again = []
    with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        running = {pool.submit(compile_one, one): one for one in requests}
        for future in as_completed(running):
            try:
                yield running[future], future.result()
            except BrokenProcessPool:
                again.append(running[future])
    for one in again:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                yield one, pool.submit(compile_one, one).result()
            except BrokenProcessPool:
                yield one, {"error": "the compiler ended its process"}


def results(requests: Sequence[Request], cache: Path) -> dict[Request, dict[str, Any]]:
    """Return what came of each kernel, from the cache where it is there."""
    cache.mkdir(parents=True, exist_ok=True)
    files = {one: cache / f"{one.key}.json" for one in requests}
    done = {one: json.loads(file.read_text()) for one, file in files.items() if file.exists()}
    missing = [one for one in requests if one not in done]
    began = time.monotonic()
    for number, (one, result) in enumerate(compile_all(missing) if missing else (), 1):
        done[one] = result
        partial = files[one].with_suffix(".part")
        partial.write_text(json.dumps(result))
        partial.replace(files[one])
        if number % 10 == 0 or number == len(missing):
            taken = f"{time.monotonic() - began:.0f} s"
            print(f"compiled {number} of {len(missing)} ({len(requests)} in all), {taken}", file=sys.stderr, flush=True)
    return done


def row(one: Request, uses: list[Use], result: dict[str, Any]) -> Row:
    if "error" in result:
        verdict = Verdict(broken={"compiles": result["error"].splitlines()[0][:300]}, excused={})
        return Row(request=one, uses=uses, compiled=None, error=result["error"], verdict=verdict, blocks=0)
    compiled = Compiled(**result)
    facts = Facts(request=one, compiled=compiled, device=devices()[one.target])
    return Row(request=one, uses=uses, compiled=compiled, error="", verdict=judge(facts), blocks=occupancy(facts))


def counts(compiled: Compiled) -> str:
    shown = {name: count for name, count in compiled.counts.items() if count and name != "cp.async"}
    return ", ".join(f"{name} x{count}" for name, count in shown.items())


def print_kernels(rows: Sequence[Row]) -> None:
    heads = ("target", "kernel", "tile", "regs", "spill", "shared", "per SM", "verdict")
    table = []
    for one in rows:
        c = one.compiled
        numbers = (c.registers, c.spills + c.stack, f"{c.shared / 1024:.1f}K", one.blocks) if c else ("", "", "", "")
        verdict = "BROKEN: " + ", ".join(one.verdict.broken) if one.verdict.broken else "ok"
        if one.verdict.excused and not one.verdict.broken:
            verdict = "ok but " + ", ".join(one.verdict.excused)
        table.append((one.request.target, one.title, one.tile, *map(str, numbers), verdict))
    widths = [max(len(line[i]) for line in [heads, *table]) for i in range(len(heads))]
    print("  ".join(head.ljust(width) for head, width in zip(heads, widths, strict=True)))
    for one, line in zip(rows, table, strict=True):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
        if one.compiled:
            print(f"        {counts(one.compiled)}")
        print(f"        {one.users}")
        for rule, reason in one.verdict.excused.items():
            print(f"        {rule}: not asked for, {reason}")


def print_predictions(rows: Sequence[Row], targets: Sequence[str]) -> None:
    """What each stage takes at the device's peaks, and how often its programs fill the device."""
    of = {(use.layer, use.T, use.launch.stage, one.request.target): (one, use) for one in rows for use in one.uses}
    for target in targets:
        device = devices()[target]
        print(f"\nAt best on {target}, {device.device} ({device.source}): microseconds, and how often programs fill it")
        for layer in LAYERS:
            if not layer.is_plain:
                continue
            for T in TOKENS:
                stages = work(layer.shape, T, layer.dtype)
                seconds = {stage: one.seconds(device, layer.dtype) for stage, one in stages.items()}
                parts = []
                for stage, least in seconds.items():
                    found = of.get((layer, T, stage, target))
                    fill = ""
                    if found and found[0].blocks:
                        one, use = found
                        fill = f" ({use.launch.grid / (one.blocks * device.processors):.1f}x)"
                    parts.append(f"{stage} {least * 1e6:.1f}{fill}")
                print(f"  {layer.name:18} T={T:<5} {sum(seconds.values()) * 1e6:9.1f}  =  {', '.join(parts)}")


def print_markdown(rows: Sequence[Row], targets: Sequence[str]) -> None:
    """What the README shows: how many kernels, the products by target, the least times of some shapes on one GPU."""
    print(f"{len(rows)} kernels\n")
    print("| target | kernel | versions | registers | spills | shared memory, most | products by | weights by |")
    print("|---|---|---|---|---|---|---|---|")
    for target in targets:
        for form in ("rows", "grouped"):
            found = [one for one in rows if one.request.target == target and one.title.startswith(form)]
            of = [one.compiled for one in found if one.compiled]
            registers = sorted(c.registers for c in of)
            spills = sum(c.spills + c.stack for c in of)
            shared = max(c.shared for c in of) / 1024
            by = " or ".join(used) if (used := [name for name in TENSOR if any(c.counts.get(name) for c in of)]) else ""
            name = "single rows" if form == "rows" else "grouped rows"
            print(
                f"| {target} | {name} | {len(of)} | {registers[0]} to {registers[-1]} | {spills} | {shared:.0f} KiB "
                f"| {by or 'FMA'} | {carried(of)} |"
            )
    tokens = (1, 16, 512, 8192)
    for target in [target for target in targets if target == SHOWN]:
        device = devices()[target]
        print(f"\n| microseconds at best, {device.device} | {' | '.join(f'T = {T}' for T in tokens)} |")
        print(f"|---|{'---|' * len(tokens)}")
        for layer in LAYERS[: len(MAIN)]:
            times = []
            for T in tokens:
                stages = work(layer.shape, T, layer.dtype).values()
                times.append(f"{sum(stage.seconds(device, layer.dtype) for stage in stages) * 1e6:.0f}")
            print(f"| {layer.name} | {' | '.join(times)} |")


def carried(found: Sequence[Compiled]) -> str:
    """How weights come to the products: the widest copies or loads that all of these kernels have."""
    names = {"tma": "TMA", "cp.async 16": "16-byte cp.async", "load 16": "128-bit loads"}
    return " or ".join(text for name, text in names.items() if all(c.counts.get(name) for c in found)) or "other loads"


def as_json(rows: Sequence[Row], targets: Sequence[str]) -> str:
    kernels = [
        {
            "target": one.request.target,
            "kernel": one.title,
            "tile": one.tile,
            "used_by": one.users,
            "compiled": asdict(one.compiled) if one.compiled else None,
            "error": one.error,
            "per_processor": one.blocks,
            "broken": one.verdict.broken,
            "excused": one.verdict.excused,
        }
        for one in rows
    ]
    predictions = [
        {"target": target, "layer": layer.name, "T": T, "stage": stage}
        | {"bytes": one.bytes, "flops": one.flops, "seconds": one.seconds(devices()[target], layer.dtype)}
        for target in targets
        for layer in LAYERS
        if layer.is_plain
        for T in TOKENS
        for stage, one in work(layer.shape, T, layer.dtype).items()
    ]
    return json.dumps({"kernels": kernels, "predictions": predictions}, indent=1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS, help="compile for these")
    parser.add_argument("--table", type=Path, default=TABLE, help="tiles to judge (default: the shipped ones)")
    parser.add_argument("--sample", type=float, default=1.0, help="compile only this share of the kernels (0.1)")
    parser.add_argument("--seed", type=int, default=0, help="which ones --sample takes")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--markdown", action="store_true", help="print the README's tables")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where results are kept (default: %(default)s)")
    parser.add_argument("--broken", action="store_true", help="show only kernels that break a rule")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if not 0 < args.sample <= 1:
        sys.exit("--sample: expected a share above 0 and up to 1")
    began = time.monotonic()
    scratch = "" if "TRITON_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="promoe-compile-")
    if scratch:
        # What Triton keeps of a kernel is large and not needed twice; ours is a few numbers.
        os.environ["TRITON_CACHE_DIR"] = scratch
    try:
        found = wanted(args.target, args.table)
        requests = list(found) if args.sample == 1 else sample(list(found), args.sample, args.seed)
        done = results(requests, args.cache)
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)
    rows = [row(one, found[one], done[one]) for one in requests]
    broken = [one for one in rows if one.verdict.broken]
    if args.json:
        print(as_json(rows, args.target))
    elif args.markdown:
        print_markdown(rows, args.target)
    else:
        print_kernels(broken if args.broken else rows)
        if not args.broken:
            print_predictions(rows, args.target)
    for one in broken:
        for rule, wrong in one.verdict.broken.items():
            print(f"BROKEN {one.request.target}: {one.title} {one.tile}: {rule}: {wrong}", file=sys.stderr)
    excused = sum(bool(one.verdict.excused) for one in rows)
    summary = f"{len(rows)} of {len(found)} kernels compiled for {', '.join(args.target)}: {len(broken)} break a rule"
    print(
        f"{summary}, {excused} are excused from one; {len(RULES)} rules, {time.monotonic() - began:.0f} s",
        file=sys.stderr,
    )
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
