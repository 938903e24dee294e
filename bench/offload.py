"""Decoding from slots against accelerate's disk offload of the same checkpoint, in processes of their own.

Two cases. Under a memory limit (a control group of slots + dense part + 1 GB, page cache included, with half of
the experts in slots) both must read from disk. Without a limit and with the whole checkpoint in the page cache
accelerate maps memory instead of reading, and is expected to win. The text is held-out text of the demo model,
whose experts are made 9.4 MB large; every process generates the same number of tokens from the same prompts.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import memory_group
import record
from models import MODEL, Sizes, large_checkpoint, prompts, sizes
from timing import ratios, take_turns
from worker import AUTO, ON_DISK, OURS, STOCK, Answer, Failed, Request, ask

EXPERT_BYTES = 9_400_000
HEADROOM = 10**9
LIMITED, CACHED = "memory limit", "all in the page cache"
TARGET = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One checkpoint and what is asked of it; `slots` hold half of its experts."""

    folder: Path
    scratch: Path | None
    size: Sizes
    prompts: Sequence[Sequence[int]]
    new_tokens: int
    answers: dict[str, list[Answer]] = field(default_factory=dict)

    @property
    def slots(self) -> int:
        return self.size.experts // 2

    @property
    def weights_in_ram(self) -> int:
        return self.slots * self.size.slot_bytes + self.size.dense_bytes

    def run(self, variant: str, limit: int | None) -> Answer:
        """Run one variant in a process of its own; without a limit, with the checkpoint in the page cache."""
        with tempfile.TemporaryDirectory(prefix="promoe-offload-", dir=self.scratch) as offload, group(limit) as place:
            if limit is None:
                memory_group.read_through(self.folder)
            else:
                memory_group.forget_cached(self.folder)
            request = Request(
                variant=variant,
                folder=str(self.folder),
                prompts=self.prompts,
                new_tokens=self.new_tokens,
                slots=self.slots,
                slot_bytes=self.weights_in_ram,
                group=None if place is None else str(place),
                offload_folder=offload,
            )
            answer = ask(request)
        self.answers.setdefault(variant, []).append(answer)
        return answer


@contextlib.contextmanager
def group(limit: int | None) -> Iterator[Path | None]:
    if limit is None:
        yield None
    else:
        with memory_group.limited(limit) as place:
            yield place


def speed(answer: Answer) -> float:
    """Tokens per second while decoding, the prompts left out."""
    return len(answer.step_seconds) / sum(answer.step_seconds)


def compare(setting: Setting, case: str, variants: Sequence[str], limit: int | None, repeats: int) -> list[record.Row]:
    """Let the variants take turns; one that fails is left out, with its reason printed."""
    runs: dict[str, Callable[[], float]] = {}
    for variant in variants:
        try:
            print(f"  {case}: {variant}, first run", flush=True)
            setting.run(variant, limit)
        except Failed as failure:
            print(f"  {case}: left out: {failure}", flush=True)
        else:
            runs[variant] = lambda variant=variant: speed(setting.run(variant, limit))
    for answers in setting.answers.values():
        answers.clear()
    taken = take_turns(runs, repeats)
    rows = []
    for variant, speeds in taken.items():
        rows.append(record.row(case, variant, "decode", "tokens/s", speeds))
        rows += details(case, variant, setting.answers[variant])
    theirs = [variant for variant in taken if variant in (ON_DISK, AUTO)]
    if OURS not in taken or not theirs:
        return rows
    best = max(theirs, key=lambda variant: statistics.median(taken[variant]))
    target = TARGET if limit is not None else None
    note = f"{OURS} over {best}"
    rows.append(
        record.row(case, "ours / accelerate", "decode", "x", ratios(taken[OURS], taken[best]), target=target, note=note)
    )
    ours, other = (setting.answers[variant][0].tokens for variant in (OURS, best))
    same = [a == b for mine, its in zip(ours, other, strict=True) for a, b in zip(mine, its, strict=True)]
    rows.append(
        record.row(
            case,
            "ours = accelerate",
            "equal tokens",
            "share",
            [statistics.mean(same)],
            target=1.0,
            note=f"{len(same)} tokens",
        )
    )
    return rows


def details(case: str, variant: str, answers: Sequence[Answer]) -> list[record.Row]:
    """What else is worth knowing about the runs of one variant."""

    def row(metric: str, unit: str, values: list[float], better: str = "lower") -> record.Row:
        return record.row(case, variant, metric, unit, values, better=better)

    steps = [len(answer.step_seconds) + sum(len(p) > 0 for p in answer.tokens) for answer in answers]
    rows = [
        row("prefill", "s", [statistics.median(a.prefill_seconds) for a in answers]),
        row("load", "s", [a.load_seconds for a in answers]),
        row("read from disk", "MB/token", [a.disk_bytes / n / 1e6 for a, n in zip(answers, steps, strict=True)]),
        row("peak anonymous memory", "MB", [max(a.anon_loading, a.anon_generating) / 1e6 for a in answers]),
    ]
    if variant == OURS:
        rows.append(row("hits", "share", [a.stats["hit_ratio"] for a in answers], better="higher"))
        rows.append(row("stalled", "s", [a.stats["stall_seconds"] for a in answers]))
    return rows


def main() -> None:
    parser = record.arguments(__doc__ or "")
    parser.add_argument("--scratch", type=Path, help="folder for 10 GB of checkpoints (default: a temporary one)")
    parser.add_argument("--source", type=Path, default=MODEL, help="checkpoint to inflate (default: the demo model)")
    args = parser.parse_args()
    results = record.results(args, "offload")
    missing = [case for case in (LIMITED, CACHED) if not results.has(case)]
    if not missing:
        return
    expert_bytes, count, new_tokens, repeats = (1_100_000, 2, 8, 1) if args.quick else (EXPERT_BYTES, 4, 32, 2)
    with large_checkpoint(args.source, args.scratch, expert_bytes, "a checkpoint with large experts") as folder:
        setting = Setting(
            folder=folder,
            scratch=args.scratch,
            size=sizes(folder),
            prompts=prompts(args.source, count, 48),
            new_tokens=new_tokens,
        )
        if LIMITED in missing:
            run_limited(setting, results, repeats)
        if CACHED in missing:
            setting.answers.clear()
            results.begin()
            results.write(compare(setting, CACHED, (OURS, ON_DISK, AUTO, STOCK), None, repeats))


def run_limited(setting: Setting, results: record.Results, repeats: int) -> None:
    limit = setting.weights_in_ram + HEADROOM
    try:
        with memory_group.limited(limit):
            pass
    except memory_group.Unavailable as reason:
        print(f"skipped: {LIMITED}: {reason}. Without a limit a fair comparison needs a checkpoint larger than the RAM")
        return
    results.begin()
    results.write(compare(setting, LIMITED, (OURS, ON_DISK), limit, repeats))


if __name__ == "__main__":
    main()
