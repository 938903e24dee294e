"""Predictors: the gate is the model's own router, tables learn what followed, bounds are bounds."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import FAMILIES, randomise

import promoe_triton
from promoe_triton.core import Needs
from promoe_triton.demo import MODEL
from promoe_triton.patch._families import describe
from promoe_triton.patch._swap import find_experts
from promoe_triton.predictors import (
    Gate,
    GatePredictor,
    Gates,
    HistoryPredictor,
    NoPredictor,
    OraclePredictor,
    RandomPredictor,
    Reach,
    RoutedLayers,
    RoutingRecorder,
    Taps,
    TokenPredictor,
    TokenRoutes,
    find_layers,
    read_gates,
)
from promoe_triton.predictors.norms import Norm, Standard
from promoe_triton.predictors.places import find_place, run_router
from promoe_triton.predictors.scoring import Rule, Scoring
from promoe_triton.protocols import ExpertKey, Observation, Prediction, Predictor, Seam

TOKENS = 7
UNPATCHABLE = ("switch_transformers", "nllb-moe", "doge", "vitpose")
# Families without a gate, and what is said about them.
REFUSED = {
    "axk2": "AXK2TopkRouter: AXK2GatedRMSNorm: its norm is no gain and shift of a standardised state",
    "zaya": "ZayaRouter is not one product: it has 4 matrices",
    "jetmoe": "JetMoeTopKGating gives no experts per token",
    "qwen4_exp_text": "Qwen4ExpTextTopKRouter: no norm is known whose output it is given",
    "qwen4_exp": "Qwen4ExpTextTopKRouter: no norm is known whose output it is given",
}
# Families whose experts are not called with a choice per token.
OTHER_CALLS = ("llama4_text", "llama4", "jetmoe")


def build(name: str) -> Any:
    """A tiny model whose norms differ from each other, so that one taken for another is noticed."""
    torch.manual_seed(0)
    model = FAMILIES[name].build()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" in path:
                parameter.add_(torch.empty_like(parameter).uniform_(0.2, 0.9))
    return model


def observe(model: nn.Module, run: Callable[[], Any]) -> list[Observation]:
    """Everything the taps show of one run, with the choice the experts were called with."""
    paths = list(find_experts(model))
    seen: list[Observation] = []
    taps = Taps(model, paths, seen.append)

    def called(_module: nn.Module, args: Any, layer: int) -> None:
        ids_TA = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else torch.empty(0, 1).long()
        observation = taps.routed(layer, ids_TA)
        if observation is not None:
            seen.append(observation)

    handles = [
        model.get_submodule(path).register_forward_pre_hook(functools.partial(called, layer=layer))
        for layer, path in enumerate(paths)
    ]
    with torch.no_grad():
        run()
    taps.remove()
    for handle in handles:
        handle.remove()
    return seen


def gates_of(model: nn.Module) -> Gates:
    return read_gates(model, {path: layout.experts for path, layout in find_experts(model).items()})


def same_choice(scores_TE: Tensor, ids_TA: Tensor) -> bool:
    """Whether ids are the best by score, where rounding may swap what differs by less than 1e-5."""
    best_TA = scores_TE.topk(ids_TA.shape[1]).values
    return bool((scores_TE.gather(1, ids_TA) >= best_TA[:, -1:] - 1e-5).all())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in UNPATCHABLE])
def test_gate_is_the_router(name: str) -> None:
    model = build(name)
    found = find_experts(model)
    paths = list(found)
    gates = gates_of(model)
    assert set(gates.refused.values()) == ({REFUSED[name]} if name in REFUSED else set())
    assert set(gates.refused) == {path for path, gate in zip(paths, gates.layers, strict=True) if gate is None}

    norms: dict[int, tuple[Tensor, Tensor]] = {}
    handles = []
    for layer, path in enumerate(paths):
        if (norm := find_place(model, path).norm) is not None and gates.layers[layer] is not None:
            handles.append(
                model.get_submodule(norm).register_forward_hook(
                    lambda _m, args, out, layer=layer: norms.update({layer: (args[0], out)})
                )
            )
    seen = observe(model, lambda: model(**FAMILIES[name].inputs(model, TOKENS)))
    for handle in handles:
        handle.remove()
    routed = {o.layer: o for o in seen if o.seam is Seam.ROUTED}
    active = find_layers(model, {path: layout.experts for path, layout in found.items()}).active
    for layer, observation in routed.items():
        ids_TA, gate = observation.expert_ids_TA, gates.layers[layer]
        assert ids_TA is not None
        assert name in OTHER_CALLS or ids_TA.shape[1] == active[layer]
        if gate is None:
            continue
        u_TD = gate.norm.undo(observation.state_TD)
        assert gate.norm.standard is Standard.NONE or abs(float(u_TD.square().mean()) - 1) < 0.01
        if isinstance(gate, TokenRoutes):
            continue
        # Distance 0: the choice of the router, with its bias and groups, from the state it was given.
        place = find_place(model, paths[layer])
        block, router = model.get_submodule(place.block), model.get_submodule(place.router or "")
        with torch.no_grad():
            assert same_choice(gate.scores(u_TD), run_router(router, block, observation.state_TD))
        if name not in OTHER_CALLS:
            assert same_choice(gate.scores(u_TD), ids_TA)
        if not gate.norm.inside and layer in norms:
            _check_folding(model, gates, paths, layer, u_TD, *norms[layer])


def _check_folding(
    model: nn.Module, gates: Gates, paths: Sequence[str], layer: int, u_TD: Tensor, residual: Tensor, normed: Tensor
) -> None:
    """The router of every layer of the stack, asked on u, is that router behind its own norm of the residual."""
    if residual.numel() != u_TD.numel():
        return  # the router is given some of the tokens
    residual = residual.reshape(u_TD.shape)
    for other, gate in enumerate(gates.layers):
        if not isinstance(gate, Gate) or gates.stacks[other] != gates.stacks[layer] or gate.norm.inside:
            continue
        place = find_place(model, paths[other])
        norm = model.get_submodule(place.norm or "")
        block, router = model.get_submodule(place.block), model.get_submodule(place.router or "")
        matrix = next(p for p in router.parameters() if p.squeeze().dim() == 2)
        with torch.no_grad():
            own_TD = norm(residual)
            logits = own_TD @ matrix.T
            folded = u_TD @ gate.weight_GD.T + gate.bias_G
            if getattr(router, "bias", None) is None:
                torch.testing.assert_close(folded, logits[:, : folded.shape[1]], rtol=1e-4, atol=1e-4)
            assert same_choice(gate.scores(u_TD), run_router(router, block, own_TD))
            # The same from the residual stream itself, as it is seen before attention.
            torch.testing.assert_close(gates_norm(gates, layer).standardise(residual), u_TD, rtol=1e-3, atol=1e-4)


def gates_norm(gates: Gates, layer: int) -> Any:
    gate = gates.layers[layer]
    assert gate is not None
    return gate.norm


@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [
        pytest.param("laguna", "router_logit_softcapping", 0.3, id="softcap"),
        pytest.param("muse_spark", "output_multiplier", 6.0, id="multiplier"),
    ],
)
def test_logits_are_bent_before_scoring(name: str, attribute: str, value: float) -> None:
    model = build(name)
    for module in model.modules():
        if hasattr(module, attribute):
            setattr(module, attribute, value)
    gates = gates_of(model)
    assert not gates.refused
    for o in observe(model, lambda: model(**FAMILIES[name].inputs(model, 60))):
        gate = gates.layers[o.layer]
        if o.seam is Seam.ROUTED and isinstance(gate, Gate) and o.expert_ids_TA is not None:
            assert same_choice(gate.scores(gate.norm.undo(o.state_TD)), o.expert_ids_TA)


def test_reading_a_model_leaves_it_alone() -> None:
    model = build("gemma4_text")
    calls: list[nn.Module] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _args: calls.append(module))
        module.register_forward_hook(lambda module, _args, _out: calls.append(module))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    gates_of(model)
    assert not calls
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_refusals_are_of_families_that_exist() -> None:
    assert set(REFUSED) <= set(FAMILIES)
    for name in UNPATCHABLE:
        if name in FAMILIES:
            with pytest.raises(Exception, match="cannot be patched"):
                [describe(m) for m in build(name).modules()]


@pytest.mark.parametrize("change", ["another norm", "other weights", "none"])
def test_a_layer_that_is_not_what_was_read_is_refused(change: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build("qwen3_moe")
    gates = gates_of(model)
    seen = observe(model, lambda: model(**FAMILIES["qwen3_moe"].inputs(model, 40)))
    first = gates.layers[0]
    assert isinstance(first, Gate)
    match change:
        case "another norm":
            first = dataclasses.replace(first, norm=dataclasses.replace(first.norm, gain_D=first.norm.gain_D * 1.5))
        case "other weights":
            first = dataclasses.replace(first, weight_GD=-first.weight_GD)
    predictor = GatePredictor(dataclasses.replace(gates, layers=(first, *gates.layers[1:])), Reach(distance=1))
    with caplog.at_level(logging.WARNING):
        said = [o.layer for o in seen for _ in predictor.predict(o) if o.seam is Seam.ROUTED]
    assert said == ([] if change != "none" else [0])
    assert ("Qwen3MoeTopKRouter" in caplog.text) == (change != "none")


def test_a_gate_whose_rule_is_unknown_is_refused() -> None:
    model = build("mixtral")
    router = model.model.layers[1].mlp.gate
    original = type(router)

    class LowestRouter(original):  # type: ignore[misc,valid-type]
        def forward(self, hidden_states: Tensor) -> Any:
            logits, weights, ids = super().forward(hidden_states)
            return logits, weights, (ids + 1) % 6

    router.__class__ = LowestRouter
    gates = gates_of(model)
    assert gates.layers[0] is not None
    assert list(gates.refused.values()) == [
        "LowestRouter: its own choice is not reproduced from its weights by any rule known"
    ]
    # Nothing is said of a layer without a gate, nor from it.
    seen = observe(model, lambda: model(**FAMILIES["mixtral"].inputs(model, 3)))
    predictor = GatePredictor(gates, Reach(distance=1))
    targets = {p.layer for o in seen for p in predictor.predict(o)}
    assert targets == {0}


def hashing(layers: int) -> Any:
    """DeepSeek V4, of which so many layers route by token; 3 of them in what is published."""
    model = build("deepseek_v4")
    config = copy.deepcopy(model.config)
    config.mlp_layer_types = ["hash_moe"] * layers + ["moe"] * (1 if layers > 1 else 2)
    config.num_hidden_layers = len(config.mlp_layer_types)
    config.layer_types = (config.layer_types + ["sliding_attention"])[: config.num_hidden_layers]
    model = type(model)(config).eval()
    randomise(model)
    return model


@pytest.mark.parametrize("hashed", [1, 3])
def test_hash_layers_are_predicted_exactly_from_token_ids(hashed: int) -> None:
    model = hashing(hashed)
    gates = gates_of(model)
    assert [type(gate) for gate in gates.layers][: hashed + 1] == [TokenRoutes] * hashed + [Gate]
    layers = range(len(gates.layers))
    inputs = FAMILIES["deepseek_v4"].inputs(model, TOKENS)
    seen = observe(model, lambda: model(**inputs))
    # Its residual stream is several: before attention the tokens are all there is to see.
    assert [(o.layer, o.seam) for o in seen] == [(i, seam) for i in layers for seam in (Seam.ENTERED, Seam.ROUTED)]
    before, routed = seen[:2]
    assert before.state_TD is None
    ids_TA = routed.expert_ids_TA
    assert ids_TA is not None
    chosen = {o.layer: o.expert_ids_TA for o in seen if o.expert_ids_TA is not None}
    assert hashed == 1 or not torch.equal(chosen[1], chosen[2])
    predictor = GatePredictor(gates, Reach(distance=1))
    said = [(o.layer, o.seam, p) for o in seen for p in predictor.predict(o) if p.layer < hashed]
    places = [(layer, seam, p.layer) for layer, seam, p in said]
    assert places[:1] == [(0, Seam.ENTERED, 0)]
    assert {(i, Seam.ROUTED, i + 1) for i in range(hashed - 1)} <= {*places}
    for _, _, p in said:
        counts = torch.bincount(chosen[p.layer].flatten(), minlength=6).float()
        asked = p.scores > 0
        assert torch.equal(p.scores[asked], counts[p.expert_ids[asked]])
        assert {*p.expert_ids.tolist()} - {-1} == {*chosen[p.layer].flatten().tolist()}, "no others, to fill up"
    assert not GatePredictor(gates, Reach(distance=1)).predict(dataclasses.replace(before, token_ids_T=ids_TA[:0, 0]))
    assert [p.layer for p in GatePredictor(gates, Reach(distance=1)).predict(routed)] == [1]
    assert RandomPredictor(find_layers(model, dict.fromkeys(find_experts(model), 6)), Reach()).predict(before)


@pytest.mark.parametrize("hashed", [1, 3])
def test_hash_layers_are_copied_ahead_and_needed(hashed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a patched model, while it decodes: what layers that route by token need was predicted, and nothing else."""
    model = hashing(hashed)
    slots = 3 * model.config.num_hidden_layers
    patched = promoe_triton.patch(model, slots=slots, store="spool", predictor="gate", always_predict=True)
    core = patched._promoe_runtime.core
    gate, predict = core.gate, core.predict
    named: set[ExpertKey] = set()

    def gated(layer: int, *args: Any) -> Needs:
        needs: Needs = gate(layer, *args)
        if layer < hashed:
            assert {*needs.resident, *needs.missing, *needs.streamed} <= named
        return needs

    def predicted(position: int, ranked: Sequence[ExpertKey], *args: Any) -> bool:
        named.update(ranked)
        return bool(predict(position, ranked, *args))

    monkeypatch.setattr(core, "gate", gated)
    monkeypatch.setattr(core, "predict", predicted)
    inputs = FAMILIES["deepseek_v4"].inputs(model, 3)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        for token in range(12):
            named.clear()
            model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    for ahead in promoe_triton.stats(patched).copied_ahead[:hashed]:
        assert ahead.on_time + ahead.late > 5
        assert ahead.wasted == 0


@functools.cache
def demo() -> tuple[Any, list[Observation]]:
    """The packaged model and what is seen of it over 4 windows of held-out text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    text = (MODEL.parent / "heldout.txt").read_text()[20_000:40_000]
    ids = AutoTokenizer.from_pretrained(MODEL)(text, verbose=False)["input_ids"][: 4 * 512]
    seen = []
    for window in torch.tensor(ids).view(4, 512):
        seen += observe(model, functools.partial(model, window[None]))
    return model, seen


def token_by_token(seen: Sequence[Observation], tokens: int) -> list[Observation]:
    """What would have been seen had the first tokens of each pass been decoded one by one."""
    passes, per_pass = [], 17
    for i in range(0, len(seen), per_pass):
        for t in range(tokens):
            for o in seen[i : i + per_pass]:
                cut = {
                    f.name: v[t : t + 1] for f in dataclasses.fields(o) if isinstance(v := getattr(o, f.name), Tensor)
                }
                passes.append(dataclasses.replace(o, **cut))
    return passes


def accuracy(predictor: Predictor, seen: Sequence[Observation], skip: int = 0) -> dict[tuple[Seam, int], float]:
    """Share of predicted experts that were asked for, by seam and distance (LEFT: by layer), after `skip` passes."""
    right: dict[tuple[Seam, int], list[float]] = {}
    open_: dict[tuple[int, int], list[tuple[tuple[Seam, int], Prediction]]] = {}
    now = -1
    with torch.no_grad():
        for o in seen:
            now += o.layer == 0 and o.seam is Seam.ENTERED
            said = predictor.predict(o)
            if o.expert_ids_TA is not None:
                for key, p in open_.pop((now, o.layer), []):
                    if now >= skip:
                        right.setdefault(key, []).append(
                            torch.isin(p.expert_ids, o.expert_ids_TA).float().mean().item()
                        )
            for p in said:
                key = (o.seam, p.layer if o.seam is Seam.LEFT else p.layer - o.layer)
                open_.setdefault((now + p.steps, p.layer), []).append((key, p))
    return {key: sum(values) / len(values) for key, values in right.items()}


def test_gate_accuracy_on_real_text() -> None:
    model, seen = demo()
    # The card's values, over all of the held-out text: 78.4, 68.4, 60.9, 55.6 %.
    got = accuracy(GatePredictor(gates_of(model), Reach(distance=4)), token_by_token(seen, 128))
    for distance, bound in ((1, 0.75), (2, 0.65), (3, 0.58), (4, 0.52)):
        assert bound < got[Seam.ROUTED, distance] < bound + 0.07, got
    # Before attention the layer's own experts are nearly as certain as the next layer's after it.
    assert got[Seam.ENTERED, 0] > 0.71
    # The last layer's output knows little about the next token, but more than chance (12.5 %).
    assert all(got[Seam.LEFT, layer] > 0.15 for layer in range(4)), got


def test_bf16_gate_is_as_good() -> None:
    model, seen = demo()
    gates = gates_of(copy.deepcopy(model).bfloat16())
    assert {g.weight_GD.dtype for g in gates.layers if isinstance(g, Gate)} == {torch.bfloat16}
    cut = [dataclasses.replace(o, state_TD=o.state_TD.bfloat16()) for o in token_by_token(seen[:17], 64)]
    assert accuracy(GatePredictor(gates, Reach(distance=1)), cut)[Seam.ROUTED, 1] > 0.75


def test_tables_learn_from_real_text() -> None:
    model, seen = demo()
    layers = find_layers(model, {path: layout.experts for path, layout in find_experts(model).items()})
    reach, cut = Reach(distance=2), token_by_token(seen, 160)
    history = accuracy(HistoryPredictor(layers, reach), cut, skip=320)
    token = accuracy(TokenPredictor(layers, reach, model.config.vocab_size), cut, skip=320)
    assert history[Seam.ROUTED, 1] > 0.36
    assert history[Seam.LEFT, 0] > 0.22
    assert token[Seam.ENTERED, 0] > 0.45
    assert token[Seam.ROUTED, 1] > 0.45


def test_oracle_is_right_about_what_was_recorded_and_silent_about_the_rest() -> None:
    model, seen = demo()
    cut = token_by_token(seen[:17], 20)
    layers = find_layers(model, {path: layout.experts for path, layout in find_experts(model).items()})
    recorder = RoutingRecorder(passes=12)
    assert not [p for o in cut for p in recorder.predict(o)]
    assert len(recorder.recording) == 12
    oracle = OraclePredictor(recorder.recording, layers, Reach(distance=2))
    said = [(o, oracle.predict(o)) for o in cut]
    assert set(accuracy(OraclePredictor(recorder.recording, layers, Reach(distance=2)), cut).values()) == {1.0}
    assert all(len(p.expert_ids) == 8 for _, ps in said for p in ps)
    per_pass = 8 * 3 - 3 + 7 * 2 - 1 + 2  # before attention, routed, left: fewer at the end
    assert [sum(len(ps) for _, ps in said[i : i + 17]) for i in range(0, len(said), 17)] == [
        *[per_pass] * 11,
        per_pass - 2,
        *[0] * 8,
    ]


LAYERS = RoutedLayers(experts=(6, 6, 6), active=(2, 2, 2), stacks=("a", "a", "a"))


def routing(layer: int, *ids: Sequence[int], tokens: Sequence[int] | None = None) -> Observation:
    return Observation(
        layer=layer,
        seam=Seam.ROUTED,
        state_TD=torch.zeros(len(ids), 4),
        expert_ids_TA=torch.tensor(ids),
        token_ids_T=None if tokens is None else torch.tensor(tokens),
    )


def ids_of(predictions: Sequence[Prediction], layer: int, steps: int = 0) -> list[int]:
    return next(p.expert_ids.tolist() for p in predictions if (p.layer, p.steps) == (layer, steps))


def test_history_learns_what_follows_what() -> None:
    predictor = HistoryPredictor(LAYERS, Reach(distance=2))
    # Expert e of layer l is followed by e + 1 of the next one; the next token begins where this one ended, plus 2.
    e = 0
    for _ in range(30):
        for layer in range(3):
            predictor.predict(routing(layer, [(e + layer) % 6, (e + layer + 3) % 6]))
        e = (e + 4) % 6
    said = predictor.predict(routing(0, [1, 4]))
    assert sorted(ids_of(said, 1)) == [2, 5]
    assert sorted(ids_of(said, 2)) == [0, 3]
    predictor.predict(routing(1, [2, 5]))
    predictor.predict(routing(2, [3, 0]))
    left = predictor.predict(Observation(layer=2, seam=Seam.LEFT, state_TD=torch.zeros(1, 4)))
    assert [p.steps for p in left] == [1, 1]
    assert sorted(ids_of(left, 0, 1)) == [2, 5]
    assert sorted(ids_of(left, 1, 1)) == [0, 3]


def test_history_follows_each_token_its_own_way() -> None:
    predictor = HistoryPredictor(LAYERS, Reach(distance=1))
    for _ in range(5):
        # Two tokens at once; an id of E stands for no expert, and is neither learned nor predicted.
        predictor.predict(routing(0, [0, 1], [2, 6]))
        predictor.predict(routing(1, [3, 6], [4, 5]))
    assert ids_of(predictor.predict(routing(0, [0, 6])), 1)[0] == 3
    assert sorted(ids_of(predictor.predict(routing(0, [2, 6])), 1)) == [4, 5]


def test_history_does_not_guess_which_token_followed_which() -> None:
    predictor = HistoryPredictor(LAYERS, Reach(distance=1))
    for ids in ([[0, 1], [2, 3], [4, 5]], [[4, 5], [4, 5]], [[0, 2]]):
        for layer in range(3):
            predictor.predict(routing(layer, *ids))
    # Two tokens after three tell nothing; one after two follows the last of them.
    assert learned(predictor, 2, place=1) == [0, 0, 0, 0, 1, 1]
    # A layer that a pass left out was followed by nothing in it.
    before = learned(predictor, 0, place=0)
    assert sum(before) == 2 * 6
    predictor.predict(routing(1, [3, 4]))
    assert learned(predictor, 0, place=0) == before


def learned(predictor: HistoryPredictor, layer: int, place: int) -> list[float]:
    """How many tokens have been seen after each of a layer's experts."""
    table = predictor._table
    assert table is not None
    return table._seen_W[predictor._rows(layer, torch.arange(6), place)].tolist()


def test_token_table_learns_and_sums_over_tokens() -> None:
    predictor = TokenPredictor(LAYERS, Reach(distance=2), vocabulary=50)
    for _ in range(3):
        for layer in range(3):
            predictor.predict(routing(layer, [layer, layer + 1], [5, 4], [5, 3], tokens=[7, 8, 9]))
    entered = Observation(layer=0, seam=Seam.ENTERED, state_TD=torch.zeros(1, 4), token_ids_T=torch.tensor([7]))
    said = predictor.predict(entered)
    assert [sorted(ids_of(said, layer)) for layer in range(3)] == [[0, 1], [1, 2], [2, 3]]
    both = predictor.predict(dataclasses.replace(entered, state_TD=torch.zeros(2, 4), token_ids_T=torch.tensor([8, 9])))
    assert ids_of(both, 0)[0] == 5
    assert len(ids_of(both, 0)) == 4
    # An unknown token is taken for the average one: 5 was asked for most often.
    assert ids_of(predictor.predict(dataclasses.replace(entered, token_ids_T=torch.tensor([40]))), 0)[0] == 5
    assert predictor.predict(dataclasses.replace(entered, token_ids_T=None)) == ()
    assert predictor.predict(dataclasses.replace(entered, seam=Seam.LEFT)) == ()


def test_tables_stay_bounded() -> None:
    token = TokenPredictor(LAYERS, Reach(distance=2), vocabulary=100_000, nbytes=2000)
    history = HistoryPredictor(LAYERS, Reach(distance=2))
    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for i in range(150):
        for layer in range(3):
            ids = torch.rand(5, 6, generator=generator).argsort(1)[:, :2].tolist()
            o = routing(layer, *ids, tokens=range(5 * i, 5 * i + 5))
            assert len(token.predict(o)) == len(history.predict(o)) == 2 - layer
        sizes.add((token.nbytes, history.nbytes))
    assert len(sizes) == 1
    assert token.nbytes <= 2000
    assert history.nbytes <= 4 * 3 * 2 * 2 * 7 * 8 + 500
    with pytest.raises(ValueError, match="bytes, got nbytes=100"):
        TokenPredictor(LAYERS, Reach(), vocabulary=10, nbytes=100)


def test_tokens_that_share_a_slot_do_not_mix() -> None:
    predictor = TokenPredictor(LAYERS, Reach(distance=2), vocabulary=100_000, nbytes=2000)
    slots = predictor._slots
    for _ in range(20):
        predictor.predict(routing(0, [0, 1], tokens=[3]))
    entered = Observation(layer=0, seam=Seam.ENTERED, state_TD=torch.zeros(1, 4), token_ids_T=torch.tensor([3]))
    assert sorted(ids_of(predictor.predict(entered), 0)) == [0, 1]
    predictor.predict(routing(0, [4, 5], tokens=[3 + slots]))
    later = dataclasses.replace(entered, token_ids_T=torch.tensor([3 + slots]))
    assert sorted(ids_of(predictor.predict(later), 0)) == [4, 5]
    # Within one call the highest id has the slot, and the other is not counted as it.
    for _ in range(3):
        predictor.predict(routing(0, [0, 1], [2, 3], [0, 1], [0, 1], tokens=[3, 3 + slots, 3, 3]))
    assert sorted(ids_of(predictor.predict(later), 0)) == [2, 3]


def test_tables_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promoe_triton.predictors.tables.HALF_LIFE", 8)
    predictor = TokenPredictor(LAYERS, Reach(distance=2), vocabulary=10)
    entered = Observation(layer=0, seam=Seam.ENTERED, state_TD=torch.zeros(1, 4), token_ids_T=torch.tensor([3]))
    for _ in range(4000):
        predictor.predict(routing(0, [0, 1], tokens=[3]))
    for _ in range(60):
        predictor.predict(routing(0, [4, 5], tokens=[3]))
    assert sorted(ids_of(predictor.predict(entered), 0)) == [4, 5]


def test_random_is_seeded_and_uniform() -> None:
    o = routing(0, [0, 1])
    one, same, other = (RandomPredictor(LAYERS, Reach(distance=2), seed=s) for s in (1, 1, 2))
    drawn = [[p.expert_ids.tolist() for p in r.predict(o)] for r in (one, same, other) for _ in range(600)]
    assert drawn[:600] == drawn[600:1200] != drawn[1200:]
    counts = torch.bincount(torch.tensor(drawn[:600]).flatten(), minlength=6)
    assert counts.sum() == 600 * 2 * 2
    assert (counts - 400).abs().max() < 80
    assert all(len(set(ids)) == 2 for ids in drawn[0])


def test_none_says_nothing() -> None:
    assert NoPredictor().predict(routing(0, [0, 1])) == ()


def test_gate_scores_are_summed_over_tokens() -> None:
    model = build("deepseek_v3")  # groups: a token gives nothing to experts that it cannot choose
    gates = gates_of(model)
    seen = observe(model, lambda: model(**FAMILIES["deepseek_v3"].inputs(model, 5)))
    first = next(o for o in seen if o.seam is Seam.ROUTED)
    assert first.state_TD is not None
    later = gates.layers[1]
    assert isinstance(later, Gate)
    (said,) = GatePredictor(gates, Reach(distance=1, width=6)).predict(first)
    scores_TE = later.scores(gates_norm(gates, 0).undo(first.state_TD))
    summed_E = torch.stack([s.masked_fill(s.isinf(), 0.0) for s in scores_TE]).sum(0)
    assert said.expert_ids.tolist() == summed_E.argsort(descending=True).tolist()
    torch.testing.assert_close(said.scores, summed_E.sort(descending=True).values)
    (narrow,) = GatePredictor(gates, Reach(distance=1)).predict(first)
    assert len(narrow.expert_ids) == 6  # 2 experts for each of 5 tokens, of 6
    one = dataclasses.replace(first, state_TD=first.state_TD[:1], expert_ids_TA=first.expert_ids_TA[:1])  # type: ignore[index]
    (single,) = GatePredictor(gates, Reach(distance=1)).predict(one)
    assert sorted(single.expert_ids.tolist()) == sorted(scores_TE[0].topk(2).indices.tolist())


@pytest.mark.parametrize("seam", [Seam.ENTERED, Seam.LEFT])
def test_the_residual_stream_is_normed_before_it_is_asked_about(seam: Seam) -> None:
    model = build("mixtral")
    seen = observe(model, lambda: model(**FAMILIES["mixtral"].inputs(model, 5)))
    o = seen[0] if seam is Seam.ENTERED else seen[-1]
    assert o.seam is seam
    said = GatePredictor(gates_of(model), Reach(distance=2, width=6)).predict(o)
    assert [(p.layer, p.steps) for p in said] == [(i, int(seam is Seam.LEFT)) for i in range(2)]
    for p in said:
        layer = model.model.layers[p.layer]
        with torch.no_grad():
            scores_TE = layer.mlp.gate(layer.post_attention_layernorm(o.state_TD))[0].softmax(-1)
        torch.testing.assert_close(p.scores, scores_TE.sum(0)[p.expert_ids], rtol=1e-4, atol=1e-5)
        assert (p.scores.diff() <= 0).all()


def test_a_product_with_u_is_one_with_what_a_router_was_given() -> None:
    gain_D, weight_DG = torch.rand(4) + 0.5, torch.randn(4, 3)
    norm = Norm(standard=Standard.RMS, gain_D=gain_D, shift_D=torch.zeros(4), eps=0.0, inside=False)
    assert norm.is_gain
    x_TD = norm.standardise(torch.randn(5, 4)) * gain_D
    torch.testing.assert_close(x_TD @ norm.folded(weight_DG), norm.undo(x_TD) @ weight_DG, rtol=1e-4, atol=1e-5)
    assert not dataclasses.replace(norm, inside=True).is_gain, (
        "a router that norms by itself is given what is not normed"
    )
    shifted = dataclasses.replace(norm, standard=Standard.MEAN_VARIANCE, shift_D=torch.randn(4))
    assert not shifted.is_gain, "where something has to cancel, it is done element by element"


def test_group_limits() -> None:
    rule = Rule(scoring=Scoring.LOGITS, active=2, groups=2, kept=1)
    scores = rule.scores(torch.tensor([[9.0, 0.0, 0.0, 6.0, 5.0, 1.0]]), None)
    assert scores.topk(2).indices.tolist() == [[3, 4]]  # 6 + 5 beats 9 + 0
    assert scores[0, :3].isinf().all()


def test_taps_show_the_seams_in_order_and_come_off() -> None:
    model = build("qwen3_moe")
    seen = observe(model, lambda: model(**FAMILIES["qwen3_moe"].inputs(model, TOKENS)))
    seams = [(o.layer, o.seam) for o in seen]
    assert seams == [
        (0, Seam.ENTERED),
        (0, Seam.ROUTED),
        (1, Seam.ENTERED),
        (1, Seam.ROUTED),
        (1, Seam.LEFT),
    ]
    ids = FAMILIES["qwen3_moe"].inputs(model, TOKENS)["input_ids"].flatten()
    assert all(o.token_ids_T is not None and torch.equal(o.token_ids_T, ids) for o in seen)
    embedded = model.model.embed_tokens(ids)
    torch.testing.assert_close(seen[0].state_TD, embedded)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # Without tokens nothing is said of the last ones.
    inputs = FAMILIES["qwen3_moe"].inputs(model, TOKENS)
    bare = observe(model, lambda: (model(**inputs), model(inputs_embeds=embedded[None])))
    assert [o.token_ids_T is None for o in bare] == [False] * 5 + [True] * 5


def test_experts_that_share_a_decoder_layer_are_seen_when_they_route() -> None:
    model = build("ernie4_5_vl_moe")
    seen = observe(model, lambda: model(**FAMILIES["ernie4_5_vl_moe"].inputs(model, TOKENS)))
    assert {o.layer for o in seen} == {0, 1, 2, 3}
    assert {o.seam for o in seen if o.layer < 2} == {Seam.ROUTED}
    # Text experts are followed by text experts, of another size than the ones for images.
    said = [(o.layer, p.layer) for o in seen for p in GatePredictor(gates_of(model), Reach()).predict(o) if o.layer < 2]
    assert said == [(0, 2), (1, 3)]


def test_a_copy_of_a_tapped_model_is_not_tapped() -> None:
    model = build("qwen3_moe")
    seen: list[Observation] = []
    taps = Taps(model, list(find_experts(model)), seen.append)
    twin = copy.deepcopy(model)
    inputs = FAMILIES["qwen3_moe"].inputs(model, TOKENS)
    with torch.no_grad():
        twin(**inputs)
        assert not seen
        model(**inputs)
    assert len(seen) == 3
    assert taps.routed(0, torch.zeros(TOKENS, 2).long()) is None  # the last router heard was layer 1's
    taps.remove()


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="1 or more, got 0"):
        Reach(distance=0)
    with pytest.raises(ValueError, match="1 or more, got 1 and 0"):
        Reach(width=0)
