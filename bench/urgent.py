"""How soon an urgent copy starts while others are copied ahead, and what the cutting of copies costs in bandwidth.

The product's disk link and core over the demo model with experts of 9.4 MB. A dozen experts at a time are copied
ahead; meanwhile, at random moments, a layer asks for one expert. Compared are the ways to cut copies: without a fixed
size (several latency budgets), at a fixed size, by tensor as in the paper, and not at all. They take turns.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import record
from models import MODEL, large_checkpoint, open_store

from promoe_triton.chunking import BUS_LATENCY, DISK_LATENCY, Chunking
from promoe_triton.core import Core
from promoe_triton.links.device import DeviceFiller
from promoe_triton.links.filling import Filler, SlotFiller
from promoe_triton.links.issued import LOOK, IssuedLink
from promoe_triton.links.streams import Streams
from promoe_triton.links.threads import ThreadedLink
from promoe_triton.memory import SlotMemory
from promoe_triton.policies import make_policy
from promoe_triton.protocols import Chunk, ExpertKey, Link, Part, Transfer
from promoe_triton.slots import SlotTable
from promoe_triton.timeline import Timeline

DEPTH, LONGEST, SLOTS, AHEAD = 4, 4 << 20, 24, 12
FIXED = {
    "fixed, 4 MiB": Chunking(name="fixed", longest=LONGEST, latency=1.0),
    "fixed, 1 MiB": Chunking(name="fixed", longest=1 << 20, latency=1.0),
    "tensor": Chunking(name="tensor", longest=LONGEST, latency=1.0),
    "expert": Chunking(name="expert", longest=LONGEST, latency=1.0),
}


class Copies(Timeline):
    """Every chunk with the times at which a thread took it and was done with it."""

    def __init__(self) -> None:
        super().__init__()
        self.chunks: deque[tuple[Chunk, float, float]] = deque(maxlen=10_000)

    def copied(self, lane: str, chunk: Chunk, begin: float, end: float) -> None:
        self.chunks.append((chunk, begin, end))


class Traffic:
    """One link with everything that goes over it: so many layers of so many experts each.

    delays, waits: from asking for an expert to the start of its first chunk, and to the end of its last.
    """

    def __init__(self, link: Link, layers: int, experts: int, chunking: Chunking, seed: int) -> None:
        self.link = link
        tables = [SlotTable(range(i * SLOTS, (i + 1) * SLOTS), make_policy("lru", {})) for i in range(layers)]
        self.core = Core(tables, self.link.cuts, overtake=chunking.overtake)
        self.link.restart(self.core)
        self._copies = Copies()
        self.link.record(self._copies)
        self._random = random.Random(seed)
        self._urgent_layer, self._experts = layers - 1, experts
        self._quiet: list[float] = []
        self.rates: list[float] = []
        self.delays: list[float] = []
        self.waits: list[float] = []

    def _absent(self, layer: int, count: int) -> list[ExpertKey]:
        ready = {*self.core.tables[layer].ready()}
        absent = [key for e in range(self._experts) if (key := ExpertKey(layer, e)) not in ready]
        return self._random.sample(absent, count)

    def round(self, layer: int, urgent: int) -> None:
        """Copy experts ahead for a layer, and ask for `urgent` others meanwhile, which needs a round without before."""
        link, core = self.link, self.core
        ahead = self._absent(layer, AHEAD)
        moved, began = link.bytes_moved, time.perf_counter()
        nbytes = sum(map(self._nbytes, ahead))
        link.tell(lambda: core.predict(core.position_of(layer, 0), ahead, float("inf")))
        for _ in range(urgent):
            time.sleep(self._random.uniform(0.08, 0.25) * statistics.median(self._quiet))
            self._ask(self._absent(self._urgent_layer, 1)[0])
        while link.tell(lambda: len([*core.queue])) or link.bytes_moved - moved < nbytes:
            time.sleep(LOOK)
        taken = time.perf_counter() - began
        link.tell(lambda: core.release(core.gate(layer, [key.expert for key in ahead]).resident))
        if not urgent:
            self._quiet.append(taken)
            self.rates.append(nbytes / taken)

    def _ask(self, key: ExpertKey) -> None:
        core, asked = self.core, time.perf_counter()
        speculating = bool(self.link.tell(lambda: [*core.queue]))
        transfer = self.link.tell(lambda: (core.gate(key.layer, [key.expert]), core.ask(key, Part.WHOLE))[1])
        self.link.wait([transfer])
        # It may be that no more has happened yet than that it was issued.
        while sum(chunk.end - chunk.begin for chunk, *_ in self._of(transfer)) < self._nbytes(key):
            time.sleep(LOOK)
            self.link.tell(lambda: None)
        copies = self._of(transfer)
        if speculating:
            self.delays.append(min(begin for _, begin, _ in copies) - asked)
            self.waits.append(max(end for *_, end in copies) - asked)
        self.link.tell(lambda: self.core.release([key]))

    def _nbytes(self, key: ExpertKey) -> int:
        return self.link.cuts(Transfer(key=key, part=Part.WHOLE)).ends[-1]

    def _of(self, transfer: Transfer) -> list[tuple[Chunk, float, float]]:
        return [copy for copy in [*self._copies.chunks] if copy[0].transfer is transfer]

    def close(self) -> None:
        self.link.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Road:
    """Where the traffic goes. link: makes a new one that cuts copies so. latencies: to compare, in seconds, the
    product's own (default) among them; target: of that one at p99, in seconds.
    """

    link: Callable[[Chunking], Link]
    layers: int
    experts: int
    latencies: tuple[float, ...]
    default: float
    target: float

    def __post_init__(self) -> None:
        assert self.default in self.latencies

    def ways(self) -> dict[str, Chunking]:
        """Return the ways to cut copies by name."""
        adaptive = {
            self._name(latency): Chunking(name="adaptive", longest=LONGEST, latency=latency)
            for latency in self.latencies
        }
        return adaptive | FIXED

    @property
    def own(self) -> str:
        """The name of the product's own way."""
        return self._name(self.default)

    def _name(self, latency: float) -> str:
        return f"adaptive, {latency * 1e3:g} ms" + (" (default)" if latency == self.default else "")


def disk(filler: Callable[[], Filler], layers: int, experts: int) -> Road:
    return Road(
        link=lambda chunking: ThreadedLink(filler(), depth=DEPTH, chunking=chunking, timeout=60.0),
        layers=layers,
        experts=experts,
        latencies=(1e-3, 2e-3, DISK_LATENCY),
        default=DISK_LATENCY,
        target=1e-3,
    )


def bus(filler: Callable[[], DeviceFiller], streams: Streams, layers: int, experts: int) -> Road:
    """Return the way from the host's memory to a GPU."""
    return Road(
        link=lambda chunking: IssuedLink(filler(), streams, depth=DEPTH, chunking=chunking, timeout=60.0),
        layers=layers,
        experts=experts,
        latencies=(5e-5, 1e-4, BUS_LATENCY, 5e-4, 4e-3),
        default=BUS_LATENCY,
        target=1e-4,
    )


def measure(road: Road, results: record.Results, repeats: int, rounds: int) -> None:
    ways = road.ways()
    delays: dict[str, list[list[float]]] = {way: [] for way in ways}
    waits: dict[str, list[list[float]]] = {way: [] for way in ways}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    results.begin()
    for repeat in range(repeats):
        for way, chunking in ways.items():
            traffic = Traffic(road.link(chunking), road.layers, road.experts, chunking, repeat)
            layers = road.layers - 1
            for i in range(rounds):
                traffic.round(i % layers, 0)
            for i in range(rounds):
                traffic.round((rounds + i) % layers, 3)
            rates[way].append(statistics.median(traffic.rates))
            delays[way].append(traffic.delays)
            waits[way].append(traffic.waits)
            traffic.close()
    best = [max(rates[way][i] for way in ways) for i in range(repeats)]
    rows = []
    for way in ways:
        share = [rate / top for rate, top in zip(rates[way], best, strict=True)]
        target = way == road.own
        rows += [
            quantile(way, "start, p50", delays[way], 0.5),
            quantile(way, "start, p99", delays[way], 0.99, road.target * 1e3 if target else None),
            quantile(way, "arrival, p50", waits[way], 0.5),
            quantile(way, "arrival, p99", waits[way], 0.99),
            record.row("urgent", way, "bandwidth", "GB/s", [rate / 1e9 for rate in rates[way]]),
            record.row("urgent", way, "bandwidth", "share of best", share, target=0.95 if target else None),
        ]
    results.write(rows)


def quantile(way: str, metric: str, seconds: list[list[float]], q: float, target: float | None = None) -> record.Row:
    """Return a row for a quantile of single events of all repeats; what it is in each is in the note."""
    every = sorted(second for repeat in seconds for second in repeat)
    found = [of_sorted(sorted(repeat), q) for repeat in (every, *seconds) if repeat]
    note = "none was seen"
    if found:
        note = f"{len(every)} urgent copies; by repeat {min(found[1:]):.3g} to {max(found[1:]):.3g}"
    value = found[0] if found else float("nan")
    return record.row("urgent", way, metric, "ms", [value], target=target, better="lower", note=note)


def of_sorted(seconds: list[float], q: float) -> float:
    """Return a quantile in ms."""
    return seconds[min(int(q * len(seconds)), len(seconds) - 1)] * 1e3


def main() -> None:
    parser = record.arguments(__doc__ or "")
    parser.add_argument("--scratch", type=Path, help="folder for 5 GB of checkpoint (default: a temporary one)")
    args = parser.parse_args()
    record.confine()
    results = record.results(args, "urgent")
    if results.has("urgent"):
        return
    nbytes = 1_100_000 if args.quick else 9_400_000
    with large_checkpoint(MODEL, args.scratch, nbytes, "a checkpoint with large experts") as folder:
        store = open_store(folder)
        layers = len(store.specs)
        memory = SlotMemory(layers * SLOTS, store.slot_bytes(0, 64))
        road = disk(lambda: SlotFiller(store, [memory] * layers, direct=True), layers, 64)
        measure(road, results, *((2, 2) if args.quick else (5, 14)))


if __name__ == "__main__":
    main()
