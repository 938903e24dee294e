"""Models larger than the RAM, and what loading one takes.

The demo model is made larger than the machine's RAM by padding its experts, which changes nothing it computes.
It must then generate the same tokens as the small model it came from, from slots that are a fraction of it, in
anonymous memory of slots + dense part + 1 GB. A second case measures the peak of anonymous memory while a
checkpoint of 4.8 GB is loaded, above that of a process that has only imported the libraries.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from pathlib import Path

import memory_group
import record
from models import MODEL, Sizes, is_trained, large_checkpoint, prompts, sizes
from worker import OURS, STOCK, Answer, Request, ask

SHARE_OF_RAM = 1.25
SLOT_SHARE = 0.125
"""Share of the experts that has a slot in the model larger than RAM."""
LOADED_EXPERT_BYTES = 9_400_000
EXPERTS = 512
ROOM = 10**9
SPARE = 100e6
BEYOND, LOADING = f"{SHARE_OF_RAM:g} x RAM", "loading 4.8 GB"


def same_tokens(one: Answer, other: Answer) -> list[float]:
    return [
        float(a == b)
        for mine, its in zip(one.tokens, other.tokens, strict=True)
        for a, b in zip(mine, its, strict=True)
    ]


def rows_of_memory(case: str, size: Sizes, slots: int, answer: Answer) -> list[record.Row]:
    """Anonymous memory against what was asked for; all in MB, above a process that has only imported."""
    asked = slots * size.slot_bytes + size.dense_bytes
    loading, generating = answer.anon_loading - answer.anon_imported, answer.anon_generating - answer.anon_imported
    room, spare = (asked + ROOM) / 1e6, (asked + SPARE) / 1e6
    note = f"{slots} of {size.experts} experts in slots; imports alone: {answer.anon_imported / 1e6:.0f} MB"

    def row(metric: str, nbytes: float, target: float | None = None) -> record.Row:
        return record.row(case, OURS, metric, "MB", [nbytes / 1e6], target=target, better="lower", note=note)

    return [
        row("checkpoint", size.total_bytes),
        row("slots + dense part", asked),
        row("peak of loading over imports", loading, target=spare),
        row("peak over imports", max(loading, generating), target=room),
        row("peak of the process", max(answer.anon_loading, answer.anon_generating), target=room),
    ]


def rows_of_speed(case: str, answer: Answer) -> list[record.Row]:
    speed = [1 / step for step in answer.step_seconds]
    per_token = answer.disk_bytes / (len(answer.step_seconds) + len(answer.prefill_seconds)) / 1e6
    return [
        record.row(case, OURS, "decode", "tokens/s", speed),
        record.row(case, OURS, "prefill", "s", answer.prefill_seconds, better="lower"),
        record.row(case, OURS, "load", "s", [answer.load_seconds], better="lower"),
        record.row(case, OURS, "read from disk", "MB/token", [per_token], better="lower"),
        record.row(case, OURS, "hits", "share", [answer.stats["hit_ratio"]]),
    ]


def measure(case: str, source: Path, folder: Path, share: float, count: int, new_tokens: int) -> list[record.Row]:
    """Load and run the large checkpoint; compare with the small one where that computes the same."""
    size = sizes(folder)
    slots = round(size.experts * share)
    text = prompts(source, count, 48)
    memory_group.forget_cached(folder)
    answer = ask(Request(variant=OURS, folder=str(folder), prompts=text, new_tokens=new_tokens, slots=slots))
    rows = [*rows_of_memory(case, size, slots, answer), *rows_of_speed(case, answer)]
    if is_trained(source):
        small = ask(Request(variant=STOCK, folder=str(source), prompts=text, new_tokens=new_tokens))
        same = same_tokens(answer, small)
        note = f"{len(same)} tokens of {count} prompts"
        equal = [statistics.mean(same)]
        rows.append(record.row(case, "ours = small twin", "equal tokens", "share", equal, target=1.0, note=note))
    return rows


def main() -> None:
    parser = record.arguments(__doc__ or "")
    parser.add_argument("--scratch", type=Path, help=f"folder for {SHARE_OF_RAM:g} x RAM of checkpoint")
    parser.add_argument("--source", type=Path, default=MODEL, help="checkpoint to inflate (default: the demo model)")
    args = parser.parse_args()
    results = record.results(args, "beyond_ram")
    beyond = 600_000_000 if args.quick else round(SHARE_OF_RAM * record.memory())
    loaded = 1_200_000 if args.quick else LOADED_EXPERT_BYTES
    count, new_tokens = (2, 8) if args.quick else (4, 32)
    for case, share, expert_bytes in ((LOADING, 0.5, loaded), (BEYOND, SLOT_SHARE, -(-beyond // EXPERTS))):
        if results.has(case):
            continue
        place = args.scratch or Path(tempfile.gettempdir())
        free = shutil.disk_usage(place).free
        if free < expert_bytes * EXPERTS * 1.05:
            print(f"skipped: {case}: needs {expert_bytes * EXPERTS / 1e9:.0f} GB of disk, {free / 1e9:.0f} are free")
            continue
        with large_checkpoint(args.source, args.scratch, expert_bytes, case) as folder:
            results.begin()
            results.write(measure(case, args.source, folder, share, count, new_tokens))


if __name__ == "__main__":
    main()
