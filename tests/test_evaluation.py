"""Evaluation: what is replayed is what a decoding model shows, and what is counted is right."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_learned import build, drawn, gates_of, record
from transformers import DynamicCache
from typer.testing import CliRunner
from zoo import FAMILIES

import promoe_triton
from promoe_triton.cli.commands import app
from promoe_triton.evaluation import goodpred
from promoe_triton.evaluation.caches import BELADY, hit_ratio, resident
from promoe_triton.evaluation.comparing import BY_GATE
from promoe_triton.evaluation.measures import Row, accuracy, calibration, on_misses
from promoe_triton.evaluation.replay import From, Replayed, recording, replay
from promoe_triton.policies import POLICIES
from promoe_triton.predictors import HistoryPredictor, NoPredictor, OraclePredictor, Reach, find_layers
from promoe_triton.predictors.learned import save_heads
from promoe_triton.protocols import Observation, Prediction, Seam
from promoe_triton.traces import TraceWriter, read_trace
from promoe_triton.tracing import Tracer, experts_of

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35]


class Spy:
    """Remembers what it was shown, and says what it is told to."""

    def __init__(self, says: Sequence[Prediction] = ()) -> None:
        self.shown: list[Observation] = []
        self._says = says

    def predict(self, seen: Observation) -> Sequence[Prediction]:
        self.shown.append(seen)
        return self._says


def trace_of(model: Any, folder: Path, *texts: Sequence[int]) -> Any:
    with Tracer(model) as tracer:
        writer = TraceWriter(folder, {"model": "tiny", "gates": tracer.gates}, tracer.layers, 10_000)
        for number, text in enumerate(texts):
            writer.add(tracer.document(text, 1, 1), number)
        writer.flush()
    return read_trace(folder)


class TestReplay:
    def test_a_predictor_is_shown_what_a_decoding_model_shows(self, tmp_path: Path) -> None:
        model = build()
        layers = find_layers(model, experts_of(model))
        document = next(trace_of(model, tmp_path, TOKENS).read())
        replayed, live = Spy(), Spy()
        replay(document, layers, replayed, 2)
        with promoe_triton.patch(model, slots=8, store="spool", predictor=live, always_predict=True), torch.no_grad():
            cache = DynamicCache(config=model.config)
            for token in TOKENS:
                model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        assert len(replayed.shown) == len(live.shown) == len(TOKENS) * (len(layers.experts) + 2)
        for ours, theirs in zip(replayed.shown, live.shown, strict=True):
            assert (ours.layer, ours.seam) == (theirs.layer, theirs.seam)
            for name in ("state_TD", "expert_ids_TA", "token_ids_T"):
                one, other = getattr(ours, name), getattr(theirs, name)
                assert (one is None) == (other is None)
                assert one is None or torch.equal(one, other)

    def test_what_is_named_stands_beside_the_token_it_is_for(self, tmp_path: Path) -> None:
        model = build()
        layers = find_layers(model, experts_of(model))
        document = next(trace_of(model, tmp_path, TOKENS).read())

        class Counting:
            """At token t, names expert t for the next layer, and 15 - t for layer 0 of the next token."""

            def __init__(self) -> None:
                self.token = -1

            def predict(self, seen: Observation) -> Sequence[Prediction]:
                self.token += seen.seam is Seam.ENTERED
                last = len(layers.experts) - 1
                what = {Seam.ROUTED: (seen.layer + 1, 0, self.token), Seam.LEFT: (0, 1, 15 - self.token)}
                if seen.seam is Seam.ENTERED or (seen.seam is Seam.ROUTED and seen.layer == last):
                    return ()
                layer, steps, expert = what[seen.seam]
                scores = torch.ones(1)
                return [Prediction(layer=layer, steps=steps, expert_ids=torch.tensor([expert]), scores=scores)]

        found = replay(document, layers, Counting(), 2)
        T = len(TOKENS)
        for layer in range(1, len(layers.experts)):
            assert found.named[layer].keys() == {From("routed", 1)}
            assert found.named[layer][From("routed", 1)].tolist() == [[t, -1] for t in range(T)]
        assert found.named[0].keys() == {From("left", 1)}
        assert found.named[0][From("left", 1)].tolist() == [[-1, -1], *([15 - t, -1] for t in range(T - 1))]
        assert all((ids == document.expert_ids_TA(layer).numpy()).all() for layer, ids in enumerate(found.chosen))

    def test_the_truth_is_always_right(self, tmp_path: Path) -> None:
        model = build()
        layers = find_layers(model, experts_of(model))
        document = next(trace_of(model, tmp_path, TOKENS).read())
        oracle = OraclePredictor(recording(document, len(layers.experts)), layers, Reach(distance=3))
        found = replay(document, layers, oracle, 4)
        rows = [row for row in accuracy("text", "oracle", [found], layers.active) if row.k == layers.active[0]]
        assert {(row.source, row.ahead) for row in rows} == {
            *(("entered", d) for d in range(4)),
            *(("routed", d) for d in range(1, 4)),
            *(("left", d) for d in range(1, 4)),
        }
        assert all(row.value == 1.0 for row in rows)


def made_up(chosen: Sequence[Any], named: Sequence[dict[From, Any]]) -> Replayed:
    return Replayed(
        chosen=[np.array(ids, np.int16) for ids in chosen],
        named=[{place: np.array(ids, np.int16) for place, ids in of.items()} for of in named],
    )


PLACE = From("routed", 1)


class TestMeasures:
    def test_by_hand(self) -> None:
        chosen = [[0, 1], [2, 3], [0, 3]]
        named = [[1, 0, 5, 4], [4, 2, 3, 5], [-1, -1, -1, -1]]
        document = made_up([chosen, chosen], [{}, {PLACE: named}])
        rows = {(r.metric, r.layer, r.k): r.value for r in accuracy("t", "p", [document], (2, 2))}
        # The last token was not spoken of. First 1: 1 of 2 right; first 2: 3 of 4; first 4: 4 of 8. Chosen: 4.
        expected = {("accuracy", 1): 1 / 2, ("accuracy", 2): 3 / 4, ("accuracy", 4): 4 / 8}
        expected |= {("recall", 1): 1 / 4, ("recall", 2): 3 / 4, ("recall", 4): 1.0}
        for (metric, k), value in expected.items():
            assert rows[metric, "1", k] == rows[metric, "all", k] == value
        assert [r.value for r in calibration("t", "p", [document])] == [0.5, 1.0, 0.5, 0.0]

    def test_on_misses_by_hand(self) -> None:
        document = made_up([[[0, 1], [2, 3]]], [{PLACE: [[1, 0, 5, 4], [4, 2, 3, 5]]}])
        held = np.zeros((2, 6), bool)
        held[0, [0, 5]] = held[1, [4]] = True
        found = list(on_misses("t", "p", [document], [[held]], 2, "lru", 0.5))
        rows = {(r.metric, r.k): r.value for r in found if r.layer == "all"}
        # Missed: 1; 2 and 3. Named and absent, of 2: 1; 2. Of 4: 1, 4; 2, 3, 5.
        assert rows == {
            ("precision on misses", 2): 2 / 2,
            ("recall on misses", 2): 2 / 3,
            ("precision on misses", 4): 3 / 5,
            ("recall on misses", 4): 3 / 3,
        }

    def test_on_misses_by_layer(self) -> None:
        named = [[1, 0], [4, 2]]
        document = made_up([[[0, 1], [2, 3]], [[0, 1], [2, 3]]], [{PLACE: named}, {PLACE: named}])
        none, some = np.zeros((2, 6), bool), np.zeros((2, 6), bool)
        some[0, 1] = some[1, 2] = True
        found = list(on_misses("t", "p", [document], [[none, some]], 2, "lru", 0.5))
        recall = {r.layer: r.value for r in found if (r.metric, r.k) == ("recall on misses", 2)}
        # Missed: 0, 1, 2, 3 in the first layer, of which 0, 1, 2 were named; in the second 0 and 3, of which 0 was.
        assert recall == {"0": 3 / 4, "1": 1 / 2, "all": 4 / 6}


routings = st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2, unique=True), min_size=1, max_size=8)


class TestCaches:
    @given(routing=routings, slots=st.integers(2, 6))
    @settings(deadline=None)
    def test_no_policy_beats_belady_and_belady_is_the_optimum(self, routing: list[list[int]], slots: int) -> None:
        chosen = np.array(routing, np.int16)
        best = hit_ratio(resident(BELADY, slots, chosen, 6, {}), chosen)
        for policy in POLICIES:
            assert hit_ratio(resident(policy, slots, chosen, 6, {}), chosen) <= best + 1e-12
        assert math.isclose(best, exhaustive(routing, slots) / chosen.size)

    @given(routing=routings, slots=st.integers(2, 6))
    @settings(deadline=None)
    def test_lru(self, routing: list[list[int]], slots: int) -> None:
        found = resident("lru", slots, np.array(routing, np.int16), 6, {})
        order: list[int] = []
        for held, chosen in zip(found, routing, strict=True):
            assert {*np.flatnonzero(held).tolist()} == {*order}
            hits = [e for e in chosen if e in order]
            for expert in [*hits, *(e for e in chosen if e not in hits)]:
                order = [*(e for e in order if e != expert), expert]
            order = order[-slots:]

    def test_predictions_keep_an_expert(self) -> None:
        chosen = np.array([[0, 1], [2, 3], [4, 5], [0, 1]], np.int16)
        named = np.array([[-1], [0], [0], [-1]], np.int16)
        with_, without = (resident("predicted", 4, chosen, 6, {}, of)[3, 0] for of in ([named], ()))
        assert (bool(with_), bool(without)) == (True, False)


def exhaustive(routing: Sequence[Sequence[int]], slots: int) -> int:
    """Return the most hits that any choice of what to keep can have."""
    states = {frozenset[int](): 0}
    for chosen in routing:
        after: dict[frozenset[int], int] = {}
        for held, hits in states.items():
            hits += len(held & {*chosen})
            everything = held | {*chosen}
            for kept in itertools.combinations(sorted(everything), min(slots, len(everything))):
                after[frozenset(kept)] = max(after.get(frozenset(kept), 0), hits)
        states = after
    return max(states.values())


class TestGoodpred:
    @staticmethod
    def run(tmp_path: Path, link: float, only: int | None = None) -> list[tuple[Any, Any]]:
        model = build()
        layers = find_layers(model, experts_of(model))
        generator = torch.Generator().manual_seed(4)
        texts = [torch.randint(60, (40,), generator=generator).tolist() for _ in range(3)]
        documents = list(trace_of(model, tmp_path, *texts).read())
        found = []
        for says in ("truth", "nothing"):
            replayed = []
            for document in documents:
                oracle = OraclePredictor(recording(document, len(layers.experts)), layers, Reach(distance=2))
                replayed.append(replay(document, layers, oracle if says == "truth" else NoPredictor(), 4))
            common: dict[str, Any] = {"slots": 0.5, "link": link, "distances": 2, "only": only, "prompt": 8}
            found.append(goodpred.run(replayed, layers.experts, layers.active, **common))
        return found

    def outcomes(self, *args: Any, **options: Any) -> tuple[Any, Any]:
        (truth, _), (nothing, _) = self.run(*args, **options)
        return truth, nothing

    def test_as_the_paper_defines_it(self, tmp_path: Path) -> None:
        """Of all experts named, whether they were copied for it or not; of nothing named there is none."""
        found = {}
        for link in (0.3, 50.0):
            (outcome, truth), (_, nothing) = self.run(tmp_path / f"{link}", link, only=1)
            assert math.isnan(nothing.goodpred)
            assert truth.chosen == truth.named > 100, "it is the truth"
            assert truth.there >= outcome.on_time, "what stayed in slots counts as well"
            assert truth.goodpred == truth.fetch_rate
            found[link] = truth
        assert 0.3 < found[0.3].goodpred < 0.8
        assert found[50.0].goodpred > 0.9
        assert goodpred.Timely(named=10, chosen=5, there=8).goodpred == pytest.approx(0.4)

    def test_the_truth_arrives_over_a_fast_link(self, tmp_path: Path) -> None:
        truth, nothing = self.outcomes(tmp_path, link=50.0)
        assert truth.accuracy > 0.97, "only what the document's end cut off is wrong"
        assert truth.goodpred > 0.9
        assert truth.stall_seconds < 0.2 * nothing.stall_seconds

    def test_and_not_over_a_slow_one(self, tmp_path: Path) -> None:
        truth, nothing = self.outcomes(tmp_path, link=0.3)
        assert truth.fetch_rate < 0.7
        assert truth.tpot_seconds <= 1.02 * nothing.tpot_seconds

    def test_only_one_distance(self, tmp_path: Path) -> None:
        every, _ = self.outcomes(tmp_path / "every", link=50.0)
        second, _ = self.outcomes(tmp_path / "second", link=50.0, only=2)
        assert second.accuracy > 0.97
        assert second.on_time < every.on_time, "layer 0 is spoken of from one layer before it only"


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    model = build()
    model.save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(60, (48,), generator=generator).tolist() for _ in range(5)]
    trace_of(model, folder / "one", *texts[:3])
    trace_of(model, folder / "other", *texts[2:])
    save_heads(folder / "mine.safetensors", drawn(gates_of(model), scale=0.0), gates_of(model), {})
    return folder


class TestCommand:
    def invoke(self, *arguments: str) -> Any:
        return CliRunner().invoke(app, ["evaluate", *arguments])

    def test_all_of_it(self, there: Path, tmp_path: Path) -> None:
        out, figure = tmp_path / "rows.csv", tmp_path / "rows.png"
        given = [str(there / "one"), str(there / "other"), "--model", str(there / "model"), "--distance", "2"]
        given += ["--predictor", str(there / "mine.safetensors"), "--slots", "0.25,0.5", "--out", str(out)]
        pytest.importorskip("matplotlib")
        done = self.invoke(*given, "--figure", str(figure))
        assert done.exit_code == 0, done.output
        assert figure.read_bytes().startswith(b"\x89PNG")
        with out.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert {*rows[0]} == {*Row.__dataclass_fields__}
        for text in ("one", "other"):
            mine = [row for row in rows if row["text"] == text]
            assert {row["predictor"] for row in mine} - {""} == {
                *("random", "token", "history", "gate", "mine", "oracle", "none")
            }
            assert {row["policy"] for row in mine if row["metric"] == "hit ratio"} == {*POLICIES, BY_GATE, BELADY}
            values = {
                (r["predictor"], r["metric"], r["source"], r["ahead"], r["layer"], r["k"]): r["value"] for r in mine
            }
            for key, value in values.items():
                if key[0] == "gate" and key[1] in ("accuracy", "recall", "chosen at rank"):
                    assert value == values["mine", *key[1:]], "a correction by nothing is the gate"
            assert values["oracle", "accuracy", "routed", "1", "all", "2"] == "1"
        assert "hit ratio by share of the experts in slots" in " ".join(done.output.split())

    @pytest.mark.parametrize(
        ("more", "says"),
        [
            pytest.param(["--slots", "0"], "--slots takes shares in (0, 1]", id="no-slots"),
            pytest.param(["--slots", "half"], "--slots takes shares in (0, 1]", id="no-number"),
            pytest.param(["--link", "0"], "--link must be positive", id="no-link"),
            pytest.param(["--predictor", "none.safetensors"], "there is no predictor none.safetensors", id="no-file"),
            pytest.param(["--predictor", "gate.safetensors"], "need names of their own", id="taken"),
        ],
    )
    def test_bad_input(self, there: Path, tmp_path: Path, more: list[str], says: str) -> None:
        done = self.invoke(str(there / "one"), "--model", str(there / "model"), "--out", str(tmp_path / "x.csv"), *more)
        assert done.exit_code == 2
        assert says in " ".join(done.output.split())

    @pytest.mark.parametrize(("lengths", "told"), [((48, 10, 48, 32, 33), True), ((48, 10, 32, 33), False)])
    def test_documents_of_all_lengths(self, there: Path, tmp_path: Path, lengths: tuple[int, ...], told: bool) -> None:
        """Those too short to be decoded after a prompt count for all else."""
        generator = torch.Generator().manual_seed(7)
        trace_of(build(), tmp_path / "t", *(torch.randint(60, (n,), generator=generator).tolist() for n in lengths))
        out = tmp_path / "x.csv"
        given = ["--model", str(there / "model"), "--slots", "0.5", "--distance", "1", "--out", str(out)]
        done = self.invoke(str(tmp_path / "t"), *given)
        assert done.exit_code == 0, done.output
        assert ("No GOODPRED" in done.output) is not told
        with out.open(newline="") as file:
            metrics = {row["metric"] for row in csv.DictReader(file)}
        assert ("GOODPRED" in metrics) is told
        assert {"accuracy", "hit ratio", "recall on misses"} <= metrics

    def test_a_trace_of_another_model(self, there: Path, tmp_path: Path) -> None:
        torch.manual_seed(0)
        FAMILIES["mixtral"].build().save_pretrained(tmp_path / "model")
        done = self.invoke(str(there / "one"), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "x.csv"))
        assert done.exit_code == 1
        assert "is of another model" in " ".join(done.output.split())

    def test_a_trace_without_states(self, there: Path, tmp_path: Path) -> None:
        record(build(), tmp_path / "bare", states=False)
        done = self.invoke(str(tmp_path / "bare"), "--model", str(there / "model"), "--out", str(tmp_path / "x.csv"))
        assert done.exit_code == 1
        assert "has no hidden states" in " ".join(done.output.split())

    def test_too_few_documents(self, there: Path, tmp_path: Path) -> None:
        trace_of(build(), tmp_path / "two", TOKENS, TOKENS)
        done = self.invoke(str(tmp_path / "two"), "--model", str(there / "model"), "--out", str(tmp_path / "x.csv"))
        assert done.exit_code == 1
        assert "has 2 documents to look at, and three are needed" in " ".join(done.output.split())


class TestSimulated:
    """`simulate` with predictions as real predictors made them."""

    def invoke(self, there: Path, *arguments: str) -> Any:
        return CliRunner().invoke(
            app, ["simulate", str(there / "model"), "--prompt", "4", "--tokens", "40", "--ablation", "all", *arguments]
        )

    def test_a_recorded_trace_as_predictors_see_it(self, there: Path) -> None:
        mine = str(there / "mine.safetensors")
        predictors = ["none", "gate", mine, "history", "perfect"]
        given = ["--trace", str(there / "one"), "--predictor", ",".join(predictors), "--slots", "0.5", "--json"]
        done = self.invoke(there, *given, "--always-predict")
        assert done.exit_code == 0, done.output
        runs = {run["predictor"]: run for run in json.loads(done.stdout)["runs"]}
        assert [*runs] == predictors
        assert runs["gate"] == runs[mine] | {"predictor": "gate"}, "a correction by nothing is the gate"
        assert runs["none"]["bytes_ahead"] == 0 < runs["history"]["bytes_ahead"] < runs["perfect"]["bytes_ahead"]
        assert runs["history"]["accuracy"] < 0.3 < runs["perfect"]["accuracy"], "this model has no habits"

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            pytest.param(["--predictor", "gate"], "--predictor gate needs --trace", id="no-trace"),
            pytest.param(["--predictor", "oracle"], "--predictor takes stated, perfect, none, random", id="unknown"),
            pytest.param(["--predictor", "no.safetensors"], "or a predictor's file, got 'no.safeten", id="no-file"),
        ],
    )
    def test_bad_input(self, there: Path, options: list[str], says: str) -> None:
        done = self.invoke(there, *options)
        assert done.exit_code == 2
        assert says in " ".join(done.output.split())

    def test_a_trace_without_states(self, there: Path, tmp_path: Path) -> None:
        record(build(), tmp_path / "bare", states=False)
        done = self.invoke(there, "--trace", str(tmp_path / "bare"), "--predictor", "gate", "--tokens", "2")
        assert done.exit_code == 1
        assert "has no hidden states" in " ".join(done.output.split())


def test_tables_learn_over_documents(tmp_path: Path) -> None:
    """A table that is shown the same text twice has learned it."""
    model = build()
    layers = find_layers(model, experts_of(model))
    first, second = trace_of(model, tmp_path, TOKENS, TOKENS).read()
    predictor = HistoryPredictor(layers, Reach(distance=1))
    found = [replay(document, layers, predictor, 2) for document in (first, second)]
    scores = [
        next(
            r.value
            for r in accuracy("t", "h", [one], layers.active)
            if (r.source, r.layer, r.k) == ("routed", "all", 2)
        )
        for one in found
    ]
    assert scores[1] > scores[0] + 0.1
