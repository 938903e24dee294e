"""Measure the kernels and the whole layer on the GPU at hand against the rivals, the most important cells first.

python3 bench/gpu/run.py --out FOLDER --minutes 8     # as many cells as fit; run again, it goes on
python3 bench/gpu/run.py --out FOLDER --quick         # a rehearsal in Triton's interpreter, on tiny shapes

Needs torch, triton, transformers; matplotlib for the figures. Rows already in FOLDER/kernels.csv are skipped. A worker
measures, and a process beside it starts it anew should a cell take the device down or hang: that is one row.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
# Last: modules there have names of some that are here.
sys.path.append(str(ROOT / "bench"))

import watch  # noqa: E402

LOST = 3
"""Exit code of a worker whose device answers no more."""

HANGS = 300.0
"""Seconds after which a cell counts as hung; building a shape and compiling for it take most of a minute at worst."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu", help="folder for everything")
    parser.add_argument("--minutes", type=float, help="begin no cell after so many minutes (default: measure all)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes; in the interpreter where there is no GPU")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tiles", type=Path, help="use the tiles of this file in place of those shipped")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="cells whose description has one of these texts")
    parser.add_argument("--seconds", type=float, default=0.15, help="how long each number is measured")
    parser.add_argument("--force", action="store_true", help="measure again what the CSV has already")
    parser.add_argument("--cache", type=Path, help="folder of compiled kernels (default: FOLDER/cache)")
    parser.add_argument("--list", action="store_true", help="list the cells in their order, measure nothing")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    cache = args.cache or args.out / "cache"
    for name, folder in (("TRITON", "triton"), ("TORCHINDUCTOR", "inductor")):
        os.environ.setdefault(f"{name}_CACHE_DIR", str((cache / folder).resolve()))
    os.environ.setdefault("MPLCONFIGDIR", str((cache / "matplotlib").resolve()))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.list or args.worker is not None:
        sys.exit(work(args))
    sys.exit(supervise(args))


def supervise(args: argparse.Namespace) -> int:
    """Run workers until one has gone through all cells; a cell that kills its worker or hangs gets a row."""
    args.out.mkdir(parents=True, exist_ok=True)
    marker = args.out / "current.json"
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(time.time())]
    code = watch.supervise(command, marker, HANGS, lambda code: note_crash(args.out, marker, code))
    return finish(args.out) or code


def note_crash(out: Path, marker: Path, code: int) -> None:
    """Append the row of the cell that a worker was at when it ended."""
    import table

    noted = json.loads(marker.read_text())
    reason = watch.reason(code, HANGS)
    result = table.row(table.Result(mode=noted["mode"], status="crashed", reason=reason))
    table.append(out / "kernels.csv", noted["columns"], [{**noted["cell"], **result}])
    print(f"  crashed: {reason}; starting again after {noted['cell']}", flush=True)


def finish(out: Path) -> int:
    """Draw the figures and print how the gates stand."""
    import gates
    import table

    rows = table.latest(out / "kernels.csv")
    if not rows:
        print("nothing was measured", flush=True)
        return 0
    text = gates.summary(rows)
    (out / "gates.txt").write_text(text + "\n")
    try:
        import draw

        draw.all_figures(out)
    # Whatever goes wrong with a picture, the numbers stand.
    except Exception as error:
        print(f"no figures: {error!r}", flush=True)
    print(f"\n{rows[-1]['device']}, {rows[-1]['commit']}\n{text}", flush=True)
    return 0


def work(args: argparse.Namespace) -> int:
    """Measure cells until they or the minutes are spent."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        if not args.quick and not args.list:
            print("no GPU: only --quick, a rehearsal in Triton's interpreter, runs here", file=sys.stderr)
            return 2
        os.environ["TRITON_INTERPRET"] = "1"  # looked at when kernels are imported
        torch.set_num_threads(1)
    import grid

    cells = grid.quick_cells() if args.quick else grid.cells()
    if args.only:
        cells = [cell for cell in cells if any(text in str(cell) for text in args.only)]
    if args.list:
        print("\n".join(map(str, cells)))
        return 0
    return measure(args, device, cells)


def measure(args: argparse.Namespace, device: object, cells: list) -> int:  # type: ignore[type-arg]
    import table
    import torch
    from measure import Bench, Roofs

    from promoe_triton.kernels.provenance import about_device, source_hash
    from promoe_triton.kernels.tiles import TABLE, table_for, target_of

    assert isinstance(device, torch.device)
    dtype = getattr(torch, args.dtype)
    path = args.tiles or TABLE
    tiles = table_for(target_of(device), path.resolve())
    roofs = Roofs.measured(device, dtype)
    print(f"roofs: copy {roofs.copy / 1e9:.0f} GB/s, product {roofs.matmul / 1e12:.1f} TFLOPS", flush=True)
    about = {
        "copy_gbps": f"{roofs.copy / 1e9:.6g}",
        "matmul_tflops": f"{roofs.matmul / 1e12:.6g}",
        "dtype": args.dtype,
        **about_device(device),
        "source": source_hash(),
        "tiles": hashlib.sha256(path.read_bytes()).hexdigest()[:12],
        "commit": table.commit(),
        "date": table.today(),
    }
    results = table.Table(args.out / "kernels.csv", about)
    bench = Bench(device, dtype, tiles, roofs, args.seconds)
    marker = args.out / "current.json"
    todo = cells if args.force else [cell for cell in cells if not results.has(cell)]
    print(f"{len(todo)} cells to measure, {len(cells) - len(todo)} are in {results.path} already", flush=True)
    for number, cell in enumerate(todo):
        if args.minutes and time.time() - args.worker > 60 * args.minutes:
            print(f"{args.minutes:g} minutes are over, {len(todo) - number} cells are left; run again", flush=True)
            break
        mode = "graph" if device.type == "cuda" else "interpreter"
        noted = {"cell": results.cells_of(cell), "columns": results.columns, "mode": mode}
        marker.write_text(json.dumps(noted))
        try:
            rows = bench.measure(cell)
        except RuntimeError as error:
            print(f"  {cell}: the device is lost: {error}", file=sys.stderr, flush=True)
            return LOST
        results.write(cell, rows)
    marker.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    main()
