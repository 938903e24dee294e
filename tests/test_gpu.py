"""What only a GPU can show: captured graphs, waits of the host, memory beyond 2^31 elements, models that run there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, KINDS, draw, make_layer, reference, routed, run
from torch import Tensor
from transformers import CompileConfig
from zoo import FAMILIES, build, skip_without_static_cache

import promoe_triton
from promoe_triton import PromoeError
from promoe_triton.kernels.pool import Gate, Pool, Projection
from promoe_triton.kernels.tiles import table_for, target_of
from promoe_triton.kernels.trials import TOLERANCES
from promoe_triton.kernels.twins import error

# Collected everywhere, so that a test which cannot even be collected is seen without a GPU.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: make test-gpu"),
    pytest.mark.filterwarnings("ignore"),
]

FORMS = {"rows": 2, "grouped": 40}
LAYOUTS = ["mixtral", "gpt_oss", "aria_text", "nemotron_h", "muse_spark", "longcat_flash", "llama4", "dbrx", "zaya"]
HERE = [name for name in LAYOUTS if name in FAMILIES]
"""Older releases of transformers lack some."""
COMPILED = ("mixtral", "gpt_oss", "nemotron_h", "muse_spark", "llama4")
"""Those that transformers compiles as one graph, and Llama 4, which it does not."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch.cuda.synchronize()


@pytest.fixture
def strict() -> Iterator[None]:
    """The host may wait for nothing."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


class TestKernels:
    @pytest.mark.parametrize("T", FORMS.values(), ids=FORMS)
    def test_a_captured_graph_sees_new_routings_and_slots(self, T: int) -> None:
        """Captured, its routing and its table of slots changed in place, replayed: as if launched anew."""
        layer = make_layer(KINDS["halves"], E=8, D=64, F=48, dtype=torch.bfloat16)
        first, second = (routed(layer, draw(T, 2, 8, seed), seed=seed) for seed in (1, 2))
        table = table_for(target_of(DEVICE))
        run(layer, first, table=table)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run(layer, first, table=table)
        for mine, theirs in ((first.x_TD, second.x_TD), (first.ids_TA, second.ids_TA)):
            mine.copy_(theirs)
        first.weights_TA.copy_(second.weights_TA)
        slots = layer.up.weight.slot_of_E.clone()  # the same for both projections
        turned = slots.flip(0)
        for projection in (layer.up, layer.down):
            data = projection.weight.data
            data[turned.long()] = data[slots.long()].clone()
            projection.weight.slot_of_E.copy_(turned)
        got.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(got, run(layer, second, table=table))
        assert error(got, reference(layer, second)) <= TOLERANCES[torch.bfloat16]

    @pytest.mark.parametrize("T", FORMS.values(), ids=FORMS)
    @pytest.mark.usefixtures("strict")
    def test_nothing_waits_for_the_host(self, T: int) -> None:
        torch.cuda.set_sync_debug_mode("default")
        layer = make_layer(KINDS["as gpt_oss"], E=8, D=64, F=48, dtype=torch.bfloat16)
        call, table = routed(layer, draw(T, 2, 8)), table_for(target_of(DEVICE))
        run(layer, call, table=table)
        torch.cuda.set_sync_debug_mode("error")
        run(layer, call, table=table)

    def test_forty_thousand_tokens(self) -> None:
        layer = make_layer(KINDS["halves"], E=8, D=64, F=32, dtype=torch.bfloat16)
        call = routed(layer, torch.randint(0, 8, (40_000, 8), generator=torch.Generator().manual_seed(0)))
        got = run(layer, call, table=table_for(target_of(DEVICE)))
        some = torch.tensor([0, 1, 20_000, 39_998, 39_999], device=DEVICE)
        assert got.isfinite().all()
        assert error(got[some], reference(layer, call.rows(some))) <= TOLERANCES[torch.bfloat16]

    @pytest.mark.parametrize("T", FORMS.values(), ids=FORMS)
    def test_the_last_slot_of_a_pool_beyond_2_31_elements(self, T: int) -> None:
        D, F, slots = 2048, 768, 700
        if torch.cuda.mem_get_info()[0] < 8 * 2**30:
            pytest.skip("needs 8 GiB")
        pool = torch.empty((slots, 2 * F, D), dtype=torch.bfloat16, device=DEVICE)
        assert pool.numel() > 2**31
        pool[-3:] = torch.randn(3, 2 * F, D, device=DEVICE) * D**-0.5
        down = torch.randn(3, D, F, device=DEVICE, dtype=torch.bfloat16) * F**-0.5
        table = torch.tensor([slots - 3, slots - 1, slots - 2], dtype=torch.int32, device=DEVICE)
        layer: Any = make_layer(KINDS["halves"], E=3, D=8, F=8, dtype=torch.bfloat16)
        layer = type(layer)(
            up=Projection(weight=Pool(data=pool, slot_of_E=table), gate=Gate(activation="silu", gated=True)),
            down=Projection(weight=Pool(data=down, slot_of_E=torch.arange(3, dtype=torch.int32, device=DEVICE))),
            D=D,
            F=F,
        )
        call = routed(layer, draw(T, 2, 3))
        got = run(layer, call, table=table_for(target_of(DEVICE)))
        assert error(got, reference(layer, call)) <= TOLERANCES[torch.bfloat16]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
    @pytest.mark.parametrize("T", [1, 4, 16, 300], ids="T={}".format)
    @pytest.mark.parametrize(("D", "F", "E", "A"), [(2048, 768, 16, 8), (2880, 2880, 4, 2), (2048, 1408, 6, 4)])
    def test_shipped_tiles_at_real_sizes(self, D: int, F: int, E: int, A: int, T: int, dtype: torch.dtype) -> None:
        kind = KINDS["as gpt_oss" if D == 2880 else "halves"]
        layer = make_layer(kind, E=E, D=D, F=F, dtype=dtype)
        call = routed(layer, draw(T, A, E))
        table = table_for(target_of(DEVICE))
        got = run(layer, call, table=table)
        some = torch.arange(min(T, 8), device=DEVICE)
        assert error(got[some], reference(layer, call.rows(some))) <= TOLERANCES[dtype]
        assert torch.equal(run(layer, call, table=table), got)


def given(name: str, model: Any, tokens: int) -> dict[str, Any]:
    inputs = FAMILIES[name].inputs(model, tokens)
    return {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in inputs.items()}


class TestModels:
    @pytest.mark.parametrize("name", [name for name in HERE if FAMILIES[name].generates])
    @pytest.mark.parametrize("options", [{}, {"slots": 4}, {"slots": 2, "store": "spool"}], ids=["all", "few", "disk"])
    def test_generate(self, options: dict[str, Any], name: str, tmp_path: Path) -> None:
        stock = build(name).to(DEVICE)
        inputs = given(name, stock, 7)
        want = stock.generate(**inputs, max_new_tokens=4, do_sample=False)
        model = promoe_triton.patch(build(name), device="cuda", spool_dir=tmp_path, **options)
        assert model.device == DEVICE or model.device.type == "cuda"
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), want)
        back = promoe_triton.unpatch(model)
        assert {parameter.device.type for parameter in back.parameters()} == {"cpu"}
        for (path, mine), (_, theirs) in zip(back.named_parameters(), build(name).named_parameters(), strict=True):
            assert torch.equal(mine, theirs), path

    @pytest.mark.parametrize("mode", ["default", "reduce-overhead", None])
    @pytest.mark.parametrize("slots", [None, 4], ids=["all", "few"])
    @pytest.mark.parametrize("name", [name for name in HERE if name in COMPILED])
    def test_a_static_cache_and_compilation(self, name: str, slots: int | None, mode: str | None) -> None:
        """None: as generate compiles by itself."""
        stock = build(name).to(DEVICE)
        inputs = given(name, stock, 7)
        skip_without_static_cache(stock, inputs)
        want = stock.generate(**inputs, max_new_tokens=6, do_sample=False)
        model = promoe_triton.patch(build(name), device="cuda", slots=slots)
        options: Any = {"cache_implementation": "static"}
        if mode is not None:
            options["compile_config"] = CompileConfig(mode=mode)
        for _ in range(3):
            got = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
            assert torch.equal(got, want)

    def test_a_resident_model_makes_no_host_read(self) -> None:
        model = promoe_triton.patch(build("mixtral"), device="cuda")
        inputs = given("mixtral", model, 7)
        experts = [module for module in model.modules() if hasattr(module, "_promoe")]
        calls: list[Any] = []
        handles = [e.register_forward_pre_hook(lambda module, args: calls.append((module, args))) for e in experts]
        with torch.no_grad():
            model(**inputs)
            for handle in handles:
                handle.remove()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for module, args in calls:
                    module(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert promoe_triton.stats(model).host_reads == 0

    @pytest.mark.parametrize(("predictor", "beside"), [("none", 0), ("auto", 2)])
    def test_a_layer_with_few_slots_reads_the_device_once(self, predictor: str, beside: int) -> None:
        """Before the first layer and after the last there may be one read more each, for what is predicted there."""
        model = promoe_triton.patch(build("mixtral"), device="cuda", slots=4, predictor=predictor)
        inputs = given("mixtral", model, 3)
        with torch.no_grad():
            model(**inputs)
            before = promoe_triton.stats(model).host_reads
            model(**inputs)
        layers = sum(hasattr(module, "_promoe") for module in model.modules())
        assert layers <= promoe_triton.stats(model).host_reads - before <= layers + beside

    @pytest.mark.parametrize("io", ["direct", "buffered"])
    def test_from_a_checkpoint(self, io: Any, tmp_path: Path) -> None:
        stock = build("mixtral").bfloat16()
        stock.save_pretrained(tmp_path)
        inputs = given("mixtral", stock, 7)
        whole = promoe_triton.from_pretrained(str(tmp_path), device="cuda", dtype=torch.bfloat16)
        few = promoe_triton.from_pretrained(
            str(tmp_path), device="cuda", dtype=torch.bfloat16, slots=4, store="checkpoint", io=io
        )
        with torch.no_grad():
            assert torch.equal(few(**inputs).logits, whole(**inputs).logits)
        assert promoe_triton.stats(few).bytes_read > 0

    def test_slots_change_no_bit(self) -> None:
        inputs = given("mixtral", build("mixtral"), 9)
        outputs = []
        for options in ({}, {"slots": 1}, {"slots": 3, "predictor": "random"}, {"slots": 4, "chunk": 4096, "depth": 2}):
            model = promoe_triton.patch(build("mixtral"), device="cuda", **options)
            with torch.no_grad():
                outputs.append([model(**inputs).logits for _ in range(4)])
        assert all(torch.equal(logits, outputs[0][0]) for each in outputs for logits in each)

    @pytest.mark.parametrize("slots", [None, 3], ids=["all", "few"])
    def test_one_stream_and_then_another(self, slots: int | None) -> None:
        """Nobody waits between two forwards, and the first stream is busy with other work."""
        model = promoe_triton.patch(build("mixtral"), device="cuda", slots=slots, predictor="none")
        calls = [given("mixtral", model, tokens) for tokens in (7, 1, 3)]
        other = promoe_triton.patch(build("mixtral"), device="cuda", slots=slots, predictor="none")
        with torch.no_grad():
            want = [other(**inputs).logits for inputs in calls]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(3)]
        busy = torch.randn(2048, 2048, device=DEVICE)
        got: list[Tensor] = []
        for _ in range(5):
            for stream, inputs in zip(streams, calls, strict=True):
                with torch.cuda.stream(stream), torch.no_grad():
                    for _ in range(4):
                        busy @ busy
                    got.append(model(**inputs).logits)
        torch.cuda.synchronize()
        assert all(torch.equal(logits, want[i % 3]) for i, logits in enumerate(got))

    def test_moving_it_away_is_refused(self) -> None:
        model = promoe_triton.patch(build("mixtral"), device="cuda")
        with pytest.raises(PromoeError, match="cannot be moved to cpu"):
            model.cpu()
        assert model.to("cuda") is model

    def test_a_model_that_is_on_the_gpu_stays_there(self) -> None:
        model = promoe_triton.patch(build("mixtral").to(DEVICE), device="cuda")
        assert promoe_triton.unpatch(model).device.type == "cuda"
        with pytest.raises(PromoeError, match="load the model on the CPU"):
            promoe_triton.patch(build("mixtral").to(DEVICE), device="cuda", slots=2)

    def test_two_threads(self) -> None:
        model = promoe_triton.patch(build("mixtral"), device="cuda", slots=3)
        inputs = given("mixtral", model, 7)
        with torch.no_grad():
            want = model(**inputs).logits
        got: list[Tensor] = []

        def forward() -> None:
            with torch.no_grad():
                got.append(model(**inputs).logits)

        threads = [threading.Thread(target=forward) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 4
        assert all(torch.equal(logits, want) for logits in got)
