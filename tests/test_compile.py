"""torch.compile goes around the layer: no graph break, one graph for all layers, the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from transformers import CompileConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

import promoe_triton
from promoe_triton import ops

SLOTS = {"few": 6, "all": None}


def build(layers: int = 2) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = Qwen3MoeConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=24,
        num_experts=6,
        num_experts_per_tok=2,
        num_hidden_layers=layers,
        **settings,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.2)
    return model


IDS = torch.tensor([[3, 14, 15, 9, 26, 5]])


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("slots", SLOTS)
def test_fullgraph(slots: str, backend: str) -> None:
    model = build()
    with torch.no_grad():
        want = model(IDS).logits
        promoe_triton.patch(model, slots=SLOTS[slots], store="spool")
        compiled: Any = torch.compile(model, fullgraph=True, backend=backend)
        for _ in range(2):
            assert torch.equal(compiled(IDS).logits, want)
    assert promoe_triton.stats(model).hits > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("slots", SLOTS)
def test_fullgraph_where_nobody_has_turned_gradients_off(slots: str) -> None:
    """The experts' output is detached, as without compilation: a backend must not ask for their gradient."""
    model = build()
    want = model(IDS).logits
    promoe_triton.patch(model, slots=SLOTS[slots], store="spool")
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(IDS).logits, want)


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_regional_compile_of_sixteen_layers_makes_one_graph() -> None:
    model = build(layers=16)
    with torch.no_grad():
        want = model(IDS, use_cache=False).logits
        promoe_triton.patch(model, slots=48, store="spool")
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        for layer in model.model.layers:
            layer.compile(fullgraph=True, backend=counter)
        # (A cache is indexed by each layer's own number, which makes any model compile once for each.)
        assert torch.equal(model(IDS, use_cache=False).logits, want)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("slots", SLOTS)
def test_generate_with_a_static_cache(slots: str, backend: str) -> None:
    model = build()
    want = model.generate(IDS, max_new_tokens=5, do_sample=False)
    promoe_triton.patch(model, slots=SLOTS[slots], store="spool")
    settings = CompileConfig(fullgraph=True, backend=backend, mode=None)
    settings._compile_all_devices = True
    got = model.generate(IDS, max_new_tokens=5, do_sample=False, cache_implementation="static", compile_config=settings)
    assert torch.equal(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.filterwarnings("ignore")
def test_inductor() -> None:
    model = build()
    with torch.no_grad():
        want = model(IDS).logits
        promoe_triton.patch(model, slots=6, store="spool")
        got = torch.compile(model, fullgraph=True)(IDS).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # inductor fuses the dense part and rounds otherwise
    assert torch.equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_follows_patch_and_unpatch() -> None:
    """Code that was compiled for one of them must not run for another."""
    model = build()
    compiled: Any = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        want = model(IDS).logits
        assert torch.equal(compiled(IDS).logits, want)
        for slots in (5, None, 7):
            promoe_triton.patch(model, slots=slots, store="spool")
            assert torch.equal(compiled(IDS).logits, want)
            assert promoe_triton.stats(model).hits > 0, "it went through the layers of this patch"
            promoe_triton.unpatch(model)
            assert torch.equal(compiled(IDS).logits, want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fullgraph", [False, True], ids=["breaks-allowed", "fullgraph"])
@pytest.mark.parametrize("slots", SLOTS)
def test_training_is_refused_as_without_compilation(slots: str, fullgraph: bool) -> None:
    model: Any = promoe_triton.patch(build(), slots=SLOTS[slots], store="spool")
    model.train()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=fullgraph)
    with pytest.raises(Exception, match="a patched model cannot be trained"):
        compiled(IDS)
    with torch.no_grad():
        want = model(IDS).logits
        assert torch.equal(compiled(IDS).logits, want)
    model.eval()
    assert not compiled(IDS).logits.isnan().any()


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("slots", [2, 6])
def test_the_operation_is_sound(slots: int, T: int) -> None:
    """Its fake, its schema (nothing but the name counts as written to), and what is traced of it."""
    model = promoe_triton.patch(build(), slots=slots, store="spool")
    layer = model.model.layers[1].mlp.experts
    generator = torch.Generator().manual_seed(T)
    x_TD = torch.randn(T, 32, generator=generator)
    ids_TA = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(T)])
    weights_TA = torch.rand(T, 2, generator=generator)
    torch.library.opcheck(ops.experts, (x_TD, ids_TA, weights_TA, layer._promoe_name))
    promoe_triton.unpatch(model)
