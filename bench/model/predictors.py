"""Predictors beside each other: trained on the demo model's training text, judged on held-out text and another domain.

    apt-get install python3.11-doc           # the texts, as for bench/model/train.py
    python bench/model/predictors.py               # the demo model, results to bench/results/predictors
    python bench/model/predictors.py --model FOLDER --name olmoe

Traces are recorded in single precision for training and in the model's own for judging. What is there already in --work
is not made again. The learned predictor of the demo model is what the package ships: --ship puts it there.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from train import ROOT, Document, read_documents

DEMO = Path("promoe_triton/demo")
PIECE = 1700
"""Bytes taken of a document: about 512 tokens of the demo model."""
OTHER = ("Tensor*.h", "Dispatch*.h", "Context.h", "Parallel*.h", "record_function.h")
"""Another domain: C++ of torch, whose installed headers are of the version that the constraints name."""


def training_texts(documents: Sequence[Document], docs: int, code: int) -> list[str]:
    """Return a piece from the middle of each of so many documents that the model was trained on."""
    pieces = []
    ordered = sorted(documents, key=lambda d: hashlib.sha256(d.path.encode()).digest())
    for source, count in (("docs", docs), ("code", code)):
        mine = [d for d in ordered if d.source == source and not d.held_out and len(d.text) > PIECE]
        for document in mine[:count]:
            begin = (len(document.text) - PIECE) // 3
            pieces.append(document.text[begin : begin + PIECE])
    return pieces


def stretches(text: str, count: int) -> list[str]:
    """Return pieces from all over a text."""
    step = len(text) // count
    return [text[begin : begin + PIECE] for begin in range(0, count * step, step)]


def command(*arguments: str | Path) -> None:
    """Run promoe-triton in the project's folder, so that what it records names no other."""
    print("promoe-triton", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "promoe_triton", *arguments], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO / "model", help="seen from the project's folder")
    parser.add_argument("--name", default="demo", help="of the results")
    parser.add_argument("--docs", type=Path, default=Path("/usr/share/doc/python3.11/html/_sources"))
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--pieces", type=int, nargs=2, default=(320, 80), help="of documentation and of code")
    parser.add_argument("--documents", type=int, default=24, help="pieces from all over each of the two texts")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "predictors", help="traces: some 4 GB")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "predictors")
    parser.add_argument("--ship", action="store_true", help="put the learned predictor into the package")
    args = parser.parse_args()
    work, out = args.work.resolve() / args.name, args.out.resolve()
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    headers = Path(torch.__file__).parent / "include" / "ATen"
    other = [path for pattern in OTHER for path in sorted(headers.glob(pattern))]
    for name, texts in (
        ("trained", training_texts(read_documents(args.docs, args.stdlib), *args.pieces)),
        ("held-out", stretches((ROOT / DEMO / "heldout.txt").read_text(), args.documents)),
        ("other", stretches("\n".join(path.read_text() for path in other), args.documents)),
    ):
        files = [work / f"{name}-{number:03}.txt" for number in range(len(texts))]
        for file, text in zip(files, texts, strict=True):
            file.write_text(text)
        more = ["--dtype", "float32"] if name == "trained" else ["--length", "1024"]
        slots = ["--slots", "1.0", "--device", "cpu"]
        given = [part for file in files for part in ("--text", file)]
        command("trace", args.model, *given, "--out", work / name, *slots, *more)
    made = []
    for kind, options in (
        ("learned", ["--width", "256", "--epochs", "6"]),
        ("learned-512", ["--width", "512", "--epochs", "12"]),
        ("network", ["--network", "--width", "256", "--epochs", "6"]),
        ("network-512", ["--network", "--width", "512", "--epochs", "12"]),
    ):
        made.append(work / f"{kind}.safetensors")
        if not made[-1].exists():
            command("train", work / "trained", "--out", made[-1], "--model", args.model, *options)
    if args.ship:
        shutil.copyfile(made[0], ROOT / DEMO / "predictor.safetensors")
    rows = work / "rows.csv"
    found = ["--out", rows, "--figure", out / f"{args.name}.png", "--model", args.model]
    given = [part for file in made for part in ("--predictor", file)]
    command("evaluate", work / "held-out", work / "other", *found, *given)
    (out / f"{args.name}.csv.gz").write_bytes(gzip.compress(rows.read_bytes(), mtime=0))


if __name__ == "__main__":
    main()
