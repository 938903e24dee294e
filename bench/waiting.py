"""How fast useful bytes come while a layer waits: the share of what the disk gives while products run.

Half and three quarters of the experts in slots, everything on, read past the page cache, from the timeline of a run.
A chunk counts as far as it overlaps a layer's wait; of those copied ahead the share that was of use.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import record
from decoding import Decoder, timed
from models import MODEL, large_checkpoint, prompts
from proactive import EXPERT_BYTES
from subjects import OnDisk, Subject

import promoe_triton
from promoe_triton.timeline import Span

TARGET = 0.9


def overlap(span: Span, waits: Sequence[Span]) -> float:
    return sum(max(min(span.end, wait.end) - max(span.begin, wait.begin), 0.0) for wait in waits)


def rate_while_waiting(spans: Sequence[Span], useful: float) -> float:
    """Return bytes per second; useful: the share of bytes copied ahead that was of use."""
    waits = [span for span in spans if span.kind == "stall"]
    nbytes = 0.0
    for span in spans:
        if span.nbytes and span.end > span.begin:
            share = overlap(span, waits) / (span.end - span.begin)
            nbytes += span.nbytes * share * (useful if span.kind == "speculation" else 1.0)
    return nbytes / sum(span.end - span.begin for span in waits)


def measure(subject: Subject, results: record.Results, share: float, tokens: int, repeats: int) -> None:
    case = f"decode, {share:.1%} in slots"
    if results.has(case):
        return
    results.begin()
    waiting, running, seconds = [], [], []
    for ids in prompts(MODEL, repeats, tokens + 16):
        with subject.opened({"slots": round(subject.experts * share)}) as model:
            decoder = Decoder(model, [ids])
            decoder.step(16)
            with promoe_triton.record_timeline(model) as timeline:
                run = timed(model, tokens, lambda decoder=decoder: decoder.step(tokens))  # type: ignore[misc]
            useful = 1.0 - run.ahead.bytes_wasted / max(run.ahead.bytes_copied, 1)
            waiting.append(rate_while_waiting(list(timeline.spans), useful) / 1e9)
            seconds.append(run.counted("stall_seconds") / tokens * 1e3)
        with subject.opened({"slots": 1.0}) as model:
            decoder = Decoder(model, [ids])
            decoder.step(16)
            with subject.streaming() as moved:
                before = moved.nbytes
                run = timed(model, tokens, lambda decoder=decoder: decoder.step(tokens))  # type: ignore[misc]
                running.append((moved.nbytes - before) / run.seconds / 1e9)
    shares = [one / other for one, other in zip(waiting, running, strict=True)]
    results.write(
        [
            record.row(case, "all", "useful bytes while a layer waits", "GB/s", waiting),
            record.row(case, "the disk, products running", "bandwidth", "GB/s", running),
            record.row(case, "all", "share of that", "share", shares, target=TARGET),
            record.row(case, "all", "waiting", "ms/token", seconds, better="lower"),
        ]
    )


def main() -> None:
    parser = record.arguments(__doc__ or "")
    parser.add_argument("--scratch", type=Path, help="folder for 5 GB of checkpoint (default: a temporary one)")
    args = parser.parse_args()
    record.confine()
    results = record.results(args, "waiting")
    nbytes = 1_100_000 if args.quick else EXPERT_BYTES
    with large_checkpoint(MODEL, args.scratch, nbytes, "a checkpoint with large experts") as folder:
        for share in (0.5,) if args.quick else (0.5, 0.75):
            measure(OnDisk(folder), results, share, *((4, 2) if args.quick else (48, 4)))


if __name__ == "__main__":
    main()
