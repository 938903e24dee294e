"""The simulator: laws that any machine keeps, the runtime's own decisions, statistics that are met, and bad input."""

from __future__ import annotations

import csv
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import promoe_triton
from promoe_triton.cli.commands import app
from promoe_triton.config import Config
from promoe_triton.errors import PromoeError
from promoe_triton.links.fake import Wire
from promoe_triton.policies import POLICIES
from promoe_triton.predictors.bounds import RoutingRecorder
from promoe_triton.protocols import Part, round_up
from promoe_triton.simulation.costs import Curve, Roofline
from promoe_triton.simulation.description import FOLDER, hardware_names, read_hardware, read_software
from promoe_triton.simulation.routing import Routed, Statistics, Synthetic, passes, popularity_of
from promoe_triton.simulation.shapes import MODELS, LayerShape, ModelShape, model_shape
from promoe_triton.simulation.simulator import Outcome, Simulator
from promoe_triton.simulation.sweep import Choice, Scene, combinations, memory_needed, simulate, traced_texts
from promoe_triton.techniques import ABLATION
from promoe_triton.traces import TracedLayer, TraceWriter, read_trace

DEMO = Path(promoe_triton.__file__).parent / "demo" / "model"
WEIGHTS = 1 << 21
MACHINE = read_hardware("rtx4090")
LOOP = read_software("loop")


def shape(layers: int = 3, experts: int = 8, active: int = 2, weights: int = WEIGHTS) -> ModelShape:
    layer = LayerShape(experts=experts, active=active, up_weights=2 * weights, down_weights=weights)
    return ModelShape(
        name="tiny",
        layers=(layer,) * layers,
        decoder_layers=layers,
        dense_weights=weights,
        head_weights=weights,
        kv_weights=64,
        attention_width=64,
        bits=16.0,
        dense_bits=16.0,
    )


def texts(
    of: ModelShape, seed: int, tokens: int = 40, count: int = 1, accuracy: tuple[float, ...] = (0.8, 0.7)
) -> list[Routed]:
    rng = np.random.default_rng(seed)
    E, A = of.layers[0].experts, of.layers[0].active
    found = []
    for _ in range(count):
        scores = rng.standard_normal((len(of.layers), tokens, E)).cumsum(1)
        ids = [np.argsort(-one, axis=1)[:, :A].astype(np.int16) for one in scores]
        named = [
            [np.where(rng.random(i.shape) < share, i, rng.integers(0, E, i.shape)).astype(np.int16) for i in ids]
            for share in accuracy
        ]
        found.append(Routed(ids=ids, named=named))
    return found


def make(of: ModelShape, bandwidth: float = 1e9, asking: float = 0.0, **options: Any) -> Simulator:
    """asking: what a prediction costs, of what it does; 0: nothing, so that none can be too dear."""
    options = {"chunk": "1MiB", "slots": len(of.layers) * 4} | options
    return Simulator(
        of,
        Roofline(MACHINE, replace(LOOP, predict=asking * LOOP.predict), of),
        Wire(bandwidth=bandwidth, latency=1e-5),
        Config(**options),
    )


def run(of: ModelShape, found: list[Routed], prompt: int = 1, bandwidth: float = 1e9, **options: Any) -> Outcome:
    return make(of, bandwidth, **options).run(passes(found, prompt=prompt))


class Even:
    """Costs of a machine that takes time for bytes of experts' weights and for attention, and none otherwise."""

    def __init__(self, of: ModelShape, seconds: float, attention: float = 0.0) -> None:
        self._seconds = {part: of.expert_bytes(0, part) * seconds for part in (Part.UP, Part.DOWN)}
        self._attention = attention
        self.waves: list[int] = []

    def layer(self, tokens: int, context: int, texts: int) -> float:
        return self._attention

    def call(self, tokens: int, settled: bool) -> float:
        return 0.0

    def product(self, layer: int, part: Part, rows: Sequence[int]) -> float:
        self.waves.append(len(rows))
        return self._seconds[part] * len(rows)

    def predict(self, tokens: int) -> float:
        return 0.0

    def head(self, tokens: int) -> float:
        return 0.0


sizes = st.tuples(st.integers(1, 4), st.integers(4, 12), st.integers(1, 4))
steps = st.sampled_from(sorted(ABLATION))
laws = settings(max_examples=25, deadline=None, derandomize=True)
batches = st.sampled_from([1, 3])
choices = st.fixed_dictionaries(
    {
        "ablation": steps,
        "slots": st.integers(1, 36),  # of all layers: few are one pool
        "chunking": st.sampled_from(["adaptive", "fixed", "tensor", "expert"]),
        "policy": st.sampled_from(["auto", *POLICIES]),
    }
)


@settings(laws, max_examples=50)
@given(size=sizes, seed=st.integers(0, 99), choice=choices, prompt=st.integers(1, 12), batch=batches)
def test_time_never_decreases_and_every_access_is_counted(
    size: tuple[int, int, int], seed: int, choice: dict[str, Any], prompt: int, batch: int
) -> None:
    of = shape(*size)
    found = texts(of, seed, count=batch)
    simulator = make(of, **choice)
    before, accesses = simulator.link.now(), 0
    for one in passes(found, prompt=prompt, batch=batch):
        outcome = simulator.run([one])
        now = simulator.link.now()
        assert now >= before
        before = now
        accesses += sum(len(one.rows(layer)) for layer in range(len(of.layers)))
    assert outcome.hits + outcome.misses == accesses
    assert outcome.seconds >= outcome.stall_seconds + outcome.computing_seconds - 1e-9
    simulator.link.pass_time(1e3)
    for table in {*simulator.core.tables}:
        table.check_integrity()
        assert table.available() == len(table), "every lease was given back"


@settings(laws, max_examples=50)
@given(size=sizes, seed=st.integers(0, 99), choice=choices, prompt=st.integers(1, 12), batch=batches)
def test_bytes_are_conserved(
    size: tuple[int, int, int], seed: int, choice: dict[str, Any], prompt: int, batch: int
) -> None:
    of = shape(*size)
    simulator = make(of, **choice)
    simulator.run(passes(texts(of, seed, count=batch), prompt=prompt, batch=batch))
    simulator.link.pass_time(1e3)
    outcome = simulator.run(())
    needed = (outcome.misses + outcome.on_time) * of.expert_bytes(0)
    fewest = choice["slots"] if simulator.shared else min(len(table) for table in simulator.core.tables)
    if choice["ablation"] == "layer":
        assert outcome.bytes_moved >= needed, "experts that nobody asked for are copied as well"
    elif fewest >= min(size[1], size[2] * batch * prompt):
        assert outcome.bytes_moved == needed + outcome.bytes_wasted + outcome.bytes_unproven
    else:
        # An expert that passes through its slots in halves is copied anew, whatever of it had come ahead of need.
        again = outcome.bytes_moved - needed - outcome.bytes_wasted - outcome.bytes_unproven
        assert 0 <= again <= outcome.bytes_ahead


@laws
@given(size=sizes, seed=st.integers(0, 99), step=st.sampled_from(["lru", "preemption", "reorder"]))
def test_more_slots_never_mean_more_misses_for_lru(size: tuple[int, int, int], seed: int, step: str) -> None:
    of = shape(*size)
    A, E, L = of.layers[0].active, of.layers[0].experts, len(of.layers)
    misses = [run(of, texts(of, seed), slots=L * S, ablation=step).misses for S in range(A, E + 1)]
    assert misses == sorted(misses, reverse=True)


larger = st.tuples(st.integers(3, 5), st.sampled_from([6, 8, 12]), st.integers(1, 3))
prompts = st.sampled_from([1, 6, 40])


@pytest.mark.parametrize(
    ("always", "asking"), [(False, 0.0), (True, 0.0), (True, 1.0)], ids=["on trial", "always", "always, at its price"]
)
@settings(laws)
@given(size=larger, seed=st.integers(0, 99), slots=st.integers(2, 8), step=steps, prompt=prompts, batch=batches)
def test_more_bandwidth_is_never_slower(
    always: bool, asking: float, size: tuple[int, int, int], seed: int, slots: int, step: str, prompt: int, batch: int
) -> None:
    of = shape(*size)
    found = texts(of, seed, tokens=60, count=batch)
    common: dict[str, Any] = {"slots": slots * len(of.layers), "ablation": step, "always_predict": always}
    taken = [
        make(of, rate, asking=asking, **common).run(passes(found, prompt=prompt, batch=batch)).seconds
        for rate in (5e8, 1e9, 4e9, 32e9)
    ]
    assert all(after <= 1.02 * before for before, after in pairwise(taken)), taken


@laws
@given(
    size=larger,
    seed=st.integers(0, 99),
    slots=st.integers(2, 8),
    rate=st.sampled_from([1e9, 4e9, 32e9]),
    prompt=prompts,
)
def test_a_perfect_predictor_is_never_slower_than_none(
    size: tuple[int, int, int], seed: int, slots: int, rate: float, prompt: int
) -> None:
    """Where predictions cost nothing."""
    of = shape(*size)
    found, count = texts(of, seed, tokens=60), slots * len(of.layers)
    perfect = run(of, [text.truth for text in found], prompt, rate, slots=count)
    none = run(of, found, prompt, rate, slots=count, predictor="none")
    assert perfect.seconds <= 1.02 * none.seconds
    assert perfect.accuracy > 0.8 or perfect.on_time + perfect.late == 0


def test_a_perfect_predictor_at_its_price_is_hardly_slower_than_none() -> None:
    """It has to be tried, and where there is nothing to win, a few passes are slower for it.

    What is compared is few passes, so that 2 % at most is no law: of 120 models drawn like these two took 2.3 and 2.9 %
    longer.
    """
    rng, ratios = random.Random(0), []
    for _ in range(24):
        of = shape(rng.randint(3, 5), rng.choice([6, 8, 12]), rng.randint(1, 3))
        found, common = texts(of, rng.randint(0, 99), tokens=300), {"slots": rng.randint(2, 8) * len(of.layers)}
        rate = rng.choice([1e9, 4e9, 32e9])
        perfect = run(of, [text.truth for text in found], 1, rate, asking=1.0, **common)
        ratios.append(perfect.seconds / run(of, found, 1, rate, predictor="none", **common).seconds)
    assert fmean(ratios) <= 1.0
    assert sorted(ratios)[-2] <= 1.02
    assert max(ratios) <= 1.04


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.randint(2048, (1, 24), generator=torch.Generator().manual_seed(3))


def decode(text: torch.Tensor, **options: Any) -> Any:
    """Return the demo model after a prompt of 8 tokens and 16 decode steps, from slots that were empty."""
    model = promoe_triton.from_pretrained(str(DEMO), warm=False, **options)
    with torch.inference_mode():
        cache = model(text[:, :8], use_cache=True).past_key_values
        for token in range(8, 24):
            cache = model(text[:, token : token + 1], past_key_values=cache, use_cache=True).past_key_values
    return model


@pytest.fixture(scope="module")
def routed(text: torch.Tensor) -> Routed:
    recorder = RoutingRecorder(100)
    decode(text, slots=0.9, predictor=recorder, always_predict=True)
    ids = [np.concatenate([one[layer] for one in recorder.recording]).astype(np.int16) for layer in range(8)]
    return Routed(ids=ids)


@pytest.mark.parametrize("step", ["lru", "preemption", "all"])
@pytest.mark.parametrize("slots", [0.5, 0.125])
def test_it_decides_as_the_runtime_does(slots: float, step: str, text: torch.Tensor, routed: Routed) -> None:
    """The demo model decodes a text; the simulator is given its routing, and hits and misses as often."""
    options: dict[str, Any] = {"slots": slots, "predictor": "none", "ablation": step}
    model = decode(text, **options)
    stats = promoe_triton.stats(model)
    of = model_shape(str(DEMO))
    outcome = run(of, [routed], prompt=8, warm=False, **options)
    assert (outcome.hits, outcome.misses) == (stats.hits, stats.misses)
    assert outcome.hits + outcome.misses > 900


@pytest.mark.parametrize(
    "wanted", [Statistics(popularity=0.3, reuse=0.5), Statistics(popularity=0.6, reuse=0.4)], ids=["flat", "skewed"]
)
def test_made_up_routing_has_the_statistics_asked_for(wanted: Statistics) -> None:
    found = Synthetic(wanted, [(64, 6)] * 3).text(3000)
    shares, same, right = [], [], []
    for layer, ids_TA in enumerate(found.ids):
        counts = np.sort(np.bincount(ids_TA.ravel(), minlength=64))[::-1]
        shares.append(counts[:16].sum() / counts.sum())
        same += [len({*a} & {*b}) / 6 for a, b in zip(ids_TA.tolist(), ids_TA[1:].tolist(), strict=False)]
        right.append(
            [
                np.mean([len({*a} & {*b}) / 6 for a, b in zip(ids_TA.tolist(), h[layer].tolist(), strict=True)])
                for h in found.named
            ]
        )
    # A text is short: by chance some experts come more often in it.
    assert np.mean(shares) == pytest.approx(wanted.popularity, abs=0.05)
    assert np.mean(same) == pytest.approx(wanted.reuse, abs=0.03)
    assert np.mean(right, 0) == pytest.approx(wanted.accuracy, abs=0.02)


@pytest.mark.parametrize(
    ("name", "megabytes", "gigabytes"),
    [
        ("mixtral-8x7b", 352, 90.2),
        ("qwen2-57b-a14b", 55.1, 98.7),
        ("deepseek-moe-16b", 17.3, 29.9),
        ("deepseek-v2-lite", 17.3, 28.8),
        ("qwen1.5-moe-a2.7b", 17.3, 24.9),
        ("olmoe-1b-7b", 12.6, 12.9),
        ("qwen3-30b-a3b", 9.4, 58.0),
    ],
)
def test_shapes_have_the_published_sizes(name: str, megabytes: float, gigabytes: float) -> None:
    of = model_shape(str(MODELS / f"{name}.json"))
    assert of.expert_bytes(0) / 1e6 == pytest.approx(megabytes, rel=0.01)
    assert of.all_expert_bytes / 1e9 == pytest.approx(gigabytes, rel=0.01)
    assert of.expert_bytes(0, Part.UP) == 2 * of.expert_bytes(0, Part.DOWN)


def test_fewer_bits_are_fewer_bytes_and_a_text_side_by_side_is_a_row_more() -> None:
    of = shape()
    assert replace(of, bits=4.0).expert_bytes(0) * 4 == of.expert_bytes(0)
    two = [*passes(texts(of, 1, tokens=5, count=2), prompt=2, batch=2)]
    assert [(one.prefill, one.tokens, one.context) for one in two] == [
        (True, 4, 0),
        (False, 2, 2),
        (False, 2, 3),
        (False, 2, 4),
    ]
    assert sum(two[1].rows(0).values()) == 4
    assert [one.texts for one in two] == [2, 2, 2, 2]


def test_decisions_and_copies_cost_the_host_where_experts_are_absent() -> None:
    of, more = shape(), 100.0
    found = texts(of, 0)
    taken = {}
    for slots, absent in itertools.product((12, 24), (0.0, more)):
        costs = Roofline(MACHINE, replace(LOOP, absent=absent), of)
        simulator = Simulator(of, costs, Wire(bandwidth=1e9, latency=0.0), Config(slots=slots, predictor="none"))
        taken[slots, absent] = simulator.run(passes(found, prompt=1)).computing_seconds
    assert taken[24, more] == taken[24, 0.0], "all are in slots"
    layers = len(of.layers) * len(found[0])
    assert taken[12, more] - taken[12, 0.0] == pytest.approx(layers * more * MACHINE.launch_seconds)


@pytest.mark.parametrize(("tokens", "context"), [(1, 500), (64, 0), (16, 300)])
def test_a_text_side_by_side_has_attention_and_a_cache_of_its_own(tokens: int, context: int) -> None:
    """With nothing but those: the same again for every text, be it in bytes or in operations."""
    for limit in ("memory_bandwidth", "matmul_flops"):
        machine = replace(MACHINE, launch_seconds=1e-30, **{limit: 1.0})
        costs = Roofline(machine, LOOP, replace(shape(), dense_weights=0))
        one, three = costs.layer(tokens, context, 1), costs.layer(3 * tokens, context, 3)
        assert one > 1.0
        assert three == pytest.approx(3 * one)


def test_a_curve_is_straight_between_its_points_and_goes_on_beyond() -> None:
    curve = Curve(sizes=(1, 3, 5), seconds=(1.0, 2.0, 4.0))
    assert [curve.at(size) for size in (1, 2, 4, 6)] == [1.0, 1.5, 3.0, 5.0]
    with pytest.raises(ValueError, match="its sizes rise"):
        Curve(sizes=(2, 1), seconds=(1.0, 1.0))


# Bad input


@pytest.mark.parametrize("name", hardware_names())
def test_packaged_hardware_can_be_read(name: str) -> None:
    assert read_hardware(name).link_bandwidth < read_hardware(name).memory_bandwidth


def broken(tmp_path: Path, **cells: Any) -> str:
    """Write the RTX 4090 with other cells; None takes one out."""
    found = {**json.loads((FOLDER / "rtx4090.json").read_text()), **cells}
    file = tmp_path / "machine.json"
    file.write_text(json.dumps({name: cell for name, cell in found.items() if cell is not None}))
    return str(file)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        pytest.param({"link_bandwidth": None, "slowed": None}, "lacks link_bandwidth, slowed", id="missing"),
        pytest.param({"pcie": 4}, "has pcie, which nobody reads", id="unknown"),
        pytest.param({"link_bandwidth": "25 GB/s"}, "link_bandwidth should be a float, and is '25 GB/s'", id="text"),
        pytest.param({"memory_bandwidth": 0}, "memory_bandwidth must be positive", id="zero"),
        pytest.param({"sources": {}}, "gives no source of memory_bytes", id="no source"),
    ],
)
def test_hardware_that_is_not_whole_is_refused(tmp_path: Path, cells: dict[str, Any], message: str) -> None:
    with pytest.raises(PromoeError, match=message):
        read_hardware(broken(tmp_path, **cells))


def test_other_bad_input(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(PromoeError, match="one JSON object"):
        read_hardware(str(tmp_path / "list.json"))
    with pytest.raises(PromoeError, match="no hardware 'abacus': expected one of epyc-zen4, h200"):
        read_hardware("abacus")
    with pytest.raises(ValueError, match="software must be one of"):
        read_software("magic")
    with pytest.raises(ValueError, match="slots as a count must be at least 1"):
        run(shape(), texts(shape(), 0), slots=0)
    scene = Scene(shape=shape(), hardware=MACHINE, software=LOOP, texts=texts(shape(), 0, count=2))
    with pytest.raises(ValueError, match="predictor must be one of stated, perfect, none"):
        simulate(scene, Choice(predictor="gate"))
    with pytest.raises(ValueError, match="none to decode after a prompt of 40"):
        list(passes(texts(shape(), 0), prompt=40))
    with pytest.raises(ValueError, match="popularity must be in"):
        Statistics(popularity=0.1)
    with pytest.raises(ValueError, match="bits must be in"):
        Choice(bits=0)


def write_trace(folder: Path, of: ModelShape, documents: int = 2, tokens: int = 20) -> Path:
    E, A = of.layers[0].experts, of.layers[0].active
    layers = [TracedLayer(path=f"{i}", experts=E, active=A, hidden=4) for i in range(len(of.layers))]
    writer = TraceWriter(folder, {"model": "tiny"}, layers, shard_tokens=10**6)
    for number in range(documents):
        ids = torch.stack(
            [torch.randperm(E, generator=torch.Generator().manual_seed(t + number))[:A] for t in range(tokens)]
        )
        whole = torch.arange(tokens, dtype=torch.int32)
        writer.add(
            {"token_ids": whole, "position": whole, "is_prefill": whole < 4}
            | {f"ids.{i}": ids.to(torch.int16) for i in range(len(layers))}
            | {f"weights.{i}": ids.float() for i in range(len(layers))},
            number,
        )
    writer.flush()
    return folder


def test_a_trace_is_simulated_as_it_was_recorded(tmp_path: Path) -> None:
    of = shape()
    trace = read_trace(write_trace(tmp_path, of))
    found = traced_texts(trace, of, Statistics(accuracy=(1.0,)), 20)
    assert [len(text) for text in found] == [20, 20]
    first = next(iter(trace.read()))
    assert found[0].ids[1].tolist() == first.expert_ids_TA(1).tolist() == found[0].named[0][1].tolist()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_wrong_guesses_for_a_trace_are_experts_that_were_not_chosen(share: float, tmp_path: Path) -> None:
    of = shape(experts=5, active=2)
    trace = read_trace(write_trace(tmp_path, of, tokens=600))
    found = traced_texts(trace, of, Statistics(accuracy=(share,)), 600)
    right = []
    for text in found:
        for ids_TA, named_TA in zip(text.ids, text.named[0], strict=True):
            for chosen, named in zip(ids_TA.tolist(), named_TA.tolist(), strict=True):
                assert len({*named}) == 2
                assert all(0 <= expert < 5 for expert in named)
                right.append(len({*named} & {*chosen}) / 2)
    assert np.mean(right) == pytest.approx(share, abs=0.02)


def test_where_all_are_chosen_a_wrong_guess_names_nobody(tmp_path: Path) -> None:
    of = shape(experts=2, active=2)
    found = traced_texts(read_trace(write_trace(tmp_path, of)), of, Statistics(accuracy=(0.5,)), 20)
    named = np.array([text.named[0] for text in found])
    assert 0.3 < np.mean(named == -1) < 0.7
    assert all((one == -1).all() or {*one.tolist()} <= {-1, 0, 1} for one in named.reshape(-1, 2))


@pytest.mark.parametrize(
    ("documents", "tokens", "of", "message"),
    [
        pytest.param(2, 20, shape(experts=9), "a trace of another model", id="another model"),
        pytest.param(2, 21, shape(), "has 0 documents of 21 tokens", id="too short"),
        pytest.param(1, 9, shape(), "has 1 documents of 9 tokens and more, and two are needed", id="one document"),
    ],
)
def test_traces_that_do_not_fit_are_refused(
    documents: int, tokens: int, of: ModelShape, message: str, tmp_path: Path
) -> None:
    trace = read_trace(write_trace(tmp_path, shape(), documents))
    with pytest.raises(PromoeError, match=message):
        traced_texts(trace, of, Statistics(), tokens)


def test_empty_and_truncated_traces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PromoeError, match="holds no trace"):
        read_trace(tmp_path)
    folder = write_trace(tmp_path / "a", shape())
    file = folder / "shard-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(PromoeError, match="cannot be read"):
        traced_texts(read_trace(folder), shape(), Statistics(), 9)
    empty = write_trace(tmp_path / "b", shape(), documents=0)
    result = call("olmoe-1b-7b", "--trace", str(empty))
    assert (result.exit_code, "is empty" in result.stderr) == (1, True)


def test_sweeps() -> None:
    of = shape()
    scene = Scene(shape=of, hardware=replace(MACHINE, link_bandwidth=2e9), software=LOOP, texts=texts(of, 0, count=3))
    found = {
        c: simulate(scene, c)
        for c in combinations(prompt=[4], slots=[0.5], predictor=["none", "perfect"], bits=[16, 4])
    }
    assert [(c.predictor, c.bits) for c in found] == [("none", 16), ("none", 4), ("perfect", 16), ("perfect", 4)]
    none, small, perfect, _ = found.values()
    assert small.bytes_moved < none.bytes_moved
    assert none.bytes_ahead == 0 < perfect.bytes_ahead
    assert perfect.hidden(none) > 0
    assert sum(popularity_of(scene.texts).values()) == 3 * 40 * 2 * 3


def test_what_does_not_fit_the_machine_is_not_simulated() -> None:
    of = shape()
    experts = 3 * 4 * round_up(of.expert_bytes(0))
    others = 3 * WEIGHTS * 2 + 40 * 64 * 2  # of a layer, the head and the embedding, and the cache
    scene = Scene(shape=of, hardware=MACHINE, software=LOOP, texts=texts(of, 0, count=2))
    assert memory_needed(scene, Choice(slots=0.5)) == experts + others
    assert memory_needed(scene, Choice(slots=0.5, batch=3)) == experts + others + 2 * 40 * 64 * 2
    assert memory_needed(scene, Choice(slots=0.25)) == experts // 2 + others
    tight = replace(scene, hardware=replace(MACHINE, memory_bytes=float(experts + others)))
    assert simulate(tight, Choice(slots=0.5, prompt=4)).hits
    with pytest.raises(ValueError, match=r"slots=0\.75 of tiny at 16 bits and a batch of 1 take .*RTX 4090.* has"):
        simulate(tight, Choice(slots=0.75, prompt=4))


def test_the_command_leaves_out_what_does_not_fit() -> None:
    """58 GB of experts in 24 GB."""
    options = ("qwen3-30b-a3b", "--prompt", "4", "--tokens", "2", "--ablation", "lru")
    done = call(*options, "--slots", "0.25,0.5")
    assert "1 of 2 combinations are left out" in " ".join(done.output.split())
    refused = call(*options, "--slots", "0.5")
    assert refused.exit_code == 2
    assert "take 32.1 GB with all other weights" in " ".join(refused.output.split())


def test_the_paper_is_reproduced(tmp_path: Path) -> None:
    """By the command that reproduces it, on one model and a few tokens: all of its parts, and the figure."""
    root = Path(__file__).parents[1]
    command = [sys.executable, root / "bench/paper/run.py", "--quick", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    error, _, table = done.stdout.partition("Mean absolute error of the four columns that were not fitted: ")[
        2
    ].partition("\n")
    assert float(error.rstrip("%")) < 20.0
    assert "| 12.5% | " in table, "the error is printed above the table"
    with (tmp_path / "paper.csv").open() as file:
        rows = [*csv.DictReader(file)]
    fitted = [float(row["p50"]) for row in rows if row["metric"] == "deviation" and row["note"] == "fitted"]
    assert len(fitted) == 5
    assert max(map(abs, fitted)) < 10.0
    (resident,) = [float(row["p50"]) for row in rows if row["case"] == "development, 100.0%"]
    assert 54 <= resident <= 58, "as theirs"
    cases = {row["case"] for row in rows}
    assert {"ablation", "all models", "slots 0.125", "batch 8", "bits 4", "development, 75.0%"} <= cases
    left_out = [row for row in rows if row["note"].startswith("left out")]
    assert [row["case"] for row in left_out] == ["deepseek-moe-16b, 75.0%"]
    assert float(left_out[0]["p50"]) > 24
    assert (tmp_path / "paper.png").exists() is (find_spec("matplotlib") is not None)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["simulate", *arguments])


def test_the_command(tmp_path: Path) -> None:
    short = ("--prompt", "8", "--tokens", "4")
    options = ("olmoe-1b-7b", *short, "--slots", "0.25,0.5", "--out", str(tmp_path / "a.csv"))
    found = json.loads(call(*options, "--json").stdout)
    assert found["hardware"].startswith("RTX 4090")
    assert [(row["slots"], row["ablation"]) for row in found["runs"]] == [
        (s, a) for s in (0.25, 0.5) for a in ("lru", "all")
    ]
    more = ("--batch", "1,2", "--policy", "lru,static", "--chunking", "adaptive,expert", "--always-predict")
    swept = json.loads(call("olmoe-1b-7b", *short, "--slots", "0.25", "--ablation", "all", *more, "--json").stdout)[
        "runs"
    ]
    assert [(row["batch"], row["chunking"], row["policy"]) for row in swept] == [
        (b, c, p) for b in (1, 2) for c in ("adaptive", "expert") for p in ("lru", "static")
    ]
    assert len({row["tpot_seconds"] for row in swept}) == len(swept), "each choice has its effect"
    with (tmp_path / "a.csv").open() as file:
        assert len([*csv.DictReader(file)]) == 4
    assert "TPOT" in call(*options).stdout


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        pytest.param(["--slots", "0"], 2, "slots as a count must be at least 1, got 0", id="zero slots"),
        pytest.param(["--slots", "0.5,0"], 2, "slots as a count must be at least 1, got 0", id="zero slots in a sweep"),
        pytest.param(["--batch", "x"], 2, "--batch takes whole numbers", id="no number"),
        pytest.param(["--bits", "x"], 2, "--bits takes numbers, got 'x'", id="no bits"),
        pytest.param(["--accuracy", "0.8,half"], 2, "--accuracy takes numbers, got '0.8,half'", id="no accuracy"),
        pytest.param(["--distance", "4"], 2, "stated up to 3 layers ahead (--accuracy), and distance=4", id="too far"),
        pytest.param(["--hardware", "abacus"], 1, "no hardware 'abacus'", id="no hardware"),
        pytest.param(["--ablation", "most"], 2, "ablation must be one of", id="no step"),
    ],
)
def test_the_command_refuses(options: list[str], code: int, message: str) -> None:
    result = call("olmoe-1b-7b", *options)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 3.0])
def test_a_prompt_streams_without_pauses(share: float, layers: int) -> None:
    """What passes through two slots keeps the link at work, whatever part of its time an expert takes to compute.

    It rests while attention is computed.
    """
    of, bandwidth, attention = shape(layers=layers, experts=32), 1e9, 0.05
    prompt = Routed(ids=[np.arange(64, dtype=np.int16).reshape(32, 2) % 32] * layers)
    costs, wire = Even(of, share / bandwidth, attention), Wire(bandwidth=bandwidth, latency=0.0)
    simulator = Simulator(of, costs, wire, Config(slots=16 * layers, chunk="64KiB", predictor="none"))
    for _ in range(2):
        simulator.reset()
        costs.waves.clear()
        outcome = simulator.run([*passes([prompt], prompt=31)][:1])
    assert outcome.misses == (32 - 14) * layers
    bound = max(layers * 32 * of.expert_bytes(0) * share / bandwidth, outcome.moving_seconds) + layers * attention
    assert 0.999 * bound <= outcome.seconds <= 1.01 * bound
    assert costs.waves.count(1) >= 2 * outcome.misses, "each half alone, so that the next can come meanwhile"
