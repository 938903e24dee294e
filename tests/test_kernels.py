"""The products and the sum against float64: layouts, types, awkward sizes, and the faults that others have shipped."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import (
    DEVICE,
    DTYPES,
    KERNELS,
    KINDS,
    SHIPPED,
    TABLE,
    TWINS,
    Layer,
    Routed,
    check,
    draw,
    make_layer,
    poisoned,
    reference,
    routed,
    run,
)
from torch import Tensor
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from promoe_triton.kernels import checks, combine, grouped, rows, schedule
from promoe_triton.kernels.pool import Gate, Pool, Projection, slot_base
from promoe_triton.kernels.tiles import Call, Shape
from promoe_triton.kernels.trials import TOLERANCES
from promoe_triton.kernels.twins import error

FORMS = {"rows": True, "grouped": False}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_layouts(kind: str, form: str, dtype: str) -> None:
    if kind == "scales" and dtype != "fp32":
        pytest.skip("stored in int8 whatever the rows are; once is enough")
    layer = make_layer(KINDS[kind], E=5, D=50, F=37, dtype=DTYPES[dtype])
    call = routed(layer, draw(3, 2, 5))
    check(layer, call, run(layer, call, by_rows=FORMS[form]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("T", "A", "E", "D", "F"),
    [
        (1, 1, 1, 1, 1),  # one of everything
        (1, 4, 4, 16, 16),  # A = E, one token
        (2, 7, 7, 33, 65),  # all experts for every token; nothing is a power of two
        (5, 3, 60, 20, 30),  # most experts empty, their number no power of two
        (17, 1, 3, 97, 47),  # more rows than a block; primes
        (3, 2, 6, 90, 90),  # as gpt-oss: 2880 = 45 * 64, here 90 = 45 * 2
        (4, 2, 5, 22, 44),  # as 704 = 11 * 64
    ],
)
def test_sizes(T: int, A: int, E: int, D: int, F: int, form: str) -> None:
    layer = make_layer(KINDS["halves"], E=E, D=D, F=F, dtype=torch.float32)
    call = routed(layer, draw(T, A, E))
    check(layer, call, run(layer, call, by_rows=FORMS[form]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shipped_tiles(form: str, dtype: str) -> None:
    """A loop with full steps and a tail, and more than one tile of columns, as on a GPU."""
    layer = make_layer(KINDS["halves"], E=3, D=130, F=70, dtype=DTYPES[dtype])
    call = routed(layer, draw(2, 2, 3))
    check(layer, call, run(layer, call, by_rows=FORMS[form], table=SHIPPED))


@pytest.mark.parametrize("rows_per_block", [32, 64, 128])
@pytest.mark.parametrize("kind", ["halves", "as gpt_oss"])
def test_shipped_blocks(rows_per_block: int, kind: str) -> None:
    """Blocks that put the rows on the M side, and such that put the weights there."""
    E = 2
    layer = make_layer(KINDS[kind], E=E, D=40, F=24, dtype=torch.bfloat16)
    T = rows_per_block * E // 2
    assert SHIPPED.block(Call(T=T, A=1, E=E, dtype=torch.bfloat16)) == rows_per_block
    call = routed(layer, [[0]] * (T - 3) + [[1]] * 3)
    check(layer, call, run(layer, call, table=SHIPPED))


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens(form: str) -> None:
    layer = make_layer(KINDS["halves"], E=3, D=8, F=4, dtype=torch.float32)
    for A in (1, 2):
        assert run(layer, routed(layer, [], A=A), by_rows=FORMS[form]).shape == (0, 8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "ids",
    [
        [[2, 2], [2, 2], [2, 2]],  # all tokens on one expert, twice each
        [[0, 5], [6, 1], [5, 7]],  # sentinels, E and above (expert parallelism)
        [[9, 9], [9, 9]],  # nothing but sentinels
        [[4, 0], [0, 4], [4, 4]],  # the first expert and the last
    ],
)
def test_routings(ids: list[list[int]], form: str) -> None:
    layer = make_layer(KINDS["biases"], E=5, D=18, F=10, dtype=torch.float32)
    call = routed(layer, ids)
    got = run(layer, call, by_rows=FORMS[form])
    assert got.isfinite().all()
    if max(map(max, ids)) < 9:
        check(layer, call, got)
    else:
        assert (got == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_weight_zero_reads_no_slot(form: str) -> None:
    """What a router gives weight zero is neither fetched nor computed, nor does it count."""
    layer = make_layer(KINDS["halves"], E=4, D=12, F=6, dtype=torch.float32).without([3])
    call = routed(layer, [[0, 3], [3, 1], [2, 3]], weights=[[0.5, 0.0], [0.0, 0.7], [1.0, 0.0]])
    without = routed(layer, [[0], [1], [2]], weights=[[0.5], [0.7], [1.0]])
    assert torch.equal(run(layer, call, by_rows=FORMS[form]), run(layer, without, by_rows=FORMS[form]))


@pytest.mark.parametrize("form", FORMS)
def test_identities(form: str) -> None:
    layer = make_layer(KINDS["halves"], E=3, D=12, F=6, dtype=torch.float32)
    call = routed(layer, [[0, 3], [4, 1], [5, 2]])
    check(layer, call, run(layer, call, by_rows=FORMS[form], identities=2), identities=2)


@pytest.mark.parametrize("form", FORMS)
def test_experts_that_are_not_resident_are_left_out(form: str) -> None:
    """Nothing is read through slot -1; their rows stay as they were."""
    layer = make_layer(KINDS["biases"], E=3, D=12, F=6, dtype=torch.float32)
    call = routed(layer, [[0, 1], [2, 0]])
    got = run(layer.without([2]), call, by_rows=FORMS[form])
    assert torch.equal(got[0], run(layer, call, by_rows=FORMS[form])[0])
    assert got[1].isnan().all()  # the poison of the row that was not computed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_twins_agree(form: str, dtype: str) -> None:
    layer = make_layer(KINDS["as gpt_oss"], E=4, D=14, F=9, dtype=DTYPES[dtype])
    call = routed(layer, [[0, 4], [3, 1], [2, 2]], weights=[[0.5, 1.0], [0.0, 0.7], [1.0, 0.2]])
    waves = {"up_waves": [[3, 0], [1, 2]], "down_waves": [[2], [0, 1, 3]]}
    got, want = (run(layer, call, impl=impl, by_rows=FORMS[form], **waves) for impl in (KERNELS, TWINS))
    assert error(got, want) <= TOLERANCES[DTYPES[dtype]]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("T", [2, 12], ids=["rows", "grouped"])
def test_no_further_from_float64_than_stock(T: int, dtype: str) -> None:
    config = Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    stock: Any = Qwen3MoeExperts(config).to(DTYPES[dtype]).to(DEVICE)
    layer = make_layer(KINDS["halves"], E=4, D=64, F=48, dtype=DTYPES[dtype])
    call = routed(layer, draw(T, 2, 4))
    with torch.no_grad():
        for parameter, projection in ((stock.gate_up_proj, layer.up), (stock.down_proj, layer.down)):
            parameter.copy_(projection.weight.data[projection.weight.slot_of_E.long()])
        theirs = stock(call.x_TD, call.ids_TA, call.weights_TA.to(DTYPES[dtype]))
    call = type(call)(x_TD=call.x_TD, ids_TA=call.ids_TA, weights_TA=call.weights_TA.to(DTYPES[dtype]))
    exact = reference(layer, call)
    assert error(run(layer, call), exact) <= 1.5 * error(theirs, exact)


@pytest.mark.parametrize("form", FORMS)
def test_same_bits_every_time(form: str) -> None:
    layer = make_layer(KINDS["halves"], E=4, D=40, F=24, dtype=torch.float16)
    call = routed(layer, draw(9, 3, 4))
    first = run(layer, call, by_rows=FORMS[form])
    assert all(torch.equal(first, run(layer, call, by_rows=FORMS[form])) for _ in range(2))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2", "none"])
def test_activations_in_single_precision(activation: str) -> None:
    """Value by value: in a whole layer a wrong digit of a constant would be lost among sums."""
    x_M1 = torch.linspace(-3, 3, 64, device=DEVICE)[:, None]
    one = Pool(data=torch.ones(1, 1, 1, device=DEVICE), slot_of_E=torch.zeros(1, dtype=torch.int32, device=DEVICE))
    ids, weights, out = torch.zeros_like(x_M1).long(), torch.ones_like(x_M1), poisoned(64, 1, dtype=torch.float32)
    projection = Projection(weight=one, gate=Gate(activation=activation))
    tile = TABLE.rows(Call(T=64, A=1, E=1, dtype=torch.float32), Shape(N=1, K=1, gated=False, transposed=False))
    rows.rows_product(out, x_M1, ids, weights, projection, None, weighted=False, tile=tile)
    assert float((out - TWINS.activate_one(x_M1.double(), activation)).abs().max()) < 3e-6


def products(layer: Layer, call: Routed, h_RF: Tensor, out_RD: Tensor, *, by_rows: bool) -> tuple[Tensor, Tensor]:
    """Compute the second product alone, weighted; return its rows and their input, pair by pair."""
    shape = Call(T=len(call.ids_TA), A=call.ids_TA.shape[1], E=layer.E, dtype=h_RF.dtype)
    product = Shape(N=layer.D, K=layer.F, gated=False, transposed=False)
    given: Any = (call.weights_TA, layer.down, None)
    if by_rows:
        tile = TABLE.rows(shape, product)
        rows.rows_product(out_RD, h_RF, call.ids_TA, *given, weighted=True, tile=tile)
        return out_RD, h_RF
    tile = TABLE.grouped(shape, product)
    plan = schedule.schedule(call.ids_TA, call.weights_TA, None, experts=layer.E, block=tile.rows)
    grouped.grouped_product(out_RD, h_RF, plan, *given, gather=False, weighted=True, tile=tile)
    order = plan.row_of_R.long()
    return out_RD[order], h_RF[order]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_routing_weights_count_in_single_precision(form: str, dtype: str) -> None:
    """After the bias, and before anything is rounded: a tolerance for 16-bit results would hide it."""
    layer = make_layer(KINDS["biases"], E=3, D=20, F=40, dtype=DTYPES[dtype])
    call = routed(layer, draw(4, 2, 3))
    h_RF = torch.randn(8, 40, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype]).to(DEVICE)
    got, h_RF = products(layer, call, h_RF, poisoned(8, 20, dtype=torch.float32), by_rows=FORMS[form])
    pairs = zip(h_RF.double(), call.ids_TA.flatten().tolist(), call.weights_TA.flatten().double(), strict=True)
    want = torch.stack([TWINS.product(h_F, e, layer.down) * weight for h_F, e, weight in pairs])
    assert error(got, want) <= TOLERANCES[torch.float32]


def test_experts_are_added_in_the_order_of_the_routing() -> None:
    """Bit for bit: the first expert's row, then the second's, and so on, whatever their size."""
    T, A, D = 3, 5, 70
    generator = torch.Generator().manual_seed(0)
    out_RD = torch.randn(T * A, D, generator=generator) * 10.0 ** torch.randint(-3, 4, (T * A, 1), generator=generator)
    order = torch.randperm(T * A, generator=generator)
    want = torch.zeros(T, D)
    for a in range(A):
        want += out_RD[order.view(T, A)[:, a]]
    ids_TA, weights_TA = torch.zeros(T, A, dtype=torch.int64, device=DEVICE), torch.ones(T, A, device=DEVICE)
    x_TD = torch.empty(T, D, device=DEVICE)
    row_of_R = order.to(torch.int32).to(DEVICE)
    got = combine.combine(out_RD.to(DEVICE), row_of_R, x_TD, ids_TA, weights_TA, experts=1, weighted=True)
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("form", FORMS)
def test_ids_below_zero_are_of_no_expert(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nobody looks at them before the launch: kernels must leave them out, as those of E and more."""
    for module in (checks, schedule, combine):
        monkeypatch.setattr(module, "check_routing", lambda *args: None)
    layer = make_layer(KINDS["halves"], E=4, D=12, F=6, dtype=torch.float32)
    below, above = (routed(layer, [[0, none], [none, 3], [none, none]]) for none in (-1, 4))
    got = run(layer, below, by_rows=FORMS[form])
    assert torch.equal(got, run(layer, above, by_rows=FORMS[form]))
    assert (got[2] == 0).all()
    # Before the table of slots and behind it lies what could be one, which nobody may look at.
    slot_of_E = layer.down.weight.slot_of_E
    around = torch.cat([slot_of_E[:1], slot_of_E, slot_of_E[:1]])[1:-1]
    down = dataclasses.replace(layer.down, weight=Pool(data=layer.down.weight.data, slot_of_E=around))
    for call in (below, above):
        out_RD = poisoned(6, 12, dtype=torch.float32)
        h_RF = torch.ones(6, 6, device=DEVICE)
        products(dataclasses.replace(layer, down=down), call, h_RF, out_RD, by_rows=FORMS[form])
        assert int(out_RD.isfinite().all(1).sum()) == 2


@pytest.mark.parametrize("form", FORMS)
def test_a_wave_leaves_other_experts_alone(form: str) -> None:
    """They may be in slots and half copied: that computing them too gives the same bits is no excuse."""
    layer = make_layer(KINDS["halves"], E=3, D=12, F=6, dtype=torch.float32)
    call = routed(layer, [[0], [1], [2]])
    for waves in ({"up_waves": [[1]]}, {"down_waves": [[1]]}):
        got: Any = run(layer, call, by_rows=FORMS[form], **waves)
        assert got.isnan().all(1).tolist() == [True, False, True]


def far_apart(rows: int, columns: int) -> Tensor:
    """Rows of which the last lies 2^31 elements and more from the first; what is between is never touched."""
    stride = 2**31 // (rows - 1)
    memory = torch.empty((rows - 1) * stride + columns, dtype=torch.bfloat16)
    return memory.as_strided((rows, columns), (stride, 1))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="takes memory that only an operating system gives without having it")
@pytest.mark.parametrize("form", FORMS)
def test_rows_beyond_2_31_elements(form: str) -> None:
    """Of input and output, as T = 40 000 tokens of eight experts have them."""
    layer = make_layer(KINDS["halves"], E=1, D=12, F=8, dtype=torch.bfloat16)
    call = routed(layer, [[0], [0], [0]])
    h_RF = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    want, _ = products(layer, call, h_RF, poisoned(3, 12, dtype=torch.bfloat16), by_rows=FORMS[form])
    got, _ = products(layer, call, far_apart(3, 8).copy_(h_RF), far_apart(3, 12), by_rows=FORMS[form])
    assert torch.equal(got, want)
    y_TD = [
        combine.combine(out, None, call.x_TD, call.ids_TA, call.weights_TA, experts=1, weighted=True)
        for out in (got, want)
    ]
    assert torch.equal(*y_TD)


@triton.jit
def address_kernel(out_ptr, data_ptr, slot_ptr, stride_s):
    for e in range(3):
        tl.store(out_ptr + e, slot_base(data_ptr, slot_ptr, e, stride_s).to(tl.int64))


def test_addresses_beyond_2_31_elements() -> None:
    """Qwen3-30B's pool: slot 683 of 3 145 728 elements each is past 2^31."""
    data = torch.zeros(1, dtype=torch.bfloat16, device=DEVICE)
    slot_of_E = torch.tensor([0, 683, 40_000], dtype=torch.int32, device=DEVICE)
    out = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    address_kernel[(1,)](out, data, slot_of_E, 3_145_728)
    assert (out - data.data_ptr()).tolist() == [2 * 3_145_728 * slot for slot in (0, 683, 40_000)]


class Recorded:
    """Stands for a kernel, and notes its grid."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return lambda *args, **kwargs: None


def test_forty_thousand_tokens_fit_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first dimension of a grid may exceed 65 535; here it has 320 000 pairs."""
    kernels = Recorded()
    for module in (rows, grouped, schedule):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, kernels)
    layer = make_layer(KINDS["halves"], E=4, D=2, F=2, dtype=torch.bfloat16)
    call = routed(layer, torch.zeros((40_000, 8), dtype=torch.int64))
    plan = schedule.schedule(call.ids_TA, call.weights_TA, None, experts=4, block=128)
    out = torch.empty((320_000, 2), dtype=torch.bfloat16, device=DEVICE)
    tile = SHIPPED.grouped(Call(T=40_000, A=8, E=4, dtype=torch.bfloat16), shape_of(layer))
    grouped.grouped_product(
        out, call.x_TD, plan, call.weights_TA, layer.up, None, gather=True, weighted=False, tile=tile
    )
    tile = SHIPPED.rows(Call(T=40_000, A=8, E=4, dtype=torch.bfloat16), shape_of(layer))
    rows.rows_product(out, call.x_TD, call.ids_TA, call.weights_TA, layer.up, None, weighted=False, tile=tile)
    assert all(len(grid) == 1 and grid[0] < 2**31 for grid in kernels.grids)
    assert kernels.grids[-2:] == [(plan.B,), (320_000,)]


def shape_of(layer: Layer) -> Shape:
    return Shape(N=layer.up.N, K=layer.up.K, gated=True, transposed=False)
