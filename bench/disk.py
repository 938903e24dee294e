"""Bandwidth of the product's own disk link against the best that plain reads of the same files reach.

Plain: os.preadv with O_DIRECT, one chunk after another through the checkpoint, over chunk sizes and numbers of
threads, into memory as large as the product's slots; and, named so, into the same few small buffers again and
again, which stay in the processor's cache: faster than any reader that keeps what it reads. And the ranges of random
experts, by bare threads that do nothing else. Product: the core and its link asked for random distinct experts, as many
on their way as a token asks for; only the experts' own bytes count. Direct reads leave the page cache out of it.
All take turns, with the processor idle and with a thread that streams matrix-vector products.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import record
import torch
from models import Shape, open_store, write_random
from timing import ratios, take_turns

from promoe_triton.chunking import Chunking
from promoe_triton.config import Config, format_size
from promoe_triton.core import Core
from promoe_triton.links.filling import SlotFiller
from promoe_triton.links.threads import ThreadedLink
from promoe_triton.memory import SlotMemory
from promoe_triton.policies import make_policy
from promoe_triton.protocols import ExpertKey, Part, Transfer
from promoe_triton.slots import SlotTable
from promoe_triton.stores.checkpoint import CheckpointStore

SHAPES = (
    Shape(experts=40, active=8, width=3072),
    Shape(experts=256, active=8, width=384),
    Shape(experts=22, active=8, width=5632),
)
QUICK_SHAPE = Shape(experts=40, active=8, width=384)
MIB = 2**20
CHUNKS = (MIB // 4, MIB, 4 * MIB, 16 * MIB)
DEPTHS = (1, 2, 4)
HUGE_PAGE = 2 * MIB
TARGET = 0.85
IN_FLIGHT = 8
"""Experts submitted ahead: what one token of a top-8 model may miss in a layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A way to read: so many threads, each with so many bytes at a time."""

    depth: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.chunk / MIB:g} MiB x {self.depth}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Matrix products a thread has done while something else was measured."""

    spent: list[float]
    done: list[int]

    def rate(self) -> float:
        return sum(self.done) / sum(self.spent)


def plain(files: Sequence[Path], reading: Reading, nbytes: int, room: int = 0) -> float:
    """Read `nbytes` through the files from a random place on into `room` bytes; return GB/s."""
    places = [
        (file, offset)
        for file in files
        for offset in range(0, file.stat().st_size // reading.chunk * reading.chunk, reading.chunk)
    ]
    first = random.randrange(len(places))
    wanted = [places[(first + i) % len(places)] for i in range(max(nbytes // reading.chunk, 1))]
    handles = {file: os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files}
    # The same kind of memory as the product's slots: with small pages direct reads are a third slower.
    chunk = max(reading.chunk, HUGE_PAGE)
    memory = SlotMemory(max(reading.depth, room // chunk), chunk)
    memory.view[:] = bytes(len(memory.view))
    chunks = [
        (handles[file], offset, index % memory.slots * memory.slot_bytes, reading.chunk)
        for index, (file, offset) in enumerate(wanted)
    ]
    spent = read_all(chunks, memory, reading.depth)
    for handle in handles.values():
        os.close(handle)
    return len(wanted) * reading.chunk / spent / 1e9


def ranges(store: CheckpointStore, memory: SlotMemory, shape: Shape, depth: int, nbytes: int) -> float:
    """Read the ranges of random distinct experts, each in one piece, and do nothing else; return GB/s."""
    wanted = random_experts(shape, nbytes)
    handles = {file: os.open(file, os.O_RDONLY | os.O_DIRECT) for file in store.files}
    chunks = [
        (
            handles[extent.file],
            extent.offset,
            index % memory.slots * memory.slot_bytes + extent.slot_offset,
            extent.nbytes,
        )
        for index, key in enumerate(wanted)
        for extent in store.image(key, direct=True).extents
    ]
    spent = read_all(chunks, memory, depth)
    for handle in handles.values():
        os.close(handle)
    return len(wanted) * shape.expert_bytes / spent / 1e9


def read_all(chunks: Sequence[tuple[int, int, int, int]], memory: SlotMemory, depth: int) -> float:
    """Read (handle, offset, place in memory, bytes) by so many threads; return the seconds it took."""
    turn = itertools.count()

    def read() -> None:
        while (index := next(turn)) < len(chunks):
            handle, offset, start, nbytes = chunks[index]
            os.preadv(handle, [memory.view[start : start + nbytes]], offset)

    threads = [threading.Thread(target=read) for _ in range(depth)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def random_experts(shape: Shape, nbytes: int) -> list[ExpertKey]:
    """Return distinct experts of `nbytes` in all."""
    keys = [ExpertKey(layer, expert) for layer in range(shape.layers) for expert in range(shape.experts)]
    return random.sample(keys, min(max(nbytes // shape.expert_bytes, 1), len(keys)))


def product(store: CheckpointStore, memory: SlotMemory, shape: Shape, reading: Reading, nbytes: int) -> float:
    """Fetch random distinct experts of `nbytes` in all through the product's link; return GB/s."""
    wanted = random_experts(shape, nbytes)
    link = ThreadedLink(
        SlotFiller(store, [memory] * shape.layers, direct=True),
        depth=reading.depth,
        chunking=Chunking(name="adaptive", longest=reading.chunk, latency=1e-3),
        timeout=60.0,
    )
    table = SlotTable(range(memory.slots), make_policy("lru", {}))
    core = Core([table] * shape.layers, link.cuts)
    link.restart(core)

    def settle(transfer: Transfer) -> None:
        link.wait([transfer])
        link.tell(lambda: core.release([transfer.key]))

    try:
        began = time.perf_counter()
        running: list[Transfer] = []
        for key in wanted:
            if len(running) == IN_FLIGHT:
                settle(running.pop(0))
            running.append(link.tell(partial(core.ask, key, Part.WHOLE)))
        for transfer in running:
            settle(transfer)
        return len(wanted) * shape.expert_bytes / (time.perf_counter() - began) / 1e9
    finally:
        link.close()


@contextlib.contextmanager
def computing(busy: bool) -> Iterator[Callable[[], int]]:
    """Stream matrix-vector products in a thread, if `busy`; yields a function that counts them."""
    weights = list(torch.zeros(64, 2048, 512, dtype=torch.bfloat16)) if busy else []
    x, done, stop = torch.zeros(512, dtype=torch.bfloat16), 0, threading.Event()

    def work() -> None:
        nonlocal done
        torch.set_num_threads(record.CORES)
        with torch.inference_mode():
            for weight in itertools.cycle(weights):
                if stop.is_set():
                    return
                torch.mv(weight, x)
                done += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield lambda: done
    finally:
        stop.set()
        thread.join()


def with_load(measure: Callable[[], float], busy: bool, load: Load) -> float:
    with computing(busy) as count:
        if busy:
            time.sleep(0.05)
        began, before = time.perf_counter(), count()
        value = measure()
        load.done.append(count() - before)
        load.spent.append(time.perf_counter() - began)
    return value


def pause() -> float:
    time.sleep(0.5)
    return 0.0


def measure(shape: Shape, folder: Path, busy: bool, nbytes: int, repeats: int) -> list[record.Row]:
    store = open_store(folder)
    slot_bytes = max(store.slot_bytes(layer, shape.experts) for layer in range(shape.layers))
    memory = SlotMemory(2 * IN_FLIGHT, slot_bytes)
    memory.view[:] = bytes(len(memory.view))
    files = store.files
    default = Reading(depth=Config().depth, chunk=Config().chunk_bytes)
    readings = [Reading(depth=depth, chunk=chunk) for depth, chunk in itertools.product(DEPTHS, CHUNKS)]
    plains = {r: f"preadv {r}" for r in readings}
    small = {r: f"preadv {r}, small buffers" for r in readings}
    ours = {r: f"link {r}" for r in readings if r.chunk >= MIB}
    ours.setdefault(default, f"link {default}")
    room = len(memory.view)
    runs: dict[str, Callable[[], float]] = {n: partial(plain, files, r, nbytes, room) for r, n in plains.items()}
    runs |= {n: partial(plain, files, r, nbytes) for r, n in small.items()}
    runs |= {n: partial(product, store, memory, shape, r, nbytes) for r, n in ours.items()}
    bare = f"preadv of the experts' ranges x {default.depth}"
    runs[bare] = partial(ranges, store, memory, shape, default.depth, nbytes)
    if busy:
        runs["no reads"] = pause
    loads = {name: Load(spent=[], done=[]) for name in runs}
    take_turns(runs, 1)
    taken = take_turns({n: partial(with_load, run, busy, loads[n]) for n, run in runs.items()}, repeats)
    taken.pop("no reads", None)
    case = case_of(shape, busy)
    rows = [record.row(case, name, "bandwidth", "GB/s", values) for name, values in taken.items()]

    def best(names: Sequence[str]) -> str:
        return max(names, key=lambda name: statistics.median(taken[name]))

    roof, cached, own = (best(list(names.values())) for names in (plains, small, ours))
    chosen = ours[default]
    shares = ratios(taken[chosen], taken[roof])
    note = f"{chosen} over {roof}"
    rows.append(record.row(case, "default link / best preadv", "share", "x", shares, target=TARGET, note=note))
    shares = ratios(taken[chosen], taken[cached])
    note = f"{chosen} over {cached}"
    rows.append(record.row(case, "default link / best preadv, small buffers", "share", "x", shares, note=note))
    note = f"{chosen} over {bare}"
    rows.append(
        record.row(case, "default link / the same ranges", "share", "x", ratios(taken[chosen], taken[bare]), note=note)
    )
    shares = ratios(taken[own], taken[roof])
    rows.append(record.row(case, "best link / best preadv", "share", "x", shares, note=f"{own} over {roof}"))
    if busy:
        alone = loads["no reads"].rate()
        for name in (roof, chosen, own):
            rows.append(record.row(case, name, "computation's speed", "x", [loads[name].rate() / alone]))
    return rows


def case_of(shape: Shape, busy: bool) -> str:
    return f"experts of {format_size(shape.expert_bytes)}, {'computing' if busy else 'idle'}"


def main() -> None:
    parser = record.arguments(__doc__ or "")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints of 3 GB (default: a temporary one)")
    args = parser.parse_args()
    record.confine()
    results = record.results(args, "disk")
    nbytes, repeats = (2**26, 3) if args.quick else (3 * 2**28, 7)
    random.seed(0)
    for shape in (QUICK_SHAPE,) if args.quick else SHAPES:
        missing = [busy for busy in (False, True) if not results.has(case_of(shape, busy))]
        if not missing:
            continue
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            write_random(shape, Path(folder))
            os.sync()
            for busy in missing:
                results.begin()
                results.write(measure(shape, Path(folder), busy, nbytes, repeats))


if __name__ == "__main__":
    main()
