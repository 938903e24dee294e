"""The Triton backend behind the package's own seams: tiny models of every layout, resident and with few slots.

On a GPU where there is one, else in Triton's interpreter with slots in RAM.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE
from torch import Tensor
from transformers import CompileConfig
from zoo import FAMILIES, build, moe_experts

import promoe_triton
from promoe_triton import PromoeError
from promoe_triton.backends.choice import make_backend
from promoe_triton.backends.gates import fused_gate
from promoe_triton.backends.triton import UNIT, Places, TritonBackend
from promoe_triton.kernels.tiles import TABLE, Call, Shape, target_of
from promoe_triton.kernels.twins import error
from promoe_triton.layer import ProMoEExperts
from promoe_triton.patch._families import describe
from promoe_triton.protocols import Part, TensorSpec

LAYOUTS = {
    "mixtral": "silu",  # gate and up in halves
    "gpt_oss": "clamped_swiglu",  # by turns, transposed, biases
    "aria_text": "silu",  # transposed
    "nemotron_h": "relu2",  # no gate
    "muse_spark": "silu",  # a norm between the second product and the weights
    "step3p7": None,  # a gate of its own between the products
    "deepseek_v4": None,
    "longcat_flash": "silu",  # ids above the experts are identities
    "openai_privacy_filter": "clamped_swiglu",  # in halves, biases
    "llama4": "silu",  # all tokens to all experts, transposed
    "dbrx": None,  # gate and up apart, down transposed
    "jetmoe": "none",  # a single product
    "zaya": "silu",  # skips with weight zero
    "gemma4_text": "gelu_tanh",
}
ON_DISK = {"gpt_oss", "dbrx", "jetmoe"}
SLOTS = 4
CLOSE = 1e-5


def patched(name: str, **options: Any) -> Any:
    return promoe_triton.patch(build(name), **({"backend": "triton", "device": DEVICE.type} | options))


def given(model: Any, name: str, tokens: int) -> dict[str, Any]:
    inputs = FAMILIES[name].inputs(model, tokens)
    return {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in inputs.items()}


def output(model: Any, name: str, tokens: int) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**given(model, name, tokens))[0]
    return result


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name in FAMILIES])
def test_models(name: str, tmp_path: Path) -> None:
    """A prompt, whose rows are grouped, and two tokens, whose rows are not: as stock, whatever is resident."""
    stock, prompts = build(name).to(DEVICE), (7, 2)
    want = [output(stock, name, tokens) for tokens in prompts]
    whole = [output(patched(name), name, tokens) for tokens in prompts]
    assert all(error(got, expected) < CLOSE for got, expected in zip(whole, want, strict=True))
    few = patched(name, slots=SLOTS, store="spool" if name in ON_DISK else "memory", spool_dir=tmp_path)
    assert all(torch.equal(output(few, name, t), expected) for t, expected in zip(prompts, whole, strict=True))
    assert promoe_triton.stats(few).misses > 0
    assert error(output(promoe_triton.unpatch(few).to(DEVICE), name, 2), want[1]) < CLOSE


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name in FAMILIES])
def test_gates_are_found(name: str) -> None:
    experts = next(iter(moe_experts(build(name)).values()))
    layout = describe(experts)
    assert layout is not None
    kernels: Any = TritonBackend().layer(experts, layout, layout.spec(experts))
    assert (kernels._gate.activation if kernels._gate else None) == LAYOUTS[name]


def test_a_gate_that_is_none_of_ours_is_not_fused() -> None:
    experts: Any = next(iter(moe_experts(build("mixtral")).values()))
    layout = describe(experts)
    assert layout is not None
    assert fused_gate(experts, layout, gated=True) is not None
    experts.act_fn = torch.nn.Tanh()
    assert fused_gate(experts, layout, gated=True) is None


def test_generates_the_same_tokens(tmp_path: Path) -> None:
    stock = build("mixtral").to(DEVICE)
    inputs = given(stock, "mixtral", 5)
    want = stock.generate(**inputs, max_new_tokens=3, do_sample=False)
    model = patched("mixtral", slots=4, store="spool", spool_dir=tmp_path)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), want)


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name in FAMILIES and name != "jetmoe"])
def test_a_resident_layer_in_a_graph(name: str) -> None:
    """One operation that a graph may capture, where the kernels compute all of it; else the opaque one."""
    torch._dynamo.reset()
    model = patched(name)
    experts: Any = next(module for module in model.modules() if isinstance(module, ProMoEExperts))
    calls: list[Any] = []
    handle = experts.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    output(model, name, 5)
    handle.remove()
    (args, kwargs), *_ = calls
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        assert torch.equal(
            torch.compile(experts, fullgraph=True, backend=backend)(*args, **kwargs), experts(*args, **kwargs)
        )
    (graph,) = graphs
    called = {str(node.target) for node in graph.graph.nodes if "promoe_triton" in str(node.target)}
    fused = LAYOUTS[name] is not None and name != "muse_spark"  # which has a norm between the products
    assert called == {f"promoe_triton.{'layer' if fused else 'experts'}.default"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("slots", [None, SLOTS], ids=["resident", "few"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_compiled_generation(name: str, slots: int | None, tmp_path: Path) -> None:
    """Each layout that transformers compiles as one graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    stock = build(name).to(DEVICE)
    inputs = given(stock, name, 5)
    want = stock.generate(**inputs, max_new_tokens=4, do_sample=False)
    model = patched(name, slots=slots, spool_dir=tmp_path)
    settings = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    settings._compile_all_devices = True
    options: Any = {"cache_implementation": "static", "compile_config": settings}
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False, **options), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_half_precision(tmp_path: Path) -> None:
    stock = build("gpt_oss").bfloat16().to(DEVICE)
    want = output(stock, "gpt_oss", 5)
    model = build("gpt_oss").bfloat16()
    options: Any = {"slots": SLOTS, "store": "spool", "spool_dir": tmp_path, "backend": "triton"}
    promoe_triton.patch(model, device=DEVICE.type, **options)
    assert error(output(model, "gpt_oss", 5), want) < 2e-2


def test_tiles_of_ones_own(tmp_path: Path) -> None:
    """Other tiles, same layer; and one that has no tiles for this device is refused by name."""
    table = json.loads(TABLE.read_text())
    target = target_of(DEVICE)
    for entry in table["targets"][target]["32"]["grouped"].values():
        entry |= {"columns": 16, "gated_columns": 16, "depth": 16}
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(table))
    want = output(patched("mixtral"), "mixtral", 7)
    model = patched("mixtral", tiles=mine, slots=SLOTS, store="memory")
    layer = next(m._promoe for m in model.modules() if hasattr(m, "_promoe"))
    call = Call(T=7, A=2, E=layer.experts, dtype=torch.float32)
    shape = Shape(N=64, K=64, gated=False, transposed=False)
    assert layer.kernels._table.grouped(call, shape).columns == 16
    assert error(output(model, "mixtral", 7), want) < CLOSE
    del table["targets"][target]
    (tmp_path / "other.json").write_text(json.dumps(table))
    with pytest.raises(promoe_triton.PromoeError, match=r"other\.json is no table of tiles for"):
        patched("mixtral", tiles=tmp_path / "other.json")


def test_resident_weights_may_be_cast() -> None:
    """Their memory is another then, and nothing may be read from the old."""
    model = patched("mixtral")
    before = output(model, "mixtral", 3)
    model.to(torch.bfloat16)
    assert error(output(model, "mixtral", 3), before) < 3e-2
    model.to(torch.float32)
    assert error(output(model, "mixtral", 3), before) < 3e-2


def test_tables_stay_where_they_are() -> None:
    """A graph that somebody has captured reads them there."""
    model = patched("mixtral")
    want = output(model, "mixtral", 3)
    layers = [module._promoe.kernels for module in model.modules() if hasattr(module, "_promoe")]

    def addresses() -> list[int]:
        return [
            pool.slot_of_E.data_ptr() for kernels in layers for _, pools in kernels._tables.values() for pool in pools
        ]

    before = addresses()
    model.to(DEVICE)
    assert torch.equal(output(model, "mixtral", 3), want)
    assert before
    assert addresses() == before


class TestPlaces:
    """Experts lie at distances from the beginning of one memory, in steps that keep loads aligned where all are."""

    spec = TensorSpec(name="w", part=Part.UP, shape=(3, 4), dtype=torch.float32)

    def at(self, memory: Tensor, offset: int) -> Tensor:
        return memory[offset : offset + 12].view(3, 4)

    def test_regular(self) -> None:
        places, memory = Places(self.spec, 4, transposed=False), torch.arange(1000.0)
        for e, offset in enumerate((0, 3 * UNIT, UNIT)):
            places.place(e, self.at(memory, offset))
        assert places.data.stride() == (UNIT, 4, 1)
        assert places.slots([0, 1, 2]).tolist() == [0, 3, 1, -1]
        assert places.slots([1]).tolist() == [-1, 3, -1, -1]
        assert torch.equal(places.data[3], self.at(memory, 3 * UNIT))

    def test_at_any_phase(self) -> None:
        places, memory = Places(self.spec, 3, transposed=True), torch.arange(1000.0)
        places.place(0, self.at(memory, UNIT))
        places.place(1, self.at(memory, 7))
        places.place(2, self.at(memory, 988))  # the last there is room for
        for e, offset in enumerate((UNIT, 7, 988)):
            assert torch.equal(places.data[places.slots(None)[e]], self.at(memory, offset).t())

    def test_other_memory(self) -> None:
        places, memory = Places(self.spec, 2, transposed=False), torch.arange(1000.0)
        places.place(0, self.at(memory, 0))
        places.place(1, self.at(memory.clone(), 0))
        assert places.slots([1]).tolist() == [-1, 0]
        with pytest.raises(PromoeError, match=r"w of experts \[0\] is not in a slot"):
            places.slots(None)

    def test_removed(self) -> None:
        places = Places(self.spec, 2, transposed=False)
        with pytest.raises(PromoeError, match="no expert's w has been placed"):
            _ = places.data
        places.remove(0)
        places.place(1, torch.zeros(3, 4))
        places.slots([1])
        places.remove(1)
        with pytest.raises(PromoeError, match=r"w of experts \[1\] is not in a slot"):
            places.slots([1])

    def test_not_contiguous(self) -> None:
        with pytest.raises(ValueError, match=r"w: expected a contiguous tensor, got strides \(1, 3\)"):
            Places(self.spec, 2, transposed=False).place(0, torch.zeros(4, 3).t())


def test_what_auto_means() -> None:
    assert make_backend("auto", torch.device("cpu")).name == "torch"
    assert make_backend("auto", torch.device("cuda:0")).name == "triton"
    assert make_backend("torch", torch.device("cuda")).name == "torch"


def test_a_cpu_without_the_interpreter_is_refused() -> None:
    code = """
import torch
from promoe_triton.backends.choice import make_backend
from promoe_triton import PromoeError
try:
    make_backend("triton", torch.device("cpu"))
except PromoeError as error:
    assert "use backend='torch'" in str(error), error
else:
    raise SystemExit("made")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)
