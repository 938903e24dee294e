"""Copying ahead on a real disk: the paper's ablation, prompts, expert sizes, batches, and chance as a predictor.

The demo model inflated to 8 layers of 64 experts (9.4 MB each unless said otherwise), read past the page cache, on
held-out text that every variant decodes as it stands. All variants have the same reader, chunk size and depth. A
variant is a step of the ablation, or all techniques with another predictor.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
from decoding import Decoder, Run, decode, load, prefill, timed
from models import MODEL, large_checkpoint, prompts, sizes
from timing import ratios, take_turns

EXPERT_BYTES, LARGE, SMALL = 9_400_000, 17_300_000, 2_400_000
SHARES = (0.5, 0.75, 0.25, 0.375, 0.125)
NO_PREDICTION = "preemption + reorder, no prediction"
STEPS = ("lru", "static", "+prefetch", "+chunks", "+preemption", "all", NO_PREDICTION)
SLOW = "250MB/s"


def options(variant: str) -> dict[str, Any]:
    """Return the configuration of a variant."""
    if variant == NO_PREDICTION:
        return {"predictor": "none"}
    if variant == "random":
        return {"predictor": "random"}
    return {"ablation": variant}


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """How much text: `warm_up` tokens are decoded first, and `tokens` are timed, `repeats` times over."""

    warm_up: int
    tokens: int
    repeats: int


def texts(length: Length, batch: int = 1) -> list[list[list[int]]]:
    """Return other held-out texts for every repeat."""
    found = prompts(MODEL, length.repeats * batch, length.warm_up + length.tokens)
    return [found[i * batch : (i + 1) * batch] for i in range(length.repeats)]


def compare(
    folder: Path, variants: Sequence[str], length: Length, batch: int = 1, **common: Any
) -> dict[str, list[Run]]:
    """Let the variants take turns, a text per repeat."""
    runs: dict[str, list[Run]] = {variant: [] for variant in variants}
    for variant in variants:
        runs[variant] = []

    def run(variant: str) -> float:
        ids = texts(length, batch)[len(runs[variant])]
        runs[variant].append(decode(folder, common | options(variant), ids, length.warm_up))
        return runs[variant][-1].per_step

    take_turns({variant: lambda variant=variant: run(variant) for variant in variants}, length.repeats)  # type: ignore[misc]
    return runs


def rows_of(case: str, runs: Mapping[str, Sequence[Run]], unit: str = "ms/token") -> list[record.Row]:
    """Return what is worth knowing about every variant's runs."""
    rows = []
    for variant, found in runs.items():
        values: list[tuple[str, str, Callable[[Run], float], str]] = [
            ("time", unit, lambda run: run.per_step * 1e3, "lower"),
            ("stalled", unit, lambda run: run.counted("stall_seconds") / run.steps * 1e3, "lower"),
            ("hits", "share", lambda run: run.hit_ratio, "higher"),
            ("read", "MB/step", lambda run: run.counted("bytes_read") / run.steps / 1e6, "lower"),
            ("link busy", "share", lambda run: run.counted("link_seconds") / run.seconds, "higher"),
        ]
        rows += [
            record.row(case, variant, metric, of, [get(run) for run in found], better=better)
            for metric, of, get, better in values
        ]
        if any(run.ahead.experts for run in found):
            rows += [
                record.row(case, variant, "GOODPRED", "share", [run.ahead.goodpred for run in found]),
                record.row(case, variant, "fetch rate", "share", [run.ahead.fetch_rate for run in found]),
                record.row(
                    case,
                    variant,
                    "wasted",
                    "share of bytes",
                    [run.wasted_share for run in found],
                    target=0.25 if variant == "all" else None,
                    better="lower",
                ),
            ]
    return rows


def speedup(
    case: str, runs: Mapping[str, Sequence[Run]], ours: str, over: str, target: float | None = None
) -> record.Row:
    values = ratios([run.seconds for run in runs[over]], [run.seconds for run in runs[ours]])
    return record.row(case, f"{ours} / {over}", "speed", "x", values, target=target)


def ablation(folder: Path, results: record.Results, quick: bool) -> None:
    length = Length(warm_up=4, tokens=4, repeats=2) if quick else Length(warm_up=32, tokens=64, repeats=3)
    experts = sizes(folder).experts
    for share in SHARES[:1] if quick else SHARES:
        case = f"decode, {share:.1%} in slots"
        if results.has(case):
            continue
        results.begin()
        slots = round(experts * share)
        runs = compare(folder, STEPS, length, slots=slots)
        rows = rows_of(case, runs)
        for variant in STEPS[1:]:
            target = {0.5: 1.25, 0.75: 1.25}.get(share, 1.0) if variant == "all" else None
            rows.append(speedup(case, runs, variant, "lru", target))
        rows.append(speedup(case, runs, "all", NO_PREDICTION))
        rows += limits(folder, case, runs, slots, length)
        results.write(rows)


def limits(folder: Path, case: str, runs: Mapping[str, Sequence[Run]], slots: int, length: Length) -> list[record.Row]:
    """Say how much of the time that could be hidden was: (T_lru - T) / (T_lru - T_limit).

    T_limit is what computing takes with everything resident, or what moving the bytes takes that layers missed,
    whichever is longer; each is measured while the other runs.
    """
    resident, alone = resident_seconds(folder, length)
    bandwidth = [run.counted("bytes_read") / max(run.counted("link_seconds"), 1e-9) for run in runs["all"]]
    useful = [run.counted("bytes_read") - run.ahead.bytes_wasted for run in runs["all"]]
    moving = [nbytes / rate / run.steps for nbytes, rate, run in zip(useful, bandwidth, runs["all"], strict=True)]
    hidden = [
        (lru.per_step - run.per_step) / (lru.per_step - max(resident, moved))
        for lru, run, moved in zip(runs["lru"], runs["all"], moving, strict=True)
    ]
    target = 0.6 if slots >= 256 else None
    return [
        record.row(case, "resident", "time", "ms/token", [alone * 1e3], better="lower"),
        record.row(case, "resident, the disk streaming", "time", "ms/token", [resident * 1e3], better="lower"),
        record.row(case, "moving what was missed", "time", "ms/token", [m * 1e3 for m in moving], better="lower"),
        record.row(case, "all", "hidden", "share", hidden, target=target),
        record.row(case, "all", "bandwidth", "GB/s", [rate / 1e9 for rate in bandwidth]),
    ]


_resident: dict[Path, tuple[float, float]] = {}


def resident_seconds(folder: Path, length: Length) -> tuple[float, float]:
    """Return seconds per token with every expert in a slot: while the disk streams, and alone."""
    if folder not in _resident:
        model = load(folder, {"slots": 1.0})
        ids = prompts(MODEL, 1, 8 + 4 * max(length.tokens // 4, 2))[0]
        decoder, tokens = Decoder(model, [ids]), max(length.tokens // 4, 2)
        decoder.step(8)
        streaming, alone = [], []
        for _ in range(2):
            alone.append(timed(model, tokens, lambda: decoder.step(tokens)).per_step)
            with stream(folder):
                streaming.append(timed(model, tokens, lambda: decoder.step(tokens)).per_step)
        _resident[folder] = min(streaming), min(alone)
    return _resident[folder]


@contextlib.contextmanager
def stream(folder: Path) -> Iterator[None]:
    """Read the checkpoint past the page cache in the background, as fast as the disk gives it."""
    import mmap

    over = threading.Event()
    files = sorted(folder.glob("*.safetensors"))

    def read() -> None:
        buffer = mmap.mmap(-1, 4 << 20)
        handles = [os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files]
        while not over.is_set():
            for handle in handles:
                offset = 0
                while not over.is_set() and os.preadv(handle, [buffer], offset) == len(buffer):
                    offset += len(buffer)
        for handle in handles:
            os.close(handle)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def whole_layers(folder: Path, results: record.Results, quick: bool) -> None:
    """Offloading by whole layers moves every expert for every token: a few tokens tell enough."""
    case = "decode, whole layers, 50.0% in slots"
    if results.has(case):
        return
    results.begin()
    length = Length(warm_up=2, tokens=2 if quick else 6, repeats=2)
    runs = compare(folder, ("layer", "all"), length, slots=sizes(folder).experts // 2)
    results.write([*rows_of(case, runs), speedup(case, runs, "all", "layer")])


def prompts_after_another(folder: Path, results: record.Results, quick: bool) -> None:
    variants = ("lru", "+prefetch", "+preemption", "all", NO_PREDICTION)
    repeats = 2 if quick else 3
    slots = sizes(folder).experts // 2
    for tokens in (16,) if quick else (128, 512, 2048):
        case = f"prefill, {tokens} tokens, 50.0% in slots"
        if results.has(case):
            continue
        results.begin()
        found = prompts(MODEL, 2 * repeats, tokens)
        first: dict[str, list[Run]] = {variant: [] for variant in variants}
        runs: dict[str, list[Run]] = {variant: [] for variant in variants}

        def run(variant: str, found: list[list[int]] = found, first: Any = first, runs: Any = runs) -> float:
            earlier, prompt = found[2 * len(runs[variant])], found[2 * len(runs[variant]) + 1]
            cold, warm = prefill(folder, {"slots": slots} | options(variant), earlier, prompt)
            first[variant].append(cold)
            runs[variant].append(warm)
            return warm.seconds

        take_turns({variant: lambda variant=variant, run=run: run(variant) for variant in variants}, repeats)  # type: ignore[misc]
        rows = rows_of(case, runs, "ms")
        for variant in variants:
            cold = [run.seconds * 1e3 for run in first[variant]]
            rows.append(record.row(case, variant, "first prompt", "ms", cold, better="lower"))
        for variant in variants[1:]:
            rows.append(speedup(case, runs, variant, "lru", 2.0 if variant == "all" else None))
        results.write(rows)


def expert_sizes(results: record.Results, scratch: Path | None, quick: bool) -> None:
    length = Length(warm_up=4, tokens=4, repeats=2) if quick else Length(warm_up=16, tokens=24, repeats=4)
    for nbytes in (SMALL, LARGE):
        case = f"decode, experts of {nbytes / 1e6:g} MB, 50.0% in slots"
        if results.has(case):
            continue
        with large_checkpoint(MODEL, scratch, nbytes // 8 if quick else nbytes, case) as folder:
            results.begin()
            runs = compare(folder, ("lru", "all"), length, slots=sizes(folder).experts // 2)
            results.write([*rows_of(case, runs), speedup(case, runs, "all", "lru", 1.0)])


def batches(folder: Path, results: record.Results, quick: bool) -> None:
    length = Length(warm_up=2, tokens=4, repeats=2) if quick else Length(warm_up=8, tokens=24, repeats=3)
    for batch in (1, 2, 4, 8):
        case = f"decode, batch {batch}, 50.0% in slots"
        if not results.has(case):
            results.begin()
            runs = compare(folder, ("lru", "all"), length, batch, slots=sizes(folder).experts // 2)
            results.write([*rows_of(case, runs, "ms/step"), speedup(case, runs, "all", "lru", 1.0)])


def chance(folder: Path, results: record.Results, quick: bool) -> None:
    """Predictions that are no better than chance must cost nothing: paired runs on links of three speeds."""
    links: dict[str, dict[str, Any]] = {
        "the disk": {},
        f"the disk at {SLOW}": {"bandwidth": SLOW},
        "the page cache": {"io": "buffered"},
    }
    for name, link in links.items():
        case = f"decode, chance, 50.0% in slots, {name}"
        if results.has(case):
            continue
        results.begin()
        length = Length(warm_up=2, tokens=4, repeats=2) if quick else Length(warm_up=16, tokens=24, repeats=6)
        if link.get("bandwidth"):
            length = Length(warm_up=4, tokens=length.tokens // 2, repeats=length.repeats // 2 + 1)
        runs = compare(folder, ("random", NO_PREDICTION), length, slots=sizes(folder).experts // 2, **link)
        results.write([*rows_of(case, runs), speedup(case, runs, "random", NO_PREDICTION, 0.98)])


def main() -> None:
    parser = record.arguments(__doc__ or "")
    parser.add_argument("--scratch", type=Path, help="folder for 10 GB of checkpoints (default: a temporary one)")
    args = parser.parse_args()
    record.confine()
    results = record.results(args, "proactive")
    nbytes = 1_100_000 if args.quick else EXPERT_BYTES
    with large_checkpoint(MODEL, args.scratch, nbytes, "a checkpoint with large experts") as folder:
        for part in (ablation, prompts_after_another, chance, batches, whole_layers):
            part(folder, results, args.quick)
    expert_sizes(results, args.scratch, args.quick)


if __name__ == "__main__":
    main()
