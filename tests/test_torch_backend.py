"""The stages in plain torch: bit for bit transformers' own, whatever the routing and the split into waves."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from zoo import EXPERTS, FAMILIES, moe_experts

from promoe_triton.backends.torch import VECTOR, ByExpert, Grouped, TorchBackend, _sums_alike
from promoe_triton.layout import ExpertLayout
from promoe_triton.patch._families import describe
from promoe_triton.protocols import Part

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GROUPED = {
    "mixtral": "gate and up in one",
    "gpt_oss": "interleaved, transposed, biases",
    "nemotron_h": "no gate",
    "muse_spark": "a norm after the experts",
}
BY_EXPERT = {
    "step3p7": "an _apply_gate of its own",
    "longcat_flash": "ids above the experts are identities",
    "openai_privacy_filter": "single precision, biases",
}


@functools.cache
def stock(name: str, dtype: torch.dtype) -> tuple[Any, ExpertLayout, int]:
    """The first experts module of a family as it comes, its layout, and the width of its input."""
    torch.manual_seed(0)
    module = next(iter(moe_experts(FAMILIES[name].build()).values())).to(dtype)
    layout = describe(module)
    assert layout is not None
    down = layout.spec(module).tensors[1]
    return module, layout, down.shape[-1 if down.name in layout.transposed else 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Expert ids and weights of one call, and the seed of its hidden states."""

    ids: list[list[int]]
    weights: list[list[float]]
    seed: int

    def tensors(self, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        T, A = len(self.ids), len(self.ids[0]) if self.ids else 2
        generator = torch.Generator().manual_seed(self.seed)
        x_TD = torch.randn(T, width, generator=generator).to(dtype)
        ids_TA = torch.tensor(self.ids, dtype=torch.int64).view(T, A)
        return x_TD, ids_TA, torch.tensor(self.weights, dtype=torch.float32).view(T, A).to(dtype)

    def needed(self, experts: int) -> set[int]:
        """Experts that contribute: neither sentinels nor those of zero weights only."""
        pairs = zip(chain(*self.ids), chain(*self.weights), strict=True)
        return {e for e, weight in pairs if e < experts and weight != 0}


@st.composite
def routings(draw: st.DrawFn, highest: int = EXPERTS - 1) -> Routing:
    T, A = draw(st.integers(0, 9)), draw(st.integers(1, 4))
    some = draw(st.lists(st.integers(0, highest), min_size=1, max_size=highest + 1))  # one only, often
    ids = st.lists(st.sampled_from(some), min_size=A, max_size=A)
    weights = st.lists(st.sampled_from([0.0, 0.125, 0.3, 0.7, 1.0]), min_size=A, max_size=A)
    return Routing(
        ids=draw(st.lists(ids, min_size=T, max_size=T)),
        weights=draw(st.lists(weights, min_size=T, max_size=T)),
        seed=draw(st.integers(0, 99)),
    )


EDGES = {
    "no tokens": Routing(ids=[], weights=[], seed=0),
    "one token, in falling order": Routing(ids=[[5, 0, 3]], weights=[[0.3, 0.7, 0.125]], seed=0),
    "one token, one expert twice": Routing(ids=[[4, 1, 4]], weights=[[0.3, 0.7, 0.125]], seed=0),
    "one token, a weight of zero": Routing(ids=[[4, 1, 2]], weights=[[0.3, 0.0, 0.125]], seed=0),
    "one token, one expert twice, once for nothing": Routing(ids=[[4, 4]], weights=[[0.3, 0.0]], seed=0),
    "all on one": Routing(ids=[[2]] * 7, weights=[[0.3]] * 7, seed=0),
    "nothing but zeros": Routing(ids=[[2, 3]] * 3, weights=[[0.0, 0.0]] * 3, seed=0),
}


class Slots:
    """Puts experts where NaN was, and NaN where they were."""

    def __init__(self, module: nn.Module, layout: ExpertLayout, kernels: Any) -> None:
        self.layout, self.kernels = layout, kernels
        self.spec = layout.spec(module)
        self.weights = {name: module.get_parameter(name).detach() for name in layout.names}
        self.slots: dict[int, dict[str, Tensor]] = {}

    def fill(self, expert: int, part: Part) -> None:
        # A first copy that goes away with its NaN keeps the addresses changing.
        slot = {
            name: torch.full_like(self.layout.cut(self.weights[name], expert), torch.nan)
            for name in self.spec.names(part)
        }
        for name, tensor in slot.items():
            tensor.copy_(self.layout.cut(self.weights[name], expert))
        self.slots[expert] = slot
        self.kernels.place(expert, slot)

    def free(self, expert: int) -> None:
        self.kernels.remove(expert)
        for tensor in self.slots.pop(expert).values():
            tensor.fill_(torch.nan)


def at_once(kernels: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    call = kernels.begin(*inputs)
    kernels.up(call, None)
    kernels.activate(call)
    kernels.down(call, None)
    result: Tensor = kernels.combine(call)
    return result


def in_waves(
    kernels: Any,
    slots: Slots,
    inputs: tuple[Tensor, Tensor, Tensor],
    waves: Sequence[Sequence[Sequence[int]]],
) -> Tensor:
    """Every wave's experts come into fresh slots before it, half of each alone, and leave after it."""
    call = kernels.begin(*inputs)
    for part, stage, split in zip((Part.UP, Part.DOWN), (kernels.up, kernels.down), waves, strict=True):
        if part is Part.DOWN:
            kernels.activate(call)
        for wave in split:
            for expert in wave:
                slots.fill(expert, part)
            stage(call, wave)
            for expert in wave:
                slots.free(expert)
    result: Tensor = kernels.combine(call)
    return result


def split(data: st.DataObject, experts: Sequence[int]) -> list[list[int]]:
    """The experts in any order, cut anywhere."""
    order = data.draw(st.permutations(list(experts)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(order)))) | {0, len(order)})
    return [order[a:b] for a, b in pairwise(cuts)]


def resident(name: str, dtype: torch.dtype) -> tuple[Any, Slots]:
    """Kernels with every expert placed for good, and slots for another set of kernels of the same layer."""
    module, layout, _ = stock(name, dtype)
    backend, spec = TorchBackend(), layout.spec(module)
    kernels = backend.layer(module, layout, spec)
    for expert in range(layout.experts):
        kernels.place(expert, {n: layout.cut(module.get_parameter(n).detach(), expert) for n in layout.names})
    return kernels, Slots(module, layout, backend.layer(module, layout, spec))


def equal(got: Tensor, want: Tensor) -> bool:
    """Bit for bit, but for the sign of a zero: a sum that leaves out a zero weight's row has none."""
    return got.dtype == want.dtype and got.shape == want.shape and bool(((got == want) & want.isfinite()).all())


def examples(test: Any) -> Any:
    for routing in EDGES.values():
        test = example(routing)(test)
    return test


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GROUPED)
@torch.no_grad()
def test_equals_grouped_mm(name: str, dtype: str) -> None:
    module, _, width = stock(name, DTYPES[dtype])
    kernels, _ = resident(name, DTYPES[dtype])
    assert isinstance(kernels, Grouped)

    @examples
    @settings(deadline=None)
    @given(routings())
    def check(routing: Routing) -> None:
        inputs = routing.tensors(width, DTYPES[dtype])
        assert set(kernels.begin(*inputs).experts) == routing.needed(EXPERTS)
        assert equal(at_once(kernels, inputs), grouped_mm_experts_forward(module, *inputs))

    check()


@pytest.mark.parametrize("name", GROUPED)
@torch.no_grad()
def test_weights_in_single_precision_over_bf16_states(name: str) -> None:
    """Some routers give their weights in another dtype than the states have."""
    module, _, width = stock(name, torch.bfloat16)
    kernels, _ = resident(name, torch.bfloat16)
    for routing in EDGES.values():
        x_TD, ids_TA, weights_TA = routing.tensors(width, torch.bfloat16)
        inputs = x_TD, ids_TA, weights_TA.float() * 1.001
        assert equal(at_once(kernels, inputs), grouped_mm_experts_forward(module, *inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BY_EXPERT)
@torch.no_grad()
def test_equals_the_loop_over_experts(name: str, dtype: str) -> None:
    module, layout, width = stock(name, DTYPES[dtype])
    kernels, _ = resident(name, DTYPES[dtype])
    assert isinstance(kernels, ByExpert)

    @settings(deadline=None, max_examples=50)
    @given(routings(EXPERTS - 1 + layout.identities))
    def check(routing: Routing) -> None:
        inputs = routing.tensors(width, DTYPES[dtype])
        # transformers' own LongCat cannot do with one expert a token: it squeezes the mask.
        assume(name != "longcat_flash" or inputs[1].shape[1] > 1)
        assert set(kernels.begin(*inputs).experts) == routing.needed(EXPERTS)
        assert equal(at_once(kernels, inputs), module(*inputs))

    check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GROUPED | BY_EXPERT)
@torch.no_grad()
def test_any_split_into_waves_gives_the_same_bits(name: str, dtype: str) -> None:
    _, layout, width = stock(name, DTYPES[dtype])
    kernels, slots = resident(name, DTYPES[dtype])

    @settings(deadline=None, max_examples=50)
    @given(routings(EXPERTS + 1), st.data())
    def check(routing: Routing, data: st.DataObject) -> None:
        inputs = routing.tensors(width, DTYPES[dtype])
        needed = slots.kernels.begin(*inputs).experts
        assert set(needed) == routing.needed(layout.experts)
        # Nothing is drawn from what may not be read: a row nobody computes must read as zero, not as NaN.
        with Poisoned():
            got = in_waves(slots.kernels, slots, inputs, [split(data, needed), split(data, needed)])
        want = at_once(kernels, inputs)
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
        assert not slots.slots

    check()


class Poisoned:
    """While it lasts, memory that nobody has written to reads as NaN."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


def test_poison_works() -> None:
    """`torch.use_deterministic_algorithms` fills what torch leaves as it was allocated."""
    with Poisoned():
        assert torch.empty(7).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GROUPED)
@torch.no_grad()
def test_sentinels_contribute_nothing(name: str, dtype: str) -> None:
    """As transformers' own expert parallel path has it, which alone knows ids of E and more."""
    original, _, width = stock(name, DTYPES[dtype])
    parallel = copy.copy(original)
    parallel._is_expert_parallel = True
    kernels, _ = resident(name, DTYPES[dtype])

    @example(Routing(ids=[[EXPERTS, 2]], weights=[[0.3, 0.7]], seed=0))
    @example(Routing(ids=[[EXPERTS, EXPERTS]], weights=[[0.3, 0.7]], seed=0))
    @example(Routing(ids=[[EXPERTS + 9]] * 5, weights=[[0.3]] * 5, seed=0))
    @settings(deadline=None)
    @given(routings(EXPERTS + 2))
    def check(routing: Routing) -> None:
        inputs = routing.tensors(width, DTYPES[dtype])
        assert set(kernels.begin(*inputs).experts) == routing.needed(EXPERTS)
        with Poisoned():
            got = at_once(kernels, inputs)
        assert equal(got, grouped_mm_experts_forward(parallel, *inputs))

    check()


@pytest.mark.parametrize(
    ("ids", "weights"),
    [
        pytest.param([[EXPERTS, EXPERTS + 1]], [[0.5, 0.5]], id="sentinels-only"),
        pytest.param([[0, 1]], [[0.0, 0.0]], id="zeros-only"),
        pytest.param([[0, EXPERTS], [EXPERTS + 7, 3]], [[0.0, 1.0], [1.0, 0.0]], id="both"),
    ],
)
@pytest.mark.parametrize("name", ["mixtral", "step3p7"])
@torch.no_grad()
def test_a_call_that_needs_no_expert(name: str, ids: list[list[int]], weights: list[list[float]]) -> None:
    module, layout, width = stock(name, torch.float32)
    kernels = TorchBackend().layer(module, layout, layout.spec(module))  # nothing is placed
    inputs = Routing(ids=ids, weights=weights, seed=0).tensors(width, torch.float32)
    assert list(kernels.begin(*inputs).experts) == []
    assert not at_once(kernels, inputs).any()


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([[0, -1]], id="one-token"),
        pytest.param([[0, 1], [-1, 2]], id="more-tokens"),
        pytest.param([[-7, EXPERTS]], id="with-a-sentinel"),
    ],
)
@pytest.mark.parametrize("name", ["mixtral", "step3p7"])
def test_negative_ids_raise(name: str, ids: list[list[int]]) -> None:
    _, _, width = stock(name, torch.float32)
    kernels, _ = resident(name, torch.float32)
    inputs = Routing(ids=ids, weights=[[0.5] * 2] * len(ids), seed=0).tensors(width, torch.float32)
    with pytest.raises(ValueError, match=f"must be 0 or more, got {min(chain(*ids))}"):
        kernels.begin(*inputs)


@pytest.mark.parametrize("name", ["mixtral", "step3p7"])
@torch.no_grad()
def test_a_removed_expert_cannot_be_read(name: str) -> None:
    _, _, width = stock(name, torch.float32)
    kernels, _ = resident(name, torch.float32)
    inputs = Routing(ids=[[0, 1]] * 3, weights=[[0.5, 0.5]] * 3, seed=0).tensors(width, torch.float32)
    kernels.remove(1)
    call = kernels.begin(*inputs)
    kernels.up(call, [0])
    with pytest.raises((TypeError, AttributeError)):
        kernels.up(call, [1])


@pytest.mark.parametrize("tokens", [1, 3])
@torch.no_grad()
def test_the_input_is_left_as_it_was(tokens: int) -> None:
    _, _, width = stock("mixtral", torch.float32)
    kernels, _ = resident("mixtral", torch.float32)
    inputs = Routing(ids=[[3, 1]] * tokens, weights=[[0.5, 0.5]] * tokens, seed=0).tensors(width, torch.float32)
    before = [tensor.clone() for tensor in inputs]
    at_once(kernels, inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("name", GROUPED)
@torch.no_grad()
def test_states_that_do_not_lie_together(name: str) -> None:
    module, _, width = stock(name, torch.float32)
    kernels, _ = resident(name, torch.float32)
    for tokens in (1, 5):
        x_TD, ids_TA, weights_TA = Routing(ids=[[3, 1]] * tokens, weights=[[0.3, 0.7]] * tokens, seed=0).tensors(
            width, torch.float32
        )
        apart = torch.stack([x_TD, x_TD], dim=-1)[..., 0]
        assert not apart.is_contiguous()
        inputs = apart, ids_TA.t().contiguous().t(), weights_TA.t().contiguous().t()
        assert equal(at_once(kernels, inputs), grouped_mm_experts_forward(module, *inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("N", "K"), [(64, 96), (31, 97), (512, 256)])
def test_another_order_of_summation_is_noticed(
    N: int, K: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of random numbers would change one product in thirty."""

    def backwards(weight_NK: Tensor, x_K: Tensor, out: Tensor) -> Tensor:
        sums = (weight_NK.float() * x_K.float()).flip(1).cumsum(1)[:, -1]
        return out.copy_(sums)

    arguments = (N, K, dtype, torch.device("cpu"), VECTOR, torch.get_num_threads())
    monkeypatch.setattr(torch, "mv", lambda weight, x, out: torch.mm(x.view(1, -1), weight.t(), out=out.view(1, -1)))
    assert _sums_alike.__wrapped__(*arguments)
    monkeypatch.setattr(torch, "mv", backwards)
    assert not _sums_alike.__wrapped__(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("D", "F"),
    [
        (48, 40),  # cut in three it is not aligned
        (64, 96),
        (512, 256),
        (97, 31),  # nothing divides it
    ],
)
def test_the_product_of_a_row_has_stock_bits(D: int, F: int, threads: int, dtype: torch.dtype) -> None:
    """One token: whatever way of computing its rows is chosen, stock bits, also when slots fill meanwhile."""
    torch.set_num_threads(threads)
    config = Qwen3MoeConfig(hidden_size=D, moe_intermediate_size=F, num_experts=5, num_experts_per_tok=3)
    config._experts_implementation = "grouped_mm"
    stock = Qwen3MoeExperts(config).to(dtype)
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter)
    layout = ExpertLayout(experts=5, up=("gate_up_proj",), down=("down_proj",))
    kernels = TorchBackend().layer(stock, layout, layout.spec(stock))
    for _ in range(3):
        x, ids = torch.randn(1, D).to(dtype), torch.randperm(5)[:3].view(1, 3)
        weights = torch.rand(1, 3).to(dtype)
        with torch.no_grad():
            call = kernels.begin(x, ids, weights)
            for expert in call.experts:  # placed after `begin`, as a miss is
                kernels.place(expert, {n: layout.cut(stock.get_parameter(n), expert) for n in layout.names})
                kernels.up(call, [expert])
            kernels.activate(call)
            kernels.down(call, None)
            got = kernels.combine(call)
            # As grouped_mm does: rows of one tensor, wherever they begin.
            up, want = torch.empty(3, 2 * F, dtype=dtype), torch.empty(3, D, dtype=dtype)
            for row, e in enumerate(ids[0].tolist()):
                torch.mm(x, stock.gate_up_proj[e].t(), out=up[row : row + 1])
            h = stock._apply_gate(up)
            for row, e in enumerate(ids[0].tolist()):
                torch.mm(h[row : row + 1], stock.down_proj[e].t(), out=want[row : row + 1])
        assert torch.equal(got, (want * weights.view(-1, 1)).view(1, 3, D).sum(dim=1))
