"""The simulator against real runs on this machine: decoding and prompts from disk, several cache sizes, ablation steps.

Calibrated from micro-measurements only, before anything runs end to end: experts read over the link one and several
at a time, products of one expert by rows, a call whose experts are all there, a prediction, and passes with everything
resident, alone and while experts are read. A shared machine is not the same for long, so the first and the last are
measured again before each run. Routing and predictions are recorded once, and simulated for every case.
"""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import numpy as np
import record
import torch
from decoding import decode, prefill
from models import MODEL, large_checkpoint, prompts, sizes
from subjects import OnDisk
from transformers import AutoConfig

import promoe_triton
from promoe_triton.chunking import DISK_LATENCY
from promoe_triton.config import Config
from promoe_triton.links.fake import Wire
from promoe_triton.predictors.bounds import RoutingRecorder
from promoe_triton.protocols import Observation, Part, Seam
from promoe_triton.simulation.costs import Curve, Measured
from promoe_triton.simulation.routing import Pass, Routed, passes
from promoe_triton.simulation.shapes import ModelShape, model_shape
from promoe_triton.simulation.simulator import Simulator

CASES: dict[str, dict[str, Any]] = {
    "lru": {"ablation": "lru"},
    "preemption": {"ablation": "preemption"},
    "no prediction": {"predictor": "none"},
    "all": {"ablation": "all"},
}
GOAL = 0.15

R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured. rows: of products; tokens: of prompts, resident; warm_up, timed: of a text; runs: of each
    case, end to end.
    """

    expert_bytes: int
    shares: tuple[float, ...]
    repeats: int
    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    warm_up: int
    timed: int
    runs: int


FULL = Size(
    expert_bytes=9_400_000,
    shares=(0.25, 0.5, 0.75),
    repeats=15,
    rows=(1, 2, 4, 8, 16, 32, 64),
    tokens=(1, 32, 128, 512),
    warm_up=32,
    timed=64,
    runs=2,
)
QUICK = Size(
    expert_bytes=2_400_000,
    shares=(0.5,),
    repeats=5,
    rows=(1, 4, 16),
    tokens=(1, 32),
    warm_up=4,
    timed=8,
    runs=1,
)
PROMPT = {True: 32, False: 128}


def seconds(action: Callable[[], object], repeats: int) -> float:
    """Return the median over repeats, after one that does not count."""
    action()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return median(taken)


class Reading:
    """Absent experts of a model, copied into its slots over its own link, and nothing computed."""

    TOGETHER = 8

    def __init__(self, folder: Path) -> None:
        self._model = load(folder, {"slots": 0.25, "predictor": "none"})
        self._layers = [self._model.get_submodule(path)._promoe for path in find_experts_of(self._model)]
        self._rng = random.Random(0)
        self._turn = 0
        self.moved = 0

    def read(self, experts: int = TOGETHER) -> None:
        """Ask for so many absent experts of a layer at once, and wait for all of them."""
        self._turn += 1
        layer = self._layers[self._turn % len(self._layers)]
        core, link, ready = layer.core, layer.link, layer.table.ready()
        keys = self._rng.sample([key for key in layer.keys if key not in ready], experts)
        before = link.bytes_moved
        for transfer in link.tell(lambda: [core.ask(key, Part.WHOLE) for key in keys]):
            link.wait([transfer])
            layer.place([transfer.key])
        link.tell(lambda: core.release(keys))
        self.moved += link.bytes_moved - before

    def wire(self, repeats: int) -> Wire:
        """Return bandwidth and latency: what several experts take, and what one takes more."""
        alone = seconds(lambda: self.read(1), 4 * repeats)
        together = seconds(self.read, repeats) / self.TOGETHER
        nbytes = self._layers[0].model.store.specs[0].nbytes
        return Wire(bandwidth=nbytes / together, latency=max(alone - together, 0.0))

    def rate(self, action: Callable[[], R]) -> tuple[R, float]:
        """Return what an action does while experts are read all the time, and the bytes per second read meanwhile."""
        over = threading.Event()

        def keep_reading() -> None:
            while not over.is_set():
                self.read()

        reader = threading.Thread(target=keep_reading)
        reader.start()
        began, before = time.perf_counter(), self.moved
        try:
            found = action()
            return found, (self.moved - before) / (time.perf_counter() - began)
        finally:
            over.set()
            reader.join()


class Resident:
    """The model with every expert in a slot."""

    def __init__(self, folder: Path) -> None:
        self.model = load(folder, {"slots": 1.0})

    @torch.no_grad()
    def seconds(self, tokens: int, repeats: int) -> float:
        """Return what a pass of so many tokens takes."""
        ids = torch.tensor(prompts(MODEL, 1, tokens))
        return seconds(lambda: self.model(ids), repeats)


class Moment(NamedTuple):
    """How fast the machine is at the moment, for passes of so many tokens: one that is shared is not the same for long.

    step: seconds of such a pass, resident. slowed, link_slowed: how much longer it takes while experts are read, and
    they meanwhile.
    """

    tokens: int
    wire: Wire
    step: float
    slowed: float
    link_slowed: float


def look(resident: Resident, reading: Reading, repeats: int, tokens: int) -> Moment:
    passes = repeats if tokens == 1 else max(repeats // 5, 2)
    step, wire = resident.seconds(tokens, passes), reading.wire(repeats)
    _, idle = reading.rate(lambda: time.sleep(0.5))
    streaming, beside = reading.rate(lambda: resident.seconds(tokens, passes))
    return Moment(
        tokens=tokens,
        wire=wire,
        step=step,
        slowed=max(streaming / step, 1.0),
        link_slowed=max(idle / max(beside, 1.0), 1.0),
    )


def measure_costs(folder: Path, size: Size, resident: Resident) -> Measured:
    """Return what computing takes, but for predictions."""
    found = measure_resident(size, resident)
    partial = measure_decisions(folder, size.repeats)
    calls = Curve(sizes=found.calls.sizes, seconds=tuple(beside + partial for beside in found.calls.seconds))
    return replace(found, calls=calls)


def measure_resident(size: Size, resident: Resident) -> Measured:
    """Return the same where all experts are in slots."""
    model = resident.model
    layers = [model.get_submodule(path)._promoe for path in find_experts_of(model)]
    E, A, D = layers[0].experts, model.config.num_experts_per_tok, model.config.hidden_size
    dtype = next(model.parameters()).dtype
    calls = Calls(layers, E, A, D, dtype)
    with torch.no_grad():
        up, down = zip(*(calls.products(rows, size.repeats) for rows in size.rows), strict=True)
        wave = calls.another_wave(size.repeats)
        costs = Measured(
            dense=Curve(sizes=(1,), seconds=(0.0,)),
            calls=Curve(sizes=(1,), seconds=(0.0,)),
            up=Curve(sizes=size.rows, seconds=tuple(max(t - wave, 0.0) for t in up)),
            down=Curve(sizes=size.rows, seconds=tuple(max(t - wave, 0.0) for t in down)),
            wave=wave,
            asking=0.0,
            heads=0.0,
        )
        call = tuple(calls.beside(tokens, costs, size.repeats) for tokens in size.tokens)
        alone = [resident.seconds(tokens, size.repeats) for tokens in size.tokens]
    experts = tuple(beside + calls.expected(tokens, costs) for tokens, beside in zip(size.tokens, call, strict=True))
    dense = tuple(max(taken / len(layers) - mine, 0.0) for taken, mine in zip(alone, experts, strict=True))
    return Measured(
        dense=Curve(sizes=size.tokens, seconds=dense),
        calls=Curve(sizes=size.tokens, seconds=call),
        up=costs.up,
        down=costs.down,
        wave=wave,
        asking=0.0,
        heads=0.0,  # part of what is resident, and so of `dense`
    )


def load(folder: Path, options: Mapping[str, Any]) -> Any:
    """Return the model in slots, read past the page cache."""
    return promoe_triton.from_pretrained(str(folder), io="direct", **options)


def find_experts_of(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "_promoe")]


class Calls:
    """Calls of single layers, each time of another one, so that no expert is in a processor's cache."""

    def __init__(self, layers: Sequence[Any], E: int, A: int, D: int, dtype: torch.dtype) -> None:
        self._layers, self._E, self._A, self._D, self._dtype = layers, E, A, D, dtype
        self._turn = 0
        self._rng = torch.Generator().manual_seed(0)

    def _next(self) -> Any:
        self._turn += 1
        return self._layers[self._turn % len(self._layers)]

    def _call(self, rows: int) -> tuple[Any, Any, list[int]]:
        """Begin a call in which A experts have so many rows each."""
        layer = self._next()
        experts = torch.randperm(self._E, generator=self._rng)[: self._A]
        x_TD = torch.randn(rows, self._D, generator=self._rng).to(self._dtype)
        ids_TA = experts.expand(rows, self._A).contiguous()
        call = layer.kernels.begin(x_TD, ids_TA, torch.full(ids_TA.shape, 0.1).to(self._dtype))
        return layer.kernels, call, experts.tolist()

    def products(self, rows: int, repeats: int) -> tuple[float, float]:
        """Return seconds of one expert's up and down product with so many rows, in a wave of A."""
        up, down = [], []
        for _ in range(repeats):
            kernels, call, experts = self._call(rows)
            began = time.perf_counter()
            kernels.up(call, experts)
            middle = time.perf_counter()
            kernels.activate(call)
            third = time.perf_counter()
            kernels.down(call, experts)
            up.append((middle - began) / len(experts))
            down.append((time.perf_counter() - third) / len(experts))
        return median(up), median(down)

    def another_wave(self, repeats: int) -> float:
        """Return what it costs to compute experts one by one instead of at once, each."""
        apart, at_once = [], []
        for _ in range(4 * repeats):
            kernels, call, experts = self._call(1)
            began = time.perf_counter()
            kernels.up(call, experts)
            at_once.append(time.perf_counter() - began)
            kernels, call, experts = self._call(1)
            began = time.perf_counter()
            for expert in experts:
                kernels.up(call, [expert])
            apart.append(time.perf_counter() - began)
        return max((median(apart) - median(at_once)) / (self._A - 1), 0.0)

    def _random(self, tokens: int) -> torch.Tensor:
        return torch.stack([torch.randperm(self._E, generator=self._rng)[: self._A] for _ in range(tokens)])

    def expected(self, tokens: int, costs: Measured) -> float:
        """Return what the products of so many tokens take, whose experts are drawn by chance."""
        counts = self._random(tokens).unique(return_counts=True)[1].tolist()
        return sum(costs.product(0, part, counts) for part in (Part.UP, Part.DOWN))

    def beside(self, tokens: int, costs: Measured, repeats: int) -> float:
        """Return what a call of so many tokens takes beside its products."""
        taken = []
        for _ in range(repeats):
            layer, ids_TA = self._next(), self._random(tokens)
            x_TD = torch.randn(tokens, self._D, generator=self._rng).to(self._dtype)
            weights_TA = torch.full(ids_TA.shape, 0.1).to(self._dtype)
            counts = ids_TA.unique(return_counts=True)[1].tolist()
            began = time.perf_counter()
            layer.run(x_TD, ids_TA, weights_TA, True)
            whole = time.perf_counter() - began
            taken.append(whole - sum(costs.product(0, part, counts) for part in (Part.UP, Part.DOWN)))
        return max(median(taken), 0.0)


def measure_decisions(folder: Path, repeats: int) -> float:
    """Return what decisions and locks add to a call that finds its experts in slots, where not all are."""
    model = load(folder, {"slots": 0.5})
    name = find_experts_of(model)[2]
    layer, A = model.get_submodule(name)._promoe, model.config.num_experts_per_tok
    ready = [key.expert for key in layer.table.ready()][:A]
    x_TD = torch.randn(1, model.config.hidden_size).to(next(model.parameters()).dtype)
    ids_TA = torch.tensor([ready])
    weights_TA = torch.full((1, A), 0.1).to(x_TD.dtype)
    layer.model.prefetcher = None
    with torch.no_grad():
        slots = seconds(lambda: layer.run(x_TD, ids_TA, weights_TA, True), 8 * repeats)
        call = layer.kernels.begin(x_TD, ids_TA, weights_TA)

        def resident() -> None:
            layer.kernels.up(call, ready)
            layer.kernels.activate(call)
            layer.kernels.down(call, ready)
            layer.kernels.combine(call)

        settled = seconds(resident, 8 * repeats)
    return max(slots - settled, 0.0)


class Logged:
    """A predictor, and what it said: for which pass and layer, from how many layers before. Passes count from 0."""

    def __init__(self, predictor: Any) -> None:
        self._predictor = predictor
        self._pass = -1
        self.shown: list[Observation] = []
        self.said: dict[tuple[int, int, int], list[int]] = {}

    def predict(self, seen: Observation) -> Sequence[Any]:
        found: Sequence[Any] = self._predictor.predict(seen)
        if seen.seam is Seam.ROUTED and seen.tokens == 1:
            self.shown.append(replace(seen, state_TD=None if seen.state_TD is None else seen.state_TD.clone()))
        self._pass += seen.seam is Seam.ROUTED and seen.layer == 0
        # What is seen before the first layer's attention is left out: the simulator has no such seam.
        for prediction in found if seen.seam is not Seam.ENTERED else ():
            ahead = prediction.layer + 1 if prediction.steps else prediction.layer - seen.layer
            place = (self._pass + prediction.steps, prediction.layer, ahead)
            self.said[place] = prediction.expert_ids.tolist()
        return found


def record_text(folder: Path, ids: Sequence[int], prompt: int, distance: int) -> tuple[Routed, float]:
    """Return how a text is routed and what the default predictor says of it, and what a prediction alone takes."""
    recorder = RoutingRecorder(len(ids))
    model = load(folder, {"slots": 0.9, "predictor": recorder, "always_predict": True})
    run_text(model, ids, prompt)
    layers = range(len(find_experts_of(model)))
    found = [np.concatenate([one[i] for one in recorder.recording]).astype(np.int16) for i in layers]
    del model
    gc.collect()
    model = load(folder, {"slots": 0.5, "always_predict": True})
    prefetcher = model.get_submodule(find_experts_of(model)[0])._promoe.model.prefetcher
    logged = Logged(prefetcher._predictor)
    prefetcher._predictor = logged
    run_text(model, ids, prompt)
    named = [[np.full_like(one, -1) for one in found] for _ in range(distance)]
    for (number, layer, ahead), experts in logged.said.items():
        row = prompt - 1 + number  # pass 0 is the prompt
        if prompt <= row < len(ids) and 0 < ahead <= distance:
            named[ahead - 1][layer][row, : len(experts)] = experts[: found[layer].shape[1]]
    return Routed(ids=found, named=named), asking_alone(logged._predictor, logged.shown)


def asking_alone(predictor: Any, shown: Sequence[Observation]) -> float:
    """Return the seconds of a prediction, with as much read before it as a layer reads of its experts."""
    between, taken = torch.ones(64 << 20, dtype=torch.uint8), []
    for seen in shown[-200:]:
        between.add_(1)
        began = time.perf_counter()
        predictor.predict(seen)
        taken.append(time.perf_counter() - began)
    return median(taken) if taken else 0.0


@torch.inference_mode()
def run_text(model: Any, ids: Sequence[int], prompt: int) -> None:
    whole = torch.tensor([ids])
    cache = model(whole[:, :prompt], use_cache=True).past_key_values
    for token in range(prompt, len(ids)):
        cache = model(whole[:, token : token + 1], past_key_values=cache, use_cache=True).past_key_values


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What the simulator is told of this machine and this model, and nothing else."""

    shape: ModelShape
    costs: Measured
    steps: Mapping[int, float]

    def simulator(self, now: Moment, options: Mapping[str, Any]) -> Simulator:
        """Return a simulator of the machine as it is now.

        steps: what resident passes took when costs were measured, by their tokens.
        """
        config = Config(**{"latency": DISK_LATENCY, **options})
        costs = paced(self.costs, now.step / self.steps[now.tokens])
        return Simulator(self.shape, costs, now.wire, config, slowed=now.slowed, link_slowed=now.link_slowed)


def paced(costs: Measured, factor: float) -> Measured:
    """Return costs of a machine that takes so many times as long."""

    def of(value: Any) -> Any:
        if isinstance(value, Curve):
            return replace(value, seconds=tuple(taken * factor for taken in value.seconds))
        return value * factor

    return replace(costs, **{field.name: of(getattr(costs, field.name)) for field in fields(costs)})


def simulated(simulator: Simulator, parts: Iterator[Pass], warm_up: int) -> float:
    """Return seconds per pass, after `warm_up` passes."""
    all_parts = [*parts]
    simulator.run(all_parts[:warm_up])
    simulator.reset()
    outcome = simulator.run(all_parts[warm_up:])
    return outcome.seconds / (len(all_parts) - warm_up)


def compare(folder: Path, results: record.Results, size: Size, quick: bool) -> None:
    config = Config()
    results.begin()
    resident, reading = Resident(folder), Reading(folder)
    costs = measure_costs(folder, size, resident)
    length, prompt = size.warm_up + size.timed, PROMPT[quick]
    moments = [look(resident, reading, size.repeats, tokens) for tokens in (1, prompt)]
    now, filling = moments
    text, later = prompts(MODEL, 2, max(length, prompt))
    decoded, asking = record_text(folder, text[:length], 1, config.distance)
    costs = replace(costs, asking=asking)
    bits = 8.0 * AutoConfig.from_pretrained(folder).dtype.itemsize
    machine = Calibration(
        shape=model_shape(str(folder), bits=bits), costs=costs, steps={m.tokens: m.step for m in moments}
    )
    results.write(
        [
            record.row("calibration", "link", "bandwidth", "GB/s", [now.wire.bandwidth / 1e9]),
            record.row("calibration", "link", "latency", "ms", [now.wire.latency * 1e3], better="lower"),
            record.row("calibration", "computing", "while experts are read", "x", [now.slowed], better="lower"),
            record.row("calibration", "link", "while something is computed", "x", [now.link_slowed], better="lower"),
            record.row("calibration", "computing a prompt", "while experts are read", "x", [filling.slowed]),
            record.row("calibration", "link", "while a prompt is computed", "x", [filling.link_slowed]),
            record.row("calibration", "layer", "beside experts", "ms", [costs.dense.at(1) * 1e3], better="lower"),
            record.row("calibration", "layer", "beside products", "ms", [costs.calls.at(1) * 1e3], better="lower"),
            record.row("calibration", "expert", "products, 1 row", "ms", [1e3 * (costs.up.at(1) + costs.down.at(1))]),
            record.row("calibration", "prediction", "time", "ms", [costs.asking * 1e3], better="lower"),
        ]
    )
    read = [record_text(folder, ids[:prompt] + [0], prompt, config.distance)[0] for ids in (text, later)]
    prefills = [next(passes([one], prompt=prompt)) for one in read]
    for share in size.shares:
        for name, case in CASES.items():
            options = {"slots": round(sizes(folder).experts * share)} | case
            results.begin()
            found: dict[str, list[tuple[float, float]]] = {"TPOT": [], "TTFT": []}
            for _ in range(size.runs):
                now = look(resident, reading, size.repeats, 1)
                step = decode(OnDisk(folder), options, [text[:length]], size.warm_up).per_step
                ours = simulated(machine.simulator(now, options), passes([decoded], prompt=1), size.warm_up)
                found["TPOT"].append((step, ours))
                now = look(resident, reading, size.repeats, prompt)
                _, warm = prefill(OnDisk(folder), options, text[:prompt], later[:prompt])
                ours = simulated(machine.simulator(now, options), iter(prefills), 1)
                found["TTFT"].append((warm.seconds, ours))
            rows, of = [], f"{share:.1%} in slots, {name}"
            for metric, pairs in found.items():
                real, simulated_ms = ([1e3 * one for one in side] for side in zip(*pairs, strict=True))
                error = [abs(ours / theirs - 1.0) for theirs, ours in pairs]
                rows += [
                    record.row(of, "real", metric, "ms", real, better="lower"),
                    record.row(of, "simulated", metric, "ms", simulated_ms, better="lower"),
                    record.row(of, "deviation", metric, "share", error, target=GOAL, better="lower"),
                ]
            results.write(rows)


def draw(folder: Path) -> None:
    """Draw simulated against real times with their spread over runs, and the goal as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {(row.case, row.variant, row.metric): row for row in record.latest(folder / "trust.csv")}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.8), constrained_layout=True)
    for axis, metric in zip(axes, ("TPOT", "TTFT"), strict=True):
        cases = [case for case, variant, of in rows if (variant, of) == ("real", metric)]
        for marker, name in zip("osv^", CASES, strict=True):
            mine = [case for case in cases if case.endswith(f", {name}")]
            sides = [[rows[case, side, metric] for case in mine] for side in ("real", "simulated")]
            spreads = [([r.p50 - r.p20 for r in side], [r.p80 - r.p50 for r in side]) for side in sides]
            middles = [[r.p50 for r in side] for side in sides]
            axis.errorbar(*middles, spreads[1], spreads[0], fmt=marker, lw=0.8, ms=5, label=name)
        times = [rows[case, "real", metric].p50 for case in cases]
        ends = np.array([0.8 * min(times), 1.2 * max(times)])
        axis.plot(ends, ends, color="#a0aec0", lw=0.8)
        axis.fill_between(ends, (1 - GOAL) * ends, (1 + GOAL) * ends, color="#a0aec0", alpha=0.25, label="within 15 %")
        axis.set(xlabel=f"{metric} measured, ms", ylabel=f"{metric} simulated, ms", title=metric)
        axis.legend(fontsize=8)
    figure.suptitle("The simulator against this machine, calibrated from micro-measurements only")
    figure.savefig(folder / "trust.png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = record.arguments(__doc__ or "")
    parser.add_argument("--scratch", type=Path, help="folder for 5 GB of checkpoint (default: a temporary one)")
    parser.add_argument("--dtype", help="of the weights: float32 on a machine whose products in bf16 crawl")
    args = parser.parse_args()
    record.confine()
    size = QUICK if args.quick else FULL
    results = record.results(args, "trust")
    if not results.has("calibration"):
        results.path.unlink(missing_ok=True)
        label = "a checkpoint with large experts"
        with large_checkpoint(MODEL, args.scratch, size.expert_bytes, label, args.dtype) as folder:
            compare(folder, results, size, args.quick)
    draw(record.folder(args))


if __name__ == "__main__":
    main()
