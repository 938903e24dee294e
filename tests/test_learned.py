"""The learned predictor: a correction to the gates, its file, and its training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner
from zoo import FAMILIES

import promoe_triton
from promoe_triton.cli.commands import app
from promoe_triton.demo import MODEL, PREDICTOR
from promoe_triton.errors import PromoeError
from promoe_triton.evaluation.measures import accuracy
from promoe_triton.evaluation.replay import replay
from promoe_triton.predictors import GatePredictor, Gates, Reach, find_layers, read_gates
from promoe_triton.predictors.learned import Head, Source, fingerprint, load_heads, save_heads
from promoe_triton.protocols import Observation, Prediction, Seam
from promoe_triton.traces import Trace, TraceWriter, read_trace
from promoe_triton.tracing import Tracer, experts_of
from promoe_triton.training import Recipe, sources, split, train

RANK = 3
DOCUMENTS = 12


def build(seed: int = 0, gains: tuple[float, float] = (1.0, 1.0)) -> Any:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        initializer_range=0.3,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, *gains)
    return model


def gates_of(model: Any) -> Gates:
    return read_gates(model, experts_of(model))


def drawn(gates: Gates, distance: int = 2, scale: float = 1.0) -> dict[Source, Head]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for source, targets in sources(gates, distance).items():
        gate: Any = gates.layers[source[0]]
        G, D = gate.weight_GD.shape
        found[source] = Head(
            in_DR=torch.randn(D, RANK, generator=generator),
            in_R=torch.randn(RANK, generator=generator),
            out_RHG=torch.randn(RANK, len(targets), G, generator=generator) * scale,
        )
    return found


def observations(model: Any, tokens: int = 1) -> list[Observation]:
    D = model.config.hidden_size
    generator = torch.Generator().manual_seed(2)
    layers = range(model.config.num_hidden_layers)
    routed = [Observation(layer=i, state_TD=torch.randn(tokens, D, generator=generator)) for i in layers]
    entered = Observation(layer=0, seam=Seam.ENTERED, state_TD=torch.randn(tokens, D, generator=generator))
    left = Observation(layer=layers[-1], seam=Seam.LEFT, state_TD=torch.randn(tokens, D, generator=generator))
    return [entered, *routed, left]


def said(predictor: GatePredictor, seen: Observation) -> dict[tuple[int, int], Prediction]:
    # States made up here are not what the model's norms give.
    predictor._confirmed = {*range(99)}
    return {(p.layer, p.steps): p for p in predictor.predict(seen)}


class TestPredictor:
    def test_without_a_correction_it_is_the_gate(self) -> None:
        model = build()
        gates, reach = gates_of(model), Reach(distance=2)
        plain, learned = GatePredictor(gates, reach), GatePredictor(gates, reach, drawn(gates, scale=0.0))
        for seen in observations(model):
            want, got = said(plain, seen), said(learned, seen)
            assert want.keys() == got.keys()
            assert all(torch.equal(got[to].expert_ids, want[to].expert_ids) for to in want)

    @pytest.mark.parametrize("tokens", [1, 3])
    @pytest.mark.parametrize("distance", [1, 2])
    def test_the_correction_is_added_to_the_logits(self, tokens: int, distance: int) -> None:
        model = build(gains=(0.5, 2.0))
        gates = gates_of(model)
        corrections = drawn(gates)
        predictor = GatePredictor(gates, Reach(distance=distance), corrections)
        compared = 0
        for seen in observations(model, tokens):
            source: Any = gates.layers[seen.layer]
            assert seen.state_TD is not None
            state_TD = seen.state_TD
            u_TD = source.norm.undo(state_TD) if seen.seam is Seam.ROUTED else source.norm.standardise(state_TD)
            targets = sources(gates, 2).get((seen.layer, seen.seam), [])
            found = said(predictor, seen)
            for place, target in enumerate(targets):
                prediction = found.pop((target.layer, target.steps), None)
                if prediction is None:
                    assert place >= distance
                    continue
                gate: Any = gates.layers[target.layer]
                correction = corrections[seen.layer, seen.seam]
                logits_TG = u_TD @ gate.weight_GD.T + gate.bias_G
                inner_TR = (u_TD @ correction.in_DR + correction.in_R).relu()
                logits_TG += inner_TR @ correction.out_RHG[:, place]
                scores_E = gate.rule.scores(logits_TG, gate.correction_G).sum(0)
                best = scores_E.topk(len(prediction.expert_ids))
                assert torch.equal(prediction.expert_ids, best.indices)
                expected = logits_TG[0][best.indices] if tokens == 1 else best.values
                torch.testing.assert_close(prediction.scores, expected)
                compared += 1
            assert not found
        assert compared > 4

    def test_all_distances_are_one_product(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of the gates; what was learned for all of them adds two."""
        gates = gates_of(build())
        products: list[tuple[int, ...]] = []
        addmm = torch.addmm

        def counted(*args: Any, **options: Any) -> Tensor:
            products.append((*args[2].shape,))
            result: Tensor = addmm(*args, **options)
            return result

        seen = observations(build())[1]
        for heads, count in ((None, 1), (drawn(gates), 3)):
            predictor = GatePredictor(gates, Reach(distance=2), heads)
            said(predictor, seen)
            with monkeypatch.context() as patched:
                patched.setattr(torch, "addmm", counted)
                assert len(predictor.predict(seen)) == 2
            assert len(products) == count
            products.clear()

    def test_layers_beyond_what_was_learned_keep_their_gates(self) -> None:
        model = build()
        gates = gates_of(model)
        plain, learned = (GatePredictor(gates, Reach(distance=2), c) for c in (None, drawn(gates, distance=1)))
        seen = observations(model)[1]
        want, got = said(plain, seen), said(learned, seen)
        assert torch.equal(got[2, 0].expert_ids, want[2, 0].expert_ids)
        assert not torch.equal(got[1, 0].scores, want[1, 0].scores)


class TestFile:
    def test_what_is_loaded_is_what_was_saved(self, tmp_path: Path) -> None:
        gates = gates_of(build())
        want = drawn(gates)
        save_heads(tmp_path / "p.safetensors", want, gates, {})
        got = load_heads(tmp_path / "p.safetensors", gates)
        assert got.keys() == want.keys()
        for source in want:
            assert torch.equal(got[source].in_DR, want[source].in_DR)
            assert torch.equal(got[source].out_RHG, want[source].out_RHG)

    def test_of_another_model(self, tmp_path: Path) -> None:
        gates = gates_of(build())
        save_heads(tmp_path / "p.safetensors", drawn(gates), gates, {})
        with pytest.raises(PromoeError, match="trained for another model"):
            promoe_triton.patch(build(seed=1), slots=4, store="spool", predictor=tmp_path / "p.safetensors")

    def test_of_other_shapes(self, tmp_path: Path) -> None:
        gates = gates_of(build())
        save_heads(tmp_path / "p.safetensors", drawn(gates), gates, {})
        torch.manual_seed(0)
        with pytest.raises(PromoeError, match="for another model, whose routers have other weights or sizes"):
            promoe_triton.patch(
                FAMILIES["mixtral"].build(), slots=4, store="spool", predictor=tmp_path / "p.safetensors"
            )

    @pytest.mark.parametrize("damage", ["missing", "unknown", "sizes", "dimensions", "model dim", "layer", "empty"])
    def test_a_damaged_one(self, damage: str, tmp_path: Path) -> None:
        file, gates = tmp_path / "p.safetensors", gates_of(build())
        save_heads(file, drawn(gates), gates, {})
        with safe_open(file, framework="pt") as opened:
            about, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        name = next(name for name in tensors if name.endswith(".in"))
        weights = tensors.pop(name)
        if damage == "unknown":
            tensors[f"{name}.more"] = weights
        elif damage == "sizes":
            tensors[name] = weights[:, :-1].contiguous()
        elif damage == "dimensions":
            tensors[name] = weights.flatten()
        elif damage == "model dim":
            tensors[name] = weights[:-1].contiguous()
        elif damage == "empty":
            tensors = {}
        elif damage == "layer":
            tensors = {f"99.{n.split('.', 1)[1]}": t for n, t in {**tensors, name: weights}.items() if n[0] == name[0]}
        save_file(tensors, file, metadata=about)
        with pytest.raises(PromoeError, match="is damaged"):
            load_heads(file, gates)

    @pytest.mark.parametrize("content", ["truncated", "tensors"])
    def test_no_predictor(self, content: str, tmp_path: Path) -> None:
        file, gates = tmp_path / "p.safetensors", gates_of(build())
        if content == "tensors":
            save_file({"a": torch.zeros(2)}, file)
        else:
            save_heads(file, drawn(gates), gates, {})
            file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(PromoeError, match=r"p\.safetensors (cannot be read as a|is no) predictor"):
            promoe_triton.patch(build(), slots=4, store="spool", predictor=str(file))

    def test_not_there(self) -> None:
        with pytest.raises(ValueError, match=r"there is no predictor missing\.safetensors"):
            promoe_triton.Config(predictor="missing.safetensors")

    def test_in_other_precision(self, tmp_path: Path) -> None:
        """The model may be loaded as bf16 where it was traced in single precision, if that is what is in its file."""
        model = build().bfloat16()
        gates = gates_of(model)
        save_heads(tmp_path / "p.safetensors", drawn(gates), gates, {})
        assert load_heads(tmp_path / "p.safetensors", gates_of(model.float()))


def record(model: Any, folder: Path, states: bool = True, documents: int = DOCUMENTS) -> Trace:
    generator = torch.Generator().manual_seed(3)
    with Tracer(model, states) as tracer:
        writer = TraceWriter(folder, {"model": "tiny", "gates": tracer.gates}, tracer.layers, 100)
        for number in range(documents):
            writer.add(tracer.document(torch.randint(60, (24,), generator=generator).tolist(), 4, 99), number)
        writer.flush()
    return read_trace(folder)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(torch.tensor([[5, 3, 8, 13, 21, 34]])).logits
    return result


class TestTraining:
    def test_gets_better_and_runs(self, tmp_path: Path) -> None:
        model = build()
        gates = gates_of(model)
        trace = record(model, tmp_path / "t")
        corrections, scores = train(trace, gates, Recipe(distance=2, width=16, epochs=30, rate=0.01, batch=64))
        assert corrections.keys() == sources(gates, 2).keys()
        assert {(0, "ENTERED"), (0, "ROUTED"), (len(gates.layers) - 1, "LEFT")} <= {(s.layer, s.seam) for s in scores}
        gate, learned = (sum(getattr(score, name) for score in scores) for name in ("gate", "learned"))
        assert learned > gate + 0.05 * len(scores), "random layers move the state, as they always do"
        save_heads(tmp_path / "p.safetensors", corrections, gates, {})
        want = logits(build())
        patched = promoe_triton.patch(model, slots=4, store="spool", predictor=str(tmp_path / "p.safetensors"))
        assert torch.equal(logits(patched), want)

    def test_the_papers_network(self, tmp_path: Path) -> None:
        model = build()
        gates, trace = gates_of(model), record(model, tmp_path / "t")
        recipe = Recipe(network=True, distance=2, width=32, epochs=30, rate=0.01, batch=64)
        heads, scores = train(trace, gates, recipe)
        assert sum(score.learned for score in scores) / len(scores) > 1.5 * 2 / 16, "better than chance"
        save_heads(tmp_path / "p.safetensors", heads, gates, {})
        found = load_heads(tmp_path / "p.safetensors", gates)
        assert found.keys() == heads.keys()
        for source, head in heads.items():
            assert found[source].tensors().keys() == head.tensors().keys() >= {"out_HG"}
            assert all(torch.equal(tensor, head.tensors()[name]) for name, tensor in found[source].tensors().items())
        for distance in (1, 2, 3):
            predictor = GatePredictor(gates, Reach(distance=distance), found)
            plain = GatePredictor(gates, Reach(distance=distance))
            for seen in observations(model):
                source: Any = gates.layers[seen.layer]
                assert seen.state_TD is not None
                state_TD = seen.state_TD
                u_TD = source.norm.undo(state_TD) if seen.seam is Seam.ROUTED else source.norm.standardise(state_TD)
                targets, mine = sources(gates, 2).get((seen.layer, seen.seam), []), said(predictor, seen)
                for to, prediction in said(plain, seen).items():
                    place = next((i for i, target in enumerate(targets) if (target.layer, target.steps) == to), None)
                    if place is None:
                        assert torch.equal(mine[to].expert_ids, prediction.expert_ids), "beyond it the gates are asked"
                        continue
                    network: Any = found[seen.layer, seen.seam]
                    inner = (u_TD @ network.in_DR + network.in_R).relu()
                    gate: Any = gates.layers[to[0]]
                    logits_TG = inner @ network.out_RHG[:, place] + network.out_HG[place]
                    assert gate.correction_G is None
                    torch.testing.assert_close(mine[to].scores, logits_TG[0].topk(len(mine[to].scores)).values)

    def test_the_same_seed_gives_the_same(self, tmp_path: Path) -> None:
        model = build()
        trace, recipe = record(model, tmp_path), Recipe(distance=1, width=2, epochs=2, batch=64)
        first, second = (train(trace, gates_of(model), recipe)[0] for _ in range(2))
        assert all(torch.equal(first[source].out_RHG, second[source].out_RHG) for source in first)

    def test_it_ends_when_it_gets_no_better(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """After as many epochs as its patience says; what was best is what is kept."""
        model = build()
        trace, epochs = record(model, tmp_path), 0
        shuffle = torch.randperm

        def counted(*args: Any, **options: Any) -> Tensor:
            nonlocal epochs
            epochs += options.get("generator") is not None and args[0] > DOCUMENTS
            result: Tensor = shuffle(*args, **options)
            return result

        monkeypatch.setattr(torch, "randperm", counted)
        recipe = Recipe(distance=1, width=2, epochs=30, batch=64, rate=1e3, patience=2)
        train(trace, gates_of(model), recipe)
        assert epochs == 2 * len(sources(gates_of(model), 1))

    def test_what_gets_no_better_stays_zero(self, tmp_path: Path) -> None:
        model = build()
        recipe = Recipe(distance=1, width=2, epochs=3, batch=64, rate=1e3)
        corrections, scores = train(record(model, tmp_path), gates_of(model), recipe)
        assert not any(correction.out_RHG.any() for correction in corrections.values())
        assert all(score.gate == score.learned for score in scores)

    @pytest.mark.parametrize(
        ("texts", "sizes"),
        [([3] * 10, {2, 3}), ([1] * 30, {3}), ([20, 1, 2], {1, 2}), ([2, 30], {2})],
        ids=["alike", "documents", "one long", "two"],
    )
    def test_no_text_is_on_both_sides(self, texts: list[int], sizes: set[int]) -> None:
        of = [number for number, size in enumerate(texts) for _ in range(size)]
        for seed in range(20):
            held = split(of, Recipe(seed=seed))
            assert len(held) in sizes
            assert not {of[d] for d in held} & {of[d] for d in {*range(len(of))} - held}
        assert len({tuple(sorted(split(of, Recipe(seed=seed)))) for seed in range(20)}) > (len(texts) > 2)

    def test_of_a_single_text_the_end_is_held_out(self) -> None:
        assert split([0] * 20, Recipe()) == {18, 19}
        assert split([0, 0, 1, 1, 1], Recipe()) == {4}

    def test_no_document_is_on_both_sides(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, sides = build(), []
        trace = record(model, tmp_path)

        def examples(documents: Any, *others: Any) -> None:
            sides.append({document.number for document in documents})

        monkeypatch.setattr("promoe_triton.training._examples", examples)
        with pytest.raises(PromoeError, match="nothing to learn"):
            train(trace, gates_of(model), Recipe())
        assert len(sides) > 2
        for trained, tested in zip(sides[::2], sides[1::2], strict=True):
            assert not trained & tested
            assert trained | tested == {*range(DOCUMENTS)}
            assert len(tested) == 1

    def test_a_trace_of_another_model(self, tmp_path: Path) -> None:
        """Also of one of the same shape."""
        trace = record(build(), tmp_path)
        torch.manual_seed(0)
        for other in (FAMILIES["mixtral"].build(), build(seed=1)):
            with pytest.raises(PromoeError, match="is of another model: tiny"):
                train(trace, gates_of(other), Recipe())

    def test_in_other_precision(self, tmp_path: Path) -> None:
        model = build().bfloat16()
        train(record(model.float(), tmp_path), gates_of(model.bfloat16()), Recipe(distance=1, epochs=1, width=2))

    def test_without_states(self, tmp_path: Path) -> None:
        model = build()
        with pytest.raises(PromoeError, match="has no hidden states"):
            train(record(model, tmp_path, states=False), gates_of(model), Recipe())

    def test_nothing_to_learn(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        gates, trace = gates_of(build()), record(build(), tmp_path)
        refused = replace(gates, layers=(None,) * len(gates.layers), refused={"a": "Router is strange"})
        of_it = replace(trace, about={**trace.about, "gates": fingerprint(refused)})
        with pytest.raises(PromoeError, match="no gate of this model to learn a correction to: Router is strange"):
            train(of_it, refused, Recipe())
        monkeypatch.setattr("promoe_triton.training.sources", lambda gates, distance: {})
        with pytest.raises(PromoeError, match="nothing to learn from the trace"):
            train(trace, gates, Recipe())

    def test_a_single_document(self, tmp_path: Path) -> None:
        model = build()
        with pytest.raises(PromoeError, match="a single document"):
            train(record(model, tmp_path, documents=1), gates_of(model), Recipe())

    def test_the_command(self, tmp_path: Path) -> None:
        build().save_pretrained(tmp_path / "model")
        record(build(), tmp_path / "t")
        arguments = ["train", str(tmp_path / "t"), "--model", str(tmp_path / "model"), "--distance", "1"]
        out = tmp_path / "p.safetensors"
        done = CliRunner().invoke(app, [*arguments, "--epochs", "2", "--width", "2", "--out", str(out), "--json"])
        assert done.exit_code == 0, done.output
        report = json.loads(done.stdout)
        assert len(report["scores"]) == sum(map(len, sources(gates_of(build()), 1).values()))
        assert len(report["held_out"]) == 1
        with safe_open(out, framework="pt") as file:
            assert json.loads(file.metadata()["report"]) == report
        assert load_heads(out, gates_of(build()))
        bad = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "p.bin")])
        assert bad.exit_code == 2
        assert "must end in .safetensors" in " ".join(bad.output.split())


def test_the_packaged_one_knows_the_packaged_model(tmp_path: Path) -> None:
    """On held-out text it beats the gates at every distance, and knows the first layer before its attention."""
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    gates = gates_of(model)
    heads = load_heads(PREDICTOR, gates)
    assert heads.keys() == sources(gates, 4).keys()
    text = (MODEL.parent / "heldout.txt").read_text()[5000:7000]
    ids = AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"][:256]
    with Tracer(model) as tracer:
        writer = TraceWriter(tmp_path, {"model": "demo"}, tracer.layers, 10_000)
        writer.add(tracer.document(ids, 32, 256), 0)
        writer.flush()
    document, layers = next(read_trace(tmp_path).read()), find_layers(model, experts_of(model))
    found = {}
    for name, learned in (("gate", None), ("learned", heads)):
        replayed = replay(document, layers, GatePredictor(gates, Reach(distance=4), learned), 8)
        rows = [row for row in accuracy("text", name, [replayed], layers.active) if (row.layer, row.k) == ("all", 8)]
        found[name] = {(row.source, row.ahead): row.value for row in rows if row.metric == "accuracy"}
    assert found["learned"].keys() == found["gate"].keys() >= {("routed", d) for d in range(1, 5)}
    assert all(found["learned"][place] > found["gate"][place] + 0.02 for place in found["gate"])
    assert found["learned"]["entered", 0] > 0.6
