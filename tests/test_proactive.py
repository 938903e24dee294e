"""Copying ahead changes when things happen, never what is computed; and what it brings on a link known exactly."""

from __future__ import annotations

import functools
import gc
import itertools
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_core import drive
from test_learned import drawn, gates_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import promoe_triton
from promoe_triton import PromoeError, Stats
from promoe_triton.chunking import Chunking
from promoe_triton.core import Core
from promoe_triton.demo import MODEL
from promoe_triton.links import choice
from promoe_triton.links.fake import FakeLink, Wire
from promoe_triton.links.filling import Filler
from promoe_triton.policies import POLICIES, make_policy
from promoe_triton.predictors import OraclePredictor, Reach, RoutedLayers, RoutingRecorder
from promoe_triton.predictors.bounds import Recording
from promoe_triton.predictors.learned import save_heads
from promoe_triton.protocols import Chunk, Cuts, Observation, Part, Prediction, Seam
from promoe_triton.slots import SlotTable
from promoe_triton.techniques import ABLATION
from promoe_triton.transfers import URGENT
from promoe_triton.waves import RECENT

LAYERS, EXPERTS, TOP = 4, 8, 2
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
LONG = torch.arange(40)[None] * 7 % 64
"""A prompt that is long enough to count as one: nothing is predicted in it."""
STEPS = 6
ROUTED = RoutedLayers(experts=(EXPERTS,) * LAYERS, active=(TOP,) * LAYERS, stacks=("",) * LAYERS)


def build() -> Any:
    """In bf16, whose products do not depend on where the loader has put the weights (those of fp32 do)."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        initializer_range=0.3,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("moe")
    build().save_pretrained(place, max_shard_size="40KB")
    return place


@torch.no_grad()
def logits(model: Any, prompt: Tensor = PROMPT) -> list[Tensor]:
    """Of a prompt, and of each token decoded greedily after it."""
    out = model(prompt, use_cache=True)
    found = [out.logits]
    for _ in range(STEPS):
        out = model(found[-1][:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return found


@pytest.fixture(scope="module")
def want() -> list[Tensor]:
    return logits(build())


@pytest.fixture(scope="module")
def want_long() -> list[Tensor]:
    return logits(build(), LONG)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a correction to the gates that is drawn, not trained."""
    file = tmp_path_factory.mktemp("learned") / "predictor.safetensors"
    gates = gates_of(build())
    save_heads(file, drawn(gates), gates, {})
    return file


@pytest.fixture(scope="module")
def recording(folder: Path) -> Recording:
    """What a model that runs PROMPT, LONG and PROMPT again chooses."""
    recorder = RoutingRecorder(passes=99)
    model = promoe_triton.from_pretrained(folder, slots=LAYERS, predictor=recorder)
    for prompt in (PROMPT, LONG, PROMPT):
        logits(model, prompt)
    assert len(recorder.recording) == 3 * (1 + STEPS)
    return recorder.recording


def equal(found: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


class Faked:
    """Puts fake links in place of threaded links; `links` are those made so far."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.links: list[FakeLink] = []

    def __call__(
        self,
        filler: Filler,
        *,
        depth: int,
        chunking: Chunking,
        timeout: float,
        limit: float | None,
    ) -> FakeLink:
        self.links.append(FakeLink(filler, self.wire, depth=depth, chunking=chunking))
        return self.links[-1]


def faked(monkeypatch: pytest.MonkeyPatch, **wire: Any) -> Faked:
    made = Faked(Wire(**wire))
    monkeypatch.setattr(choice, "ThreadedLink", made)
    return made


def computing(model: Any, link: FakeLink, seconds: float) -> None:
    """Let so many virtual seconds pass before each layer's attention."""
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: link.pass_time(seconds))


class Names:
    """A predictor that names whatever it is told to, for any layer and any number of tokens ahead."""

    stateless = True

    def __init__(self, choose: Callable[[], Prediction]) -> None:
        self._choose = choose

    def predict(self, seen: Observation) -> Sequence[Prediction]:
        return [self._choose() for _ in range(2)]


def anything(seed: int) -> Names:
    rng = random.Random(seed)

    def choose() -> Prediction:
        experts = torch.tensor([rng.randrange(EXPERTS + 2) for _ in range(rng.randrange(6))], dtype=torch.int64)
        scores = torch.zeros(len(experts))
        return Prediction(layer=rng.randrange(LAYERS), steps=rng.randrange(3), expert_ids=experts, scores=scores)

    return Names(choose)


class TestTheOutputIsTheSame:
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_whatever_is_predicted_and_however_the_link_behaves(
        self,
        data: st.DataObject,
        folder: Path,
        learned: Path,
        recording: Recording,
        want: list[Tensor],
        want_long: list[Tensor],
    ) -> None:
        draw = data.draw
        seed = draw(st.integers(0, 9), label="seed")
        rng = random.Random(seed)
        faults = draw(st.sampled_from([0.0, 0.3]), label="faults of speculation")
        named = map(st.just, ["auto", "gate", "history", "token", "random", "none", learned])
        oracle = st.builds(OraclePredictor, st.just(recording), st.just(ROUTED), st.builds(Reach, distance=st.just(2)))
        predictor = draw(st.one_of(*named, oracle, st.builds(anything, st.integers(0, 9))), label="predictor")
        wire = {
            "bandwidth": draw(st.sampled_from([1e6, 1e8, 1e12]), label="bandwidth"),
            "latency": draw(st.sampled_from([0.0, 1e-3]), label="latency"),
            "jitter": lambda chunk: rng.random() * 1e-3,
            "fault": lambda chunk: OSError("bad luck") if chunk.speculative and rng.random() < faults else None,
        }
        options = {
            "slots": draw(st.sampled_from([1, 3, LAYERS, 2 * LAYERS, 5 * LAYERS, LAYERS * EXPERTS]), label="slots"),
            "policy": draw(st.sampled_from(["auto", *POLICIES]), label="policy"),
            "always_predict": draw(st.booleans(), label="always_predict"),
            "latency": draw(st.sampled_from([1e-5, 1e-2]), label="latency"),
            "partition": draw(st.sampled_from(["auto", "global"]), label="partition"),
            "chunking": draw(st.sampled_from(["adaptive", "fixed", "tensor", "expert"]), label="chunking"),
            "chunk": draw(st.sampled_from([4096, 1 << 20]), label="chunk"),
            "depth": draw(st.integers(1, 4), label="depth"),
            "ablation": draw(st.sampled_from(sorted(ABLATION)), label="ablation"),
            "distance": draw(st.integers(1, 5), label="distance"),
            "width": draw(st.sampled_from([None, 1, EXPERTS]), label="width"),
        }
        with pytest.MonkeyPatch.context() as monkeypatch:
            made = faked(monkeypatch, **wire)
            model = promoe_triton.from_pretrained(folder, predictor=predictor, **options)
            if made.links:
                computing(model, made.links[0], draw(st.sampled_from([0.0, 1e-3]), label="computing"))
            assert equal(logits(model), want)
            assert equal(logits(model, LONG), want_long)
            assert equal(logits(model), want)

    @pytest.mark.parametrize("ablation", ABLATION)
    def test_at_every_step_of_the_ablation_from_a_real_disk(
        self, ablation: str, folder: Path, want: list[Tensor]
    ) -> None:
        for slots in (3, 2 * LAYERS, LAYERS * EXPERTS - 2):
            model = promoe_triton.from_pretrained(folder, slots=slots, ablation=ablation, io="direct")
            assert equal(logits(model), want)


# What a predictor may not say: layer, steps, ids.
NONSENSE = {
    "a layer after the last": (LAYERS, 0, torch.arange(3)),
    "a layer before the first": (-1, 0, torch.arange(3)),
    "a token that has been": (1, -9, torch.arange(3)),
    "no list": (1, 0, torch.arange(4).view(2, 2)),
    "no whole numbers": (1, 0, torch.arange(3.0)),
    "on another device": (1, 0, torch.empty(3, dtype=torch.int64, device="meta")),
}


class TestHintsThatMakeNoSense:
    @pytest.mark.parametrize("what", NONSENSE)
    def test_are_passed_over_and_logged_once(
        self, what: str, folder: Path, want: list[Tensor], caplog: pytest.LogCaptureFixture
    ) -> None:
        layer, steps, ids = NONSENSE[what]
        names = Names(lambda: Prediction(layer=layer, steps=steps, expert_ids=ids, scores=torch.zeros(ids.shape)))
        model = promoe_triton.from_pretrained(folder, slots=2 * LAYERS, predictor=names)
        assert equal(logits(model), want)
        assert not any(tally.issued for tally in model._promoe_runtime.core.tallies())
        (record,) = [r for r in caplog.records if r.name == "promoe_triton.prefetch"]
        assert f"got layer {layer}, steps {steps}" in record.getMessage()

    @pytest.mark.parametrize("expert", [-1, -EXPERTS - 1, EXPERTS, 10**12])
    def test_no_expert_of_the_layer(self, expert: int, folder: Path, want: list[Tensor]) -> None:
        ids = torch.tensor([expert])
        names = Names(lambda: Prediction(layer=1, steps=0, expert_ids=ids, scores=torch.zeros(1)))
        model = promoe_triton.from_pretrained(folder, slots=2 * LAYERS, predictor=names)
        assert equal(logits(model), want)
        assert not any(tally.issued for tally in model._promoe_runtime.core.tallies())


class TestFaults:
    def test_what_a_layer_waits_for_fails_with_an_error_and_the_next_call_works(
        self, folder: Path, want: list[Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken = [False]
        faked(monkeypatch, fault=lambda chunk: OSError(5, "bad sector") if broken[0] else None)
        model = promoe_triton.from_pretrained(folder, slots=2 * LAYERS, predictor="gate")
        for _ in range(3):
            broken[0] = True
            with pytest.raises(PromoeError, match=r"expert \d of MoE layer \d could not be read: .*bad sector"):
                logits(model)
            broken[0] = False
            assert equal(logits(model), want)

    def test_an_interruption_while_something_is_copied_ahead(
        self, folder: Path, want: list[Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ctrl-C between any two chunks."""
        for at in range(0, 60, 7):
            left = [-1]

            def interrupt(chunk: Chunk, left: list[int] = left) -> float:
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
                return 0.0

            faked(monkeypatch, bandwidth=1e8, jitter=interrupt)
            model = promoe_triton.from_pretrained(folder, slots=3 * LAYERS, predictor="gate", depth=2)
            left[0] = at + 1
            with pytest.raises(KeyboardInterrupt):
                [logits(model) for _ in range(9)]
            assert equal(logits(model), want)

    @torch.no_grad()
    def test_two_models_do_not_disturb_each_other(self, folder: Path, want: list[Tensor]) -> None:
        first = promoe_triton.from_pretrained(folder, slots=2 * LAYERS, predictor="gate")
        second = promoe_triton.from_pretrained(folder, slots=3 * LAYERS, predictor="history")
        assert equal(logits(first), want)
        assert promoe_triton.stats(second).run_seconds == 0.0
        out, other = first(PROMPT, use_cache=True), second(PROMPT, use_cache=True)
        for _ in range(STEPS):  # a step of each in turn
            token = out.logits[:, -1:].argmax(-1)
            out = first(token, past_key_values=out.past_key_values, use_cache=True)
            other = second(token, past_key_values=other.past_key_values, use_cache=True)
            assert torch.equal(out.logits, other.logits)
        promoe_triton.unpatch(first)
        assert equal(logits(second), want)

    def test_a_fault_of_one_model_is_none_of_another(
        self, folder: Path, want: list[Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken = [False]
        faked(monkeypatch, fault=lambda chunk: OSError(5, "bad sector") if broken[0] else None)
        first = promoe_triton.from_pretrained(folder, slots=2 * LAYERS, predictor="gate")
        monkeypatch.undo()
        second = promoe_triton.from_pretrained(folder, slots=2 * LAYERS, predictor="gate")
        broken[0] = True
        for _ in range(2):
            with pytest.raises(PromoeError, match="bad sector"):
                logits(first)
            assert equal(logits(second), want)
        broken[0] = False
        assert equal(logits(first), want)

    @torch.no_grad()
    def test_a_real_disk_held_to_a_bandwidth_is_no_faster(self, folder: Path) -> None:
        model = promoe_triton.from_pretrained(folder, slots=LAYERS, warm=False, bandwidth="2MB/s", depth=3)
        began = time.perf_counter()
        logits(model)
        taken, moved = time.perf_counter() - began, promoe_triton.stats(model).bytes_read
        assert moved > 400_000
        assert taken >= moved / 2e6

    def test_nothing_grows(self, folder: Path) -> None:
        model = promoe_triton.from_pretrained(folder, slots=3 * LAYERS, predictor="gate")
        core = model._promoe_runtime.core

        def sizes() -> list[int]:
            core.tallies()
            return [
                len(held) for held in (*core._expected, *core._cold, core._unproven, core._on_way, core.queue._progress)
            ]

        def ways() -> int:
            return sum(map(len, core.admission._standings.values()))

        generator = torch.Generator().manual_seed(1)

        def run(times: int) -> None:
            for _ in range(times):
                logits(model, torch.randint(64, (1, 4), generator=generator))

        run(10)
        gc.collect()
        objects, known = len(gc.get_objects()), ways()
        run(30)
        gc.collect()
        assert max(sizes()) <= LAYERS * EXPERTS
        assert ways() == known
        assert len(gc.get_objects()) < objects + 300
        assert all(core.queue.rank(transfer) != URGENT for transfer in core.queue)


class Truth:
    """Names what the next layer will choose for PROMPT and what follows it, and nothing else: it was listened to."""

    def __init__(self) -> None:
        self._chosen: list[tuple[int, list[int]]] = []
        stock = build()
        for layer, block in enumerate(stock.model.layers):
            block.mlp.gate.register_forward_hook(self._listen(layer))
        logits(stock)
        self._next = 0

    def _listen(self, layer: int) -> Callable[..., None]:
        return lambda router, args, output: self._chosen.append((layer, output[2].flatten().unique().tolist()))

    def predict(self, seen: Observation) -> Sequence[Prediction]:
        if seen.seam is not Seam.ROUTED:
            return []
        self._next = (self._next + 1) % len(self._chosen)
        layer, experts = self._chosen[self._next]
        return [Prediction(layer=layer, steps=0, expert_ids=torch.tensor(experts), scores=torch.zeros(len(experts)))]


class TestOnAKnownLink:
    """Before a layer routes, `COMPUTING` seconds pass, in which the wire brings as many experts as a token needs."""

    COMPUTING = 1e-3
    EXPERT = 3 * 32 * 32 * 2
    BANDWIDTH = TOP * EXPERT / COMPUTING
    BUSY = STEPS * (LAYERS - 1) * COMPUTING  # a pass is timed from its first experts on

    @torch.no_grad()
    def decode(self, monkeypatch: pytest.MonkeyPatch, folder: Path, **options: Any) -> tuple[Stats, Stats]:
        """Return the statistics before and after the decode steps of the third time the same text is decoded."""
        made = faked(monkeypatch, bandwidth=options.pop("wire", self.BANDWIDTH))
        options = {"slots": 4 * LAYERS, "distance": 1, "always_predict": True} | options
        model = promoe_triton.from_pretrained(folder, **options)
        computing(model, made.links[0], self.COMPUTING)
        logits(model)
        logits(model)
        out = model(PROMPT, use_cache=True)
        before = promoe_triton.stats(model)
        for _ in range(STEPS):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return before, promoe_triton.stats(model)

    def test_what_is_missed_is_waited_for(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before, after = self.decode(monkeypatch, folder, predictor="none")
        stalled, missed = after.stall_seconds - before.stall_seconds, after.misses - before.misses
        assert missed > STEPS
        assert stalled == pytest.approx(missed * self.EXPERT / self.BANDWIDTH)
        assert after.run_seconds - before.run_seconds == pytest.approx(self.BUSY + stalled)
        assert after.bytes_read - before.bytes_read == missed * self.EXPERT

    def test_a_perfect_prediction_hides_all_copies(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before, after = self.decode(monkeypatch, folder, predictor=Truth())
        assert after.stall_seconds == before.stall_seconds
        assert after.run_seconds - before.run_seconds == pytest.approx(self.BUSY)
        assert after.ahead.wasted == 0

    def test_a_predictor_that_is_never_right_is_hardly_asked_any_more(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = [0]

        def wrong() -> Prediction:
            asked[0] += 1
            return chance()

        chance = anything(0)._choose
        faked(monkeypatch, bandwidth=self.BANDWIDTH)
        model = promoe_triton.from_pretrained(folder, slots=LAYERS, predictor=Names(wrong), always_predict=True)
        asks = []
        for _ in range(40):
            asked[0] = 0
            logits(model)
            asks.append(asked[0])
        assert sum(asks[-10:]) < sum(asks[:10]) / 2

    @torch.no_grad()
    def test_predictions_that_cost_more_than_they_bring_become_rare(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A right prediction that takes longer than the copy it hides: passes with it are slower."""
        steps, texts = 60, 2
        monkeypatch.setitem(globals(), "STEPS", steps)
        made = faked(monkeypatch, bandwidth=self.BANDWIDTH)

        class Slow(Truth):
            stateless = True

            def predict(self, seen: Observation) -> Sequence[Prediction]:
                made.links[-1].pass_time(TestOnAKnownLink.COMPUTING)
                return super().predict(seen)

        def decode(**options: Any) -> tuple[float, int]:
            """Return the time and the passes with predictions of two texts, after two."""
            model = promoe_triton.from_pretrained(folder, slots=4 * LAYERS, distance=1, **options)
            link = made.links[-1]
            computing(model, link, self.COMPUTING)
            for _ in range(texts):
                logits(model)
            began, before = link.now(), promoe_triton.stats(model).predicted
            for _ in range(texts):
                logits(model)
            return link.now() - began, promoe_triton.stats(model).predicted - before

        none, _ = decode(predictor="none")
        always, every = decode(predictor=Slow(), always_predict=True)
        tried, few = decode(predictor=Slow())
        assert every == texts * (1 + steps), "one of them a short prompt"
        assert few <= every / 8
        assert always > 1.05 * none
        assert tried < 1.02 * none


class TestWhereAllIsResident:
    """Nobody is asked what layers will need that have all of it."""

    @staticmethod
    def asked(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Seam]]:
        asked: list[tuple[int, Seam]] = []
        predictor = model._promoe_runtime.prefetcher._predictor
        predict = type(predictor).predict

        def noted(self: Any, seen: Observation) -> Sequence[Prediction]:
            asked.append((seen.layer, seen.seam))
            found: Sequence[Prediction] = predict(self, seen)
            return found

        monkeypatch.setattr(type(predictor), "predict", noted)
        logits(model)
        return asked

    def test_of_the_whole_model(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = promoe_triton.from_pretrained(folder, slots=LAYERS * EXPERTS, predictor="gate", always_predict=True)
        assert model._promoe_runtime.is_settled
        assert self.asked(model, monkeypatch) == []

    def test_of_the_layers_in_reach(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        options: dict[str, Any] = {"predictor": "gate", "distance": 1, "always_predict": True}
        model = promoe_triton.from_pretrained(folder, slots=LAYERS * (EXPERTS - 1), **options)
        before = self.asked(model, monkeypatch)
        assert {layer for layer, seam in before if seam is Seam.ROUTED} == {*range(LAYERS)}
        model._promoe_runtime.layers[1].resident = True
        after = self.asked(model, monkeypatch)
        assert (0, Seam.ROUTED) not in after, "it speaks of layer 1 alone"
        assert {layer for layer, seam in after if seam is Seam.ROUTED} == {*range(1, LAYERS)}


BEFORE, PROMPTED, TEXT = 80, 592, 624
"""Up to where texts are decoded, then read as a prompt, and decoded again; the last 32 tokens of both are compared."""


@functools.cache
def texts() -> list[list[int]]:
    ids = AutoTokenizer.from_pretrained(MODEL)((MODEL.parent / "heldout.txt").read_text())["input_ids"]
    return [ids[start : start + TEXT] for start in range(0, 60_000, 10_000)]


@torch.no_grad()
@pytest.mark.parametrize(("slots", "least"), [(0.5, 0.8), (0.25, 0.75)])
def test_a_prompt_leaves_in_slots_what_decoding_needs(slots: float, least: float) -> None:
    """On real text: the 32 tokens after a prompt of 512 find what the 32 before it found."""

    def hit_ratio(model: Any, tokens: Sequence[int], cache: Any) -> tuple[float, Any]:
        before = promoe_triton.stats(model)
        for token in tokens:
            cache = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).past_key_values
        after = promoe_triton.stats(model)
        hits, misses = after.hits - before.hits, after.misses - before.misses
        return hits / (hits + misses), cache

    found = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = faked(monkeypatch, bandwidth=1e9)
        for text in texts():
            model = promoe_triton.from_pretrained(MODEL, slots=slots, always_predict=True)
            computing(model, made.links[-1], 1e-3)
            _, cache = hit_ratio(model, text[: BEFORE - 32], None)
            before, cache = hit_ratio(model, text[BEFORE - 32 : BEFORE], cache)
            cache = model(torch.tensor([text[BEFORE:PROMPTED]]), past_key_values=cache, use_cache=True).past_key_values
            after, _ = hit_ratio(model, text[PROMPTED:], cache)
            found.append((before, after))
    assert mean(after for _, after in found) >= mean(before for before, _ in found) > least


@pytest.fixture(scope="module")
def routes() -> list[list[Tensor]]:
    """Which experts the texts' tokens choose: of each text, by layer, int64[T, A]."""
    found: list[list[Tensor]] = []
    stock = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    for layer in stock.model.layers:
        layer.mlp.gate.register_forward_hook(lambda router, args, output: found[-1].append(output[2]))
    for text in texts():
        found.append([])
        with torch.no_grad():
            stock(torch.tensor([text]))
    return found


def hit_ratio_after(ids: list[Tensor], policy: str, slots: int, prompt: int) -> float:
    """Of the last tokens, where so many before them are read at once, and all others one by one."""
    core = Core([SlotTable(range(slots), make_policy(policy, {})) for _ in ids], lambda _: Cuts(ends=(1,)))
    hits = asked = 0
    for begin in (*range(PROMPTED - prompt + 1), *range(PROMPTED, TEXT)):
        end = PROMPTED if begin == PROMPTED - prompt else begin + 1
        for layer, ids_TA in enumerate(ids):
            experts = ids_TA[begin:end].unique().tolist()
            needs = core.gate(
                layer, experts, ids_TA[begin:end][-RECENT:].flatten().tolist() if end - begin > 1 else None
            )
            if begin >= PROMPTED:
                hits, asked = hits + len(needs.resident), asked + len(experts)
            for key in needs.missing:
                core.ask(key, Part.WHOLE)
            while drive(core):
                pass
            for key, part in itertools.product(needs.streamed, (Part.UP, Part.DOWN)):
                core.ask(key, part)
                while drive(core):
                    pass
                core.discard(key)
            core.release([*needs.resident, *needs.missing])
    return hits / asked


@pytest.mark.parametrize("slots", [32, 16])
@pytest.mark.parametrize("policy", ["predicted", "lru"])
def test_a_prompt_leaves_in_slots_what_decoding_it_would(policy: str, slots: int, routes: list[list[Tensor]]) -> None:
    """Without predictions. Not what was there before: texts go on about something else.

    A prompt gives up no expert that it finds, so that of LRU caches it leaves not quite the least recently used.
    """
    at_once, one_by_one = (mean(hit_ratio_after(ids, policy, slots, prompt) for ids in routes) for prompt in (512, 1))
    assert at_once >= one_by_one - 0.005
