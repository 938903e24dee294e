"""Bad input raises before a launch and says what was expected and what came; every option of the ops is sound."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, KINDS, SHIPPED, TABLE, Layer, Routed, check, draw, make_layer, poisoned, routed, run
from torch import Tensor

from promoe_triton.kernels import checks, ops
from promoe_triton.kernels.combine import combine
from promoe_triton.kernels.grouped import grouped_product
from promoe_triton.kernels.pool import Gate, Pool, Projection
from promoe_triton.kernels.rows import rows_product
from promoe_triton.kernels.schedule import Schedule, schedule
from promoe_triton.kernels.tiles import Call, Shape, TileTable, table_for, target_of

CPU_ONLY = pytest.mark.skipif(DEVICE.type != "cpu", reason="only the CPU's values are looked at")


@pytest.fixture
def layer() -> Layer:
    return make_layer(KINDS["biases"], E=3, D=8, F=4, dtype=torch.float32)


@pytest.fixture
def call(layer: Layer) -> Routed:
    return routed(layer, [[0, 2], [1, 2]])


def up(layer: Layer, call: Routed, **changes: Any) -> None:
    tile = TABLE.rows(Call(T=2, A=2, E=3, dtype=torch.float32), Shape(N=4, K=8, gated=True, transposed=False))
    given: dict[str, Any] = {
        "out_RN": poisoned(4, 4, dtype=torch.float32),
        "x_MK": call.x_TD,
        "ids_TA": call.ids_TA,
        "weights_TA": call.weights_TA,
        "projection": layer.up,
        "wave_E": None,
    }
    rows_product(**(given | changes), weighted=False, tile=tile)


def changed(layer: Layer, **pools: Callable[[Tensor], Tensor]) -> Projection:
    new = {
        name: Pool(data=change(getattr(layer.up, name).data), slot_of_E=getattr(layer.up, name).slot_of_E)
        for name, change in pools.items()
    }
    return dataclasses.replace(layer.up, **new)


CASES: dict[str, tuple[Callable[[Layer, Routed], dict[str, Any]], type[Exception], str]] = {
    "another type": (
        lambda layer, call: {"x_MK": call.x_TD.half()},
        TypeError,
        r"weight: expected torch.float16 as the input, .* got torch.float32",
    ),
    "integers": (
        lambda layer, call: {"x_MK": call.x_TD.long()},
        TypeError,
        "input: expected float32, float16 or bfloat16, got torch.int64",
    ),
    "input too wide": (
        lambda layer, call: {"x_MK": call.x_TD[:, :-1]},
        ValueError,
        r"input: expected \[rows, 8\], got \[2, 7\]",
    ),
    "too few tokens": (
        lambda layer, call: {"x_MK": call.x_TD[:1]},
        ValueError,
        r"input: expected 2 rows \(tokens\) or 4 \(pairs\), got 1",
    ),
    "columns apart": (
        lambda layer, call: {"x_MK": torch.stack([call.x_TD, call.x_TD], -1)[..., 0]},
        ValueError,
        "input: expected columns that lie together",
    ),
    "weights apart": (
        lambda layer, call: {"projection": changed(layer, weight=lambda w: torch.stack([w, w], -1)[..., 0])},
        ValueError,
        "weight: expected an inner dimension that lies together",
    ),
    "odd rows of gate and up": (
        lambda layer, call: {"projection": changed(layer, weight=lambda w: w[:, :-1])},
        ValueError,
        "rows of the weight: expected an even number, of gate and up, got 7",
    ),
    "bias too long": (
        lambda layer, call: {"projection": changed(layer, bias=lambda b: torch.cat([b, b], 1))},
        ValueError,
        r"bias: expected \[S, 8\], got \[5, 16\]",
    ),
    "short output": (
        lambda layer, call: {"out_RN": poisoned(3, 4, dtype=torch.float32)},
        ValueError,
        "output: expected 4 rows, got 3",
    ),
    "wave of another length": (
        lambda layer, call: {"wave_E": torch.ones(4, dtype=torch.int32, device=DEVICE)},
        ValueError,
        r"wave: expected contiguous \[3\], got \[4\]",
    ),
    "wave of booleans": (
        lambda layer, call: {"wave_E": torch.ones(3, dtype=torch.bool, device=DEVICE)},
        TypeError,
        "wave: expected int32, got torch.bool",
    ),
    "ids as floats": (
        lambda layer, call: {"ids_TA": call.weights_TA},
        TypeError,
        "expert ids: expected int64 or int32, got torch.float32",
    ),
    "ids flat": (lambda layer, call: {"ids_TA": call.ids_TA.view(-1)}, ValueError, r"expert ids: expected \[T, A\]"),
    "weights of other shape": (
        lambda layer, call: {"weights_TA": call.weights_TA[:1]},
        ValueError,
        r"routing weights: expected \[2, 2\] as the expert ids, got \[1, 2\]",
    ),
    "ids apart": (
        lambda layer, call: {"ids_TA": call.ids_TA.t()},
        ValueError,
        "expert ids: expected a contiguous tensor",
    ),
    "another device": (
        lambda layer, call: {"x_MK": call.x_TD.to("meta")},
        ValueError,
        "expected on meta as input, got a tensor on",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, layer: Layer, call: Routed) -> None:
    change, error, message = CASES[case]
    with pytest.raises(error, match=message):
        up(layer, call, **change(layer, call))


GROUPED: dict[str, tuple[Callable[[Routed], dict[str, Any]], type[Exception], str]] = {
    # Their rows past the sixteenth would be dropped without a word.
    "blocks larger than the tile": (
        lambda call: {"schedule": schedule(call.ids_TA, call.weights_TA, None, experts=3, block=64)},
        ValueError,
        "schedule: expected blocks of at most 16 rows, as the tile has, got 64",
    ),
    "the schedule of another call": (
        lambda call: {"schedule": schedule(call.ids_TA[:1], call.weights_TA[:1], None, experts=3, block=16)},
        ValueError,
        r"routing weights: expected 2 as the schedule, got \[2, 2\]",
    ),
    "a schedule that is cut off": (
        lambda call: {"schedule": Schedule(packed=call.ids_TA.flatten().int(), R=4, B=4, block=16)},
        ValueError,
        r"schedule: expected \[21\], got \[4\]",
    ),
    "another type": (lambda call: {"x_MK": call.x_TD.half()}, TypeError, "weight: expected torch.float16 as the input"),
    "rows that are not gathered": (lambda call: {"gather": False}, ValueError, "input: expected 4 rows, got 2"),
    "short output": (
        lambda call: {"out_RN": poisoned(3, 4, dtype=torch.float32)},
        ValueError,
        "output: expected 4 rows, got 3",
    ),
}


@pytest.mark.parametrize("case", GROUPED)
def test_bad_input_of_grouped_rows(case: str, layer: Layer, call: Routed) -> None:
    change, error, message = GROUPED[case]
    tile = TABLE.grouped(Call(T=2, A=2, E=3, dtype=torch.float32), Shape(N=4, K=8, gated=True, transposed=False))
    given: dict[str, Any] = {
        "out_RN": poisoned(4, 4, dtype=torch.float32),
        "x_MK": call.x_TD,
        "schedule": schedule(call.ids_TA, call.weights_TA, None, experts=3, block=16),
        "weights_TA": call.weights_TA,
        "projection": layer.up,
        "wave_E": None,
        "gather": True,
    }
    grouped_product(**given, weighted=False, tile=tile)
    with pytest.raises(error, match=message):
        grouped_product(**(given | change(call)), weighted=False, tile=tile)


@CPU_ONLY
def test_ids_below_zero(layer: Layer, call: Routed) -> None:
    with pytest.raises(ValueError, match="expert ids: expected 0 or more, got -1"):
        up(layer, call, ids_TA=call.ids_TA - 1)


def test_ids_below_zero_where_nobody_looks(layer: Layer) -> None:
    """On a GPU they are taken for sentinels: no address is made of them."""
    call = routed(layer, [[0, 3], [1, 2]])
    want = run(layer, call)
    ids = call.ids_TA.clone()
    ids[0, 1] = -1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("promoe_triton.kernels.rows.check_rows", _anything)
        patch.setattr("promoe_triton.kernels.combine.check_routing", _anything)
        assert torch.equal(run(layer, Routed(x_TD=call.x_TD, ids_TA=ids, weights_TA=call.weights_TA)), want)


def _anything(*args: Any, **kwargs: Any) -> None: ...


def test_gates_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"activation must be one of none, silu, .* got 'tanh'"):
        Gate(activation="tanh")
    with pytest.raises(ValueError, match="gated is False"):
        Gate(activation="silu", interleaved=True)
    with pytest.raises(ValueError, match="gated is False"):
        Gate(activation="clamped_swiglu")


def test_ranks_are_checked(call: Routed) -> None:
    for rank_E, error in ((torch.zeros(3), TypeError), (torch.zeros(4, dtype=torch.int32), ValueError)):
        with pytest.raises(error, match="ranks: expected"):
            schedule(call.ids_TA, call.weights_TA, rank_E.to(DEVICE), experts=3, block=16)


def test_rows_of_the_sum_are_checked(call: Routed) -> None:
    with pytest.raises(ValueError, match="rows: expected 4 of them, got 5"):
        combine(poisoned(5, 8, dtype=torch.float32), None, *dataclasses.astuple(call), experts=3, weighted=True)
    for order, error in ((torch.zeros(4), TypeError), (torch.zeros(3, dtype=torch.int32), ValueError)):
        given = (poisoned(4, 8, dtype=torch.float32), order.to(DEVICE), *dataclasses.astuple(call))
        with pytest.raises(error, match="order: expected"):
            combine(*given, experts=3, weighted=True)


def test_the_cpu_needs_the_interpreter() -> None:
    code = """
import torch
from promoe_triton.kernels.schedule import Schedule, schedule
try:
    schedule(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), None, experts=1, block=16)
except ValueError as error:
    assert "expected a tensor on a GPU" in str(error) and "TRITON_INTERPRET=1" in str(error), error
else:
    raise SystemExit("launched")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


def flat(p: Projection) -> tuple[Any, ...]:
    kind = " interleaved" if p.gate.interleaved else " gated" if p.gate.gated else ""
    pools = [pool.tensors if pool else (None, None) for pool in (p.weight, p.bias, p.scale)]
    return (*(t for pair in pools for t in pair), p.gate.activation + kind, [p.gate.alpha, p.gate.limit])


def numbers(tile: Any) -> list[int]:
    return [*dataclasses.astuple(tile)]


def through_ops(
    layer: Layer, x: Tensor, ids: Tensor, weights: Tensor, tiles: tuple[list[int], list[int]], block: int | None
) -> Tensor:
    """Compute the layer from the operations alone, as a compiled graph does; block: None where rows are not grouped."""
    R, E = ids.numel(), layer.E
    h, y = x.new_empty((R, layer.F)), x.new_empty((R, layer.D))
    if block is None:
        torch.ops.promoe_triton.rows_product(h, x, ids, weights, None, *flat(layer.up), False, tiles[0])
        torch.ops.promoe_triton.rows_product(y, h, ids, weights, None, *flat(layer.down), True, tiles[1])
        return torch.ops.promoe_triton.combine(y, None, x, ids, weights, E, 0, True)
    plan = torch.ops.promoe_triton.schedule(ids, weights, None, E, block)
    torch.ops.promoe_triton.grouped_product(h, x, plan, block, weights, None, *flat(layer.up), True, False, tiles[0])
    torch.ops.promoe_triton.grouped_product(y, h, plan, block, weights, None, *flat(layer.down), False, True, tiles[1])
    return torch.ops.promoe_triton.combine(y, plan[R : 2 * R], x, ids, weights, E, 0, True)


def tiles_for(layer: Layer, call: Routed, form: str) -> tuple[list[int], list[int]]:
    shape = Call(T=len(call.ids_TA), A=call.ids_TA.shape[1], E=layer.E, dtype=call.x_TD.dtype)
    up = Shape(N=layer.F, K=layer.D, gated=layer.up.gate.gated, transposed=layer.up.is_transposed)
    down = Shape(N=layer.D, K=layer.F, gated=False, transposed=layer.down.is_transposed)
    return numbers(getattr(TABLE, form)(shape, up)), numbers(getattr(TABLE, form)(shape, down))


@pytest.mark.parametrize("form", ["rows", "grouped"])
def test_ops_are_sound(form: str) -> None:
    # Each pair has a block of its own: no part of the schedule is undefined, and two runs of it are equal.
    layer = make_layer(KINDS["as gpt_oss"], E=4, D=8, F=4, dtype=torch.float32)
    call = routed(layer, [[0, 2], [1, 3]])
    x, ids, weights = dataclasses.astuple(call)
    tiles = tiles_for(layer, call, form)
    out = torch.zeros(4, 4, device=DEVICE)
    if form == "rows":
        arguments: tuple[Any, ...] = (out, x, ids, weights, None, *flat(layer.up), False, tiles[0])
        torch.library.opcheck(ops.rows_product, arguments)
        return
    plan = ops.schedule(ids, weights, None, 4, 16)
    torch.library.opcheck(ops.schedule, (ids, weights, None, 4, 16))
    torch.library.opcheck(
        ops.grouped_product, (out, x, plan, 16, weights, None, *flat(layer.up), True, False, tiles[0])
    )
    rows = torch.zeros(4, 8, device=DEVICE)
    torch.library.opcheck(ops.combine, (rows, plan[4:8], x, ids, weights, 4, 0, True))


@pytest.mark.parametrize("T", [2, 9], ids=["rows", "grouped"])
def test_a_layer_as_one_op_is_sound(T: int) -> None:
    layer = make_layer(KINDS["as gpt_oss"], E=4, D=8, F=4, dtype=torch.float32, slots=range(4), spare=0)
    call = routed(layer, draw(T, 2, 4))
    pools = (layer.up.weight, layer.up.bias, layer.down.weight, layer.down.bias)
    up, up_bias, down, down_bias = (pool.data if pool else None for pool in pools)
    assert up is not None
    assert down is not None
    stored = up.transpose(1, 2), up_bias, down.transpose(1, 2), down_bias
    gate = [layer.up.gate.alpha, layer.up.gate.limit]
    kind = ("clamped_swiglu interleaved", gate, [True, True], 0)
    arguments = (*dataclasses.astuple(call), *stored, layer.up.weight.slot_of_E, *kind)
    torch.library.opcheck(ops.layer, arguments)
    check(layer, call, ops.layer(*arguments))


@pytest.mark.parametrize("form", ["rows", "grouped"])
def test_ops_in_one_graph(form: str) -> None:
    layer = make_layer(KINDS["biases"], E=3, D=8, F=4, dtype=torch.float32)
    call = routed(layer, draw(3, 2, 3))
    x, ids, weights = dataclasses.astuple(call)
    tiles, block = tiles_for(layer, call, form), 16 if form == "grouped" else None

    def function(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return through_ops(layer, x * 1.0, ids, weights, tiles, block) + 0.0

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    want = run(layer, call, by_rows=form == "rows")
    assert torch.equal(compiled(x, ids, weights), function(x, ids, weights))
    assert torch.allclose(compiled(x, ids, weights), want, atol=1e-5)


class TestTiles:
    def test_a_tile_follows_from_shapes_and_the_target_alone(self) -> None:
        shape = Shape(N=768, K=2048, gated=True, transposed=False)
        for T in (1, 16, 8192):
            calls = [Call(T=T, A=8, E=128, dtype=torch.bfloat16) for _ in range(2)]
            assert SHIPPED.grouped(calls[0], shape) == SHIPPED.grouped(calls[1], shape)

    @pytest.mark.parametrize(("T", "rows"), [(1, 16), (128, 16), (256, 32), (512, 64), (1024, 128), (8192, 128)])
    def test_blocks_have_about_twice_an_experts_share(self, T: int, rows: int) -> None:
        assert SHIPPED.block(Call(T=T, A=8, E=128, dtype=torch.bfloat16)) == rows

    @pytest.mark.parametrize(
        ("K", "depth"), [(2048, 64), (2880, 64), (704, 64), (97, 64), (47, 64), (40, 64), (16, 16), (1, 16)]
    )
    def test_steps_divide_where_they_can(self, K: int, depth: int) -> None:
        call = Call(T=64, A=8, E=128, dtype=torch.bfloat16)
        assert SHIPPED.grouped(call, Shape(N=64, K=K, gated=False, transposed=False)).depth == depth

    @pytest.mark.parametrize(("gated", "columns"), [(True, 64), (False, 128)])
    def test_weights_of_8_bits_leave_room_for_fewer_sums(self, gated: bool, columns: int) -> None:
        call = Call(T=8192, A=8, E=128, dtype=torch.bfloat16)
        wide, small = (Shape(N=2048, K=2048, gated=gated, transposed=False, small=small) for small in (False, True))
        table = table_for("sm_100")
        assert table.grouped(call, wide).columns == 2 * columns
        assert table.grouped(call, small).columns == columns

    def test_another_table_can_be_given(self) -> None:
        mine = TileTable(target="mine", entries=TABLE.entries)
        assert mine.block(Call(T=1, A=1, E=1, dtype=torch.float32)) == 16

    def test_targets(self) -> None:
        assert target_of(torch.device("cpu")) == "sm_80"
        assert {table_for(t).target for t in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")}
        with pytest.raises(ValueError, match=r"target must be one of sm_80, .* got 'sm_70'"):
            table_for("sm_70")


@CPU_ONLY
def test_an_interpreter_that_numpy_breaks_is_named(monkeypatch: pytest.MonkeyPatch, layer: Layer, call: Routed) -> None:
    """As Triton 3.6 with NumPy 2.4: before a launch, with both versions and what to install."""

    class Broken:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(n: int) -> None:
                raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

            return launch

    checks.check_interpreter.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(checks, "_count", Broken())
        with pytest.raises(RuntimeError, match=r"Triton \S+ interpreter does not work with NumPy .*install numpy<2.4"):
            up(layer, call)
    # What failed is not kept, and what works is looked at once.
    up(layer, call)
    assert checks.check_interpreter.cache_info().currsize == 1
