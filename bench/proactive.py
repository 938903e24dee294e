"""Copying ahead on a real disk: the paper's ablation, prompts, expert sizes, batches, and chance as a predictor.

The demo model inflated to 8 layers of 64 experts (9.4 MB each unless said otherwise), read past the page cache, on
held-out text that every variant decodes as it stands. All variants have the same reader, chunk size and depth. A
variant is a step of the ablation, or all techniques with another predictor.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import pydoc
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import record
from decoding import Decoder, Run, decode, decode_in_turns, prefill, timed
from models import MODEL, large_checkpoint, prompts
from subjects import OnDisk, Subject
from timing import interval, ratios, take_turns
from transformers import AutoTokenizer

import promoe_triton
from promoe_triton.demo import PREDICTOR

EXPERT_BYTES, LARGE, SMALL = 9_400_000, 17_300_000, 2_400_000
SHARES = (0.5, 0.75, 0.25, 0.375, 0.125)
NO_PREDICTION = "preemption + reorder, no prediction"
STEPS = ("lru", "static", "+prefetch", "+chunks", "+preemption", "+reorder", "all", NO_PREDICTION)
"""The paper's steps: over an LRU cache, predicted in every pass. "all" is what a model has by default: the policy that
goes by predictions, and those in the passes that are faster for them."""
ALONE = ("lru", "+prefetch", "chunks", "preemption", "reorder")
EACH_ALONE = "decode, each alone, 50.0% in slots"
PREDICTED: dict[str, dict[str, Any]] = {
    "random": {"predictor": "random"},
    "gate": {"predictor": "gate"},
    "learned": {"predictor": PREDICTOR},
    "learned, always": {"predictor": PREDICTOR, "always_predict": True},
    "gate, always": {"predictor": "gate", "always_predict": True},
}
"""Everything on, with other predictors: by default in the passes that are faster for it, or in all."""
SLOW = "250MB/s"
DOCUMENTED, PROFILED = ("argparse", "pathlib", "shutil", "statistics", "tarfile", "textwrap"), 256
"""Modules, and how many tokens of what is said of each, that tell which experts are popular (`static`)."""
FIRST = ("lru", NO_PREDICTION, "gate, always", "learned, always", "all")
FIRST_LOOK = "decode, one run of each, 50.0% in slots"
WHOLE_LAYERS = "decode, whole layers, 50.0% in slots"


def options(variant: str) -> dict[str, Any]:
    """Return the configuration of a variant."""
    if variant == NO_PREDICTION:
        return {"predictor": "none"}
    if variant in PREDICTED:
        return PREDICTED[variant]
    return {"ablation": variant, "always_predict": variant != "all"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """How much text: `warm_up` tokens are decoded first, and `tokens` are timed, `repeats` times over."""

    warm_up: int
    tokens: int
    repeats: int


@functools.cache
def profile() -> Path:
    """Write how popular the demo model's experts are in text that nothing here decodes: what pydoc says of modules."""
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), promoe_triton.from_pretrained(str(MODEL), slots=1.0)
    found = [pydoc.plain(pydoc.render_doc(importlib.import_module(name))) for name in DOCUMENTED]
    ids = [tokenizer(text)["input_ids"][:PROFILED] for text in found]
    for text in ids:
        Decoder(model, [text]).step(len(text))
    folder = tempfile.mkdtemp(prefix="promoe-profile-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    promoe_triton.save_profile(model, path := Path(folder) / "profile.json")
    return path


def texts(length: Length, batch: int = 1) -> list[list[list[int]]]:
    """Return other held-out texts for every repeat."""
    found = prompts(MODEL, length.repeats * batch, length.warm_up + length.tokens)
    return [found[i * batch : (i + 1) * batch] for i in range(length.repeats)]


def compare(
    subject: Subject, variants: Sequence[str], length: Length, batch: int = 1, **common: Any
) -> dict[str, list[Run]]:
    """Let the variants take turns, a text per repeat."""
    runs: dict[str, list[Run]] = {variant: [] for variant in variants}
    for variant in variants:
        runs[variant] = []

    def run(variant: str) -> float:
        ids = texts(length, batch)[len(runs[variant])]
        runs[variant].append(decode(subject, common | options(variant), ids, length.warm_up))
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
    low, high = interval(values)
    note = f"95 % of the mean: {low:.3f} to {high:.3f}" if len(values) > 1 else ""
    return record.row(case, f"{ours} / {over}", "speed", "x", values, target=target, note=note)


def ablation(
    subject: Subject,
    results: record.Results,
    share: float,
    length: Length,
    targets: Mapping[float, float],
    steps: Sequence[str] = STEPS,
    **common: Any,
) -> None:
    """Measure these steps, beside lru. targets: the wanted speed of all over lru, by the share of experts in slots."""
    case = ablation_case(share)
    if results.has(case):
        return
    results.begin()
    slots = round(subject.experts * share)
    runs = compare(subject, tuple(dict.fromkeys(("lru", *steps))), length, slots=slots, profile=profile(), **common)
    rows = rows_of(case, {step: runs[step] for step in steps})
    for step in steps:
        if step != "lru":
            rows.append(speedup(case, runs, step, "lru", targets.get(share) if step == "all" else None))
    if {"all", NO_PREDICTION} <= {*steps}:
        rows += [speedup(case, runs, "all", NO_PREDICTION), *limits(subject, case, runs, share, length)]
    results.write(rows)


def ablation_case(share: float) -> str:
    return f"decode, {share:.1%} in slots"


def limits(
    subject: Subject, case: str, runs: Mapping[str, Sequence[Run]], share: float, length: Length
) -> list[record.Row]:
    """Say how much of the time that could be hidden was: (T_lru - T) / (T_lru - T_limit).

    T_limit is what computing takes with everything resident, or what moving the bytes takes that layers missed,
    whichever is longer; each is measured while the other runs.
    """
    streaming, alone = resident_seconds(subject, length)
    resident = min(streaming)
    bandwidth = [run.counted("bytes_read") / max(run.counted("link_seconds"), 1e-9) for run in runs["all"]]
    useful = [run.counted("bytes_read") - run.ahead.bytes_wasted for run in runs["all"]]
    moving = [nbytes / rate / run.steps for nbytes, rate, run in zip(useful, bandwidth, runs["all"], strict=True)]
    hidden = [
        (lru.per_step - run.per_step) / (lru.per_step - max(resident, moved))
        for lru, run, moved in zip(runs["lru"], runs["all"], moving, strict=True)
    ]
    target = 0.6 if share >= 0.5 else None
    return [
        record.row(case, "resident", "time", "ms/token", [one * 1e3 for one in alone], better="lower"),
        record.row(
            case,
            f"resident, {subject.link} streaming",
            "time",
            "ms/token",
            [one * 1e3 for one in streaming],
            better="lower",
        ),
        record.row(case, "moving what was missed", "time", "ms/token", [m * 1e3 for m in moving], better="lower"),
        record.row(case, "all", "hidden", "share", hidden, target=target),
        record.row(case, "all", "bandwidth", "GB/s", [rate / 1e9 for rate in bandwidth]),
    ]


_resident: WeakKeyDictionary[Subject, tuple[list[float], list[float]]] = WeakKeyDictionary()


def resident_seconds(subject: Subject, length: Length) -> tuple[list[float], list[float]]:
    """Return seconds per token with every expert in a slot, measured some times: while the link streams, and alone."""
    if subject not in _resident:
        tokens = max(length.tokens // 4, 2)
        streaming, alone = [], []
        with subject.opened({"slots": 1.0}) as model:
            decoder = Decoder(model, prompts(MODEL, 1, 8 + 6 * tokens))
            decoder.step(8)
            for _ in range(3):
                alone.append(timed(model, tokens, lambda: decoder.step(tokens)).per_step)
                with subject.streaming():
                    streaming.append(timed(model, tokens, lambda: decoder.step(tokens)).per_step)
        _resident[subject] = streaming, alone
    return _resident[subject]


def each_alone(subject: Subject, results: record.Results, length: Length, **common: Any) -> None:
    """Every technique without the others, as in the paper's breakdown."""
    if not results.has(EACH_ALONE):
        results.begin()
        runs = compare(subject, ALONE, length, slots=subject.experts // 2, **common)
        ratio = [speedup(EACH_ALONE, runs, variant, "lru") for variant in ALONE[1:]]
        results.write([*rows_of(EACH_ALONE, runs), *ratio])


def whole_layers(subject: Subject, results: record.Results, length: Length, **common: Any) -> None:
    """Offloading by whole layers moves every expert for every token: a few tokens tell enough."""
    if not results.has(WHOLE_LAYERS):
        results.begin()
        runs = compare(subject, ("layer", "all"), length, slots=subject.experts // 2, **common)
        results.write([*rows_of(WHOLE_LAYERS, runs), speedup(WHOLE_LAYERS, runs, "all", "layer")])


def prompt_after_another(
    subject: Subject, results: record.Results, tokens: int, repeats: int, share: float = 0.5, **common: Any
) -> None:
    case = prompt_case(tokens, share)
    if results.has(case):
        return
    # Nothing is predicted in a prompt: prefetching alone is lru.
    variants = ("lru", "static", "layer", "preemption", "all")
    common |= {"slots": round(subject.experts * share), "profile": profile()}
    results.begin()
    found = prompts(MODEL, 2 * repeats, tokens)
    first: dict[str, list[Run]] = {variant: [] for variant in variants}
    runs: dict[str, list[Run]] = {variant: [] for variant in variants}

    def run(variant: str) -> float:
        earlier, prompt = found[2 * len(runs[variant])], found[2 * len(runs[variant]) + 1]
        cold, warm = prefill(subject, common | options(variant), earlier, prompt)
        first[variant].append(cold)
        runs[variant].append(warm)
        return warm.seconds

    take_turns({variant: lambda variant=variant: run(variant) for variant in variants}, repeats)  # type: ignore[misc]
    rows = rows_of(case, runs, "ms")
    for variant in variants:
        cold = [run.seconds * 1e3 for run in first[variant]]
        rows.append(record.row(case, variant, "first prompt", "ms", cold, better="lower"))
    for variant in variants[1:]:
        rows.append(speedup(case, runs, variant, "lru", 2.0 if variant == "all" else None))
    results.write(rows)


def prompt_case(tokens: int, share: float = 0.5) -> str:
    return f"prefill, {tokens} tokens, {share:.1%} in slots"


def two_of_them(
    subject: Subject, results: record.Results, case: str, length: Length, batch: int | None = None, **common: Any
) -> None:
    """Measure lru and all with half of the experts in slots. batch: texts side by side; None: one, and the limits."""
    if not results.has(case):
        results.begin()
        runs = compare(subject, ("lru", "all"), length, batch or 1, slots=subject.experts // 2, **common)
        unit = "ms/token" if batch is None else "ms/step"
        rows = [*rows_of(case, runs, unit), speedup(case, runs, "all", "lru", 1.0)]
        results.write(rows + (limits(subject, case, runs, 0.5, length) if batch is None else []))


def batch_case(batch: int) -> str:
    return f"decode, batch {batch}, 50.0% in slots"


def chance(
    subject: Subject, results: record.Results, link: str, length: Length, turn: int | None = None, **common: Any
) -> None:
    """Predictions that are no better than chance must cost nothing: paired runs on a link.

    turn: both at once, by turns of so many tokens, of a subject that can be opened twice; None: one after the other.
    """
    case, variants = chance_case(link), ("random", NO_PREDICTION)
    if results.has(case):
        return
    results.begin()
    common |= {"slots": subject.experts // 2}
    if turn is None:
        runs = compare(subject, variants, length, **common)
    else:
        runs = {variant: [] for variant in variants}
        for repeat, ids in enumerate(texts(length)):
            # Which one is opened first may matter: its slots get the better memory.
            order = variants[:: -1 if repeat % 2 else 1]
            both = {variant: common | options(variant) for variant in order}
            for variant, run in decode_in_turns(subject, both, ids, length.warm_up, turn).items():
                runs[variant].append(run)
    speed = speedup(case, runs, "random", NO_PREDICTION)
    paired = ratios([run.seconds for run in runs[NO_PREDICTION]], [run.seconds for run in runs["random"]])
    least = record.row(case, speed.variant, "mean speed, lower end of 95 %", "x", [interval(paired)[0]], target=0.98)
    results.write([*rows_of(case, runs), speed, least])


def chance_case(link: str) -> str:
    return f"decode, chance, 50.0% in slots, {link}"


def first_look(subject: Subject, results: record.Results, length: Length, **common: Any) -> None:
    """Run every kind once, on one text: what a minute tells of a machine that is not known yet."""
    if not results.has(FIRST_LOOK):
        results.begin()
        ids = texts(length)[0]
        common |= {"slots": subject.experts // 2}
        runs = {variant: [decode(subject, common | options(variant), ids, length.warm_up)] for variant in FIRST}
        alone = decode(subject, {"slots": 1.0}, ids, length.warm_up).per_step
        resident = record.row(FIRST_LOOK, "resident", "time", "ms/token", [alone * 1e3], better="lower")
        results.write([resident, *rows_of(FIRST_LOOK, runs)])


def predictors(subject: Subject, results: record.Results, share: float, length: Length) -> None:
    """Compare learned and training-free predictions with none, and what replaces experts."""
    case = f"decode, predictors, {share:.1%} in slots"
    if not results.has(case):
        results.begin()
        variants = ("learned", "learned, always", "gate", "gate, always", NO_PREDICTION)
        runs = compare(subject, variants, length, slots=round(subject.experts * share))
        ratio = [speedup(case, runs, variant, NO_PREDICTION) for variant in variants[:-1]]
        results.write([*rows_of(case, runs), *ratio, speedup(case, runs, "learned", "gate")])


def expert_sizes(results: record.Results, scratch: Path | None, quick: bool) -> None:
    length = Length(warm_up=4, tokens=4, repeats=2) if quick else Length(warm_up=16, tokens=24, repeats=4)
    for nbytes in (SMALL, LARGE):
        case = f"decode, experts of {nbytes / 1e6:g} MB, 50.0% in slots"
        if results.has(case):
            continue
        with large_checkpoint(MODEL, scratch, nbytes // 8 if quick else nbytes, case) as folder:
            two_of_them(OnDisk(folder), results, case, length)


def everything(subject: Subject, results: record.Results, quick: bool, steps: Sequence[str] = STEPS) -> None:
    """Measure what there is to measure with experts of one size, the most important first. steps: of the ablations."""
    targets = dict.fromkeys(SHARES, 1.0) | {0.5: 1.25, 0.75: 1.25}

    def length(warm_up: int, tokens: int, repeats: int) -> Length:
        return (
            Length(warm_up=4, tokens=4, repeats=2) if quick else Length(warm_up=warm_up, tokens=tokens, repeats=repeats)
        )

    for share in SHARES[:1] if quick else SHARES:
        ablation(subject, results, share, length(32, 128, 3), targets, steps)
    for tokens in (16,) if quick else (128, 512, 2048):
        prompt_after_another(subject, results, tokens, 2 if quick else 3)
    for share in (0.5,) if quick else (0.25, 0.5, 0.75):
        predictors(subject, results, share, length(32, 96, 3))
    each_alone(subject, results, length(32, 128, 3))
    turn = 2 if quick else 8
    chance(subject, results, "the disk", length(16, 96, 16), turn)
    chance(subject, results, f"the disk at {SLOW}", length(8, 32, 8), turn, bandwidth=SLOW)
    chance(subject, results, "the page cache", length(16, 96, 16), turn, io="buffered")
    for batch in (1, 2, 4, 8):
        two_of_them(subject, results, batch_case(batch), length(8, 24, 3), batch)
    whole_layers(subject, results, length(2, 6, 2))


def main() -> None:
    parser = record.arguments(__doc__ or "")
    parser.add_argument("--scratch", type=Path, help="folder for 10 GB of checkpoints (default: a temporary one)")
    parser.add_argument("--step", action="append", choices=STEPS, help="of the ablations only this one, beside lru")
    args = parser.parse_args()
    record.confine()
    results = record.results(args, "proactive")
    nbytes = 1_100_000 if args.quick else EXPERT_BYTES
    with large_checkpoint(MODEL, args.scratch, nbytes, "a checkpoint with large experts") as folder:
        everything(OnDisk(folder), results, args.quick, args.step or STEPS)
    expert_sizes(results, args.scratch, args.quick)


if __name__ == "__main__":
    main()
