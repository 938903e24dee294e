"""Run every benchmark, the most important first, then draw the figures and compare with the targets.

What is in the CSV already is skipped, so an interrupted run goes on where it stopped; --force measures again.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import record

HERE = Path(__file__).resolve().parent
BENCHMARKS = (
    "proactive",
    "resident",
    "overhead",
    "core",
    "predict",
    "simulating",
    "offload",
    "urgent",
    "waiting",
    "trust",
    "disk",
    "step",
    "beyond_ram",
)
ON_DISK = ("proactive", "offload", "urgent", "waiting", "trust", "disk", "step", "beyond_ram")


def main() -> None:
    parser = record.arguments(__doc__ or "")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, help="run these, in their order")
    parser.add_argument("--scratch", type=Path, help="folder for large checkpoints (default: a temporary one)")
    args = parser.parse_args()
    passed = [f"--{flag}" for flag in ("quick", "force", "wait") if getattr(args, flag)]
    passed += ["--case", args.case] if args.case else []
    passed += ["--out", str(args.out)] if args.out else []
    failed = []
    for number, name in enumerate(args.only, 1):
        print(f"[{number}/{len(args.only)}] {name}", flush=True)
        began = time.monotonic()
        scratch = ["--scratch", str(args.scratch)] if args.scratch and name in ON_DISK else []
        done = subprocess.run([sys.executable, HERE / f"{name}.py", *passed, *scratch], check=False)
        ended = "done" if done.returncode == 0 else f"FAILED with code {done.returncode}"
        print(f"[{number}/{len(args.only)}] {name}: {ended} after {time.monotonic() - began:.0f} s", flush=True)
        failed += [name] if done.returncode else []
    folder = record.folder(args)
    subprocess.run([sys.executable, HERE / "figures.py", "--out", folder], check=True)
    for name in BENCHMARKS:
        for line in record.verdicts(folder / f"{name}.csv"):
            print(line)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
