"""What may not change a bit: where experts lie, how a call is split into waves, in which order its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import KINDS, Routed, make_layer, routed, run

from promoe_triton.kernels.twins import error

E = 5
FORMS = {"rows": True, "grouped": False}
# Drawing a call starts a GPU, which is slow the first time.
EXAMPLES = settings(
    deadline=None, max_examples=12, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
FEW = settings(EXAMPLES, max_examples=6)


def layer(kind: str = "halves", **options: Any) -> Any:
    return make_layer(KINDS[kind], E=E, D=18, F=10, dtype=torch.float32, **options)


@st.composite
def calls(draw: st.DrawFn) -> Routed:
    """Up to eight tokens: sentinels, weights of zero, an expert twice, all on one."""
    T, A = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    some = draw(st.lists(st.integers(0, E + 1), min_size=1, max_size=E))
    ids = draw(st.lists(st.lists(st.sampled_from(some), min_size=A, max_size=A), min_size=T, max_size=T))
    weight = st.sampled_from([0.0, 0.125, 0.3, 1.0])
    weights = draw(st.lists(st.lists(weight, min_size=A, max_size=A), min_size=T, max_size=T))
    return routed(layer(), ids, weights=weights, seed=draw(st.integers(0, 99)))


def split(data: st.DataObject) -> list[list[int]]:
    """The experts in any order, cut anywhere."""
    order = data.draw(st.permutations(range(E)))
    cuts = sorted(data.draw(st.sets(st.integers(0, E))) | {0, E})
    return [order[a:b] for a, b in pairwise(cuts)]


def every_form(limits: settings) -> Callable[[Any], Any]:
    def wrap(test: Any) -> Any:
        @pytest.mark.parametrize("form", FORMS)
        def checked(form: str) -> None:
            limits(given(st.data())(lambda data: test(data, FORMS[form])))()

        checked.__name__ = test.__name__
        checked.__doc__ = test.__doc__
        return checked

    return wrap


@every_form(EXAMPLES)
def test_waves(data: st.DataObject, by_rows: bool) -> None:
    call, up, down = data.draw(calls()), split(data), split(data)
    kind = data.draw(st.sampled_from(["halves", "biases"]))
    want = run(layer(kind), call, by_rows=by_rows)
    assert torch.equal(run(layer(kind), call, by_rows=by_rows, up_waves=up, down_waves=down), want)


@every_form(FEW)
def test_slots(data: st.DataObject, by_rows: bool) -> None:
    """Any expert in any slot; in order and without spare slots it is the dense layer."""
    call, slots = data.draw(calls()), data.draw(st.permutations(range(E + 3)))[:E]
    dense = layer(slots=range(E), spare=0)
    assert torch.equal(run(layer(slots=slots, spare=3), call, by_rows=by_rows), run(dense, call, by_rows=by_rows))


@every_form(FEW)
def test_recycled_slots(data: st.DataObject, by_rows: bool) -> None:
    """More experts than slots: of each half, only a wave's experts are resident while it is computed."""
    call, up, down = data.draw(calls()), split(data), split(data)
    whole = layer()

    def only(wave: Sequence[int]) -> Any:
        return whole.without([e for e in range(E) if e not in wave])

    got = run(whole, call, by_rows=by_rows, up_tables=[*map(only, up)], down_tables=[*map(only, down)])
    assert torch.equal(got, run(whole, call, by_rows=by_rows))


@every_form(EXAMPLES)
def test_order_of_tokens(data: st.DataObject, by_rows: bool) -> None:
    call = data.draw(calls())
    order = torch.tensor(data.draw(st.permutations(range(len(call.ids_TA)))), device=call.ids_TA.device)
    want = run(layer(), call, by_rows=by_rows)[order]
    assert torch.equal(run(layer(), call.rows(order), by_rows=by_rows), want)


@every_form(FEW)
def test_ranks(data: st.DataObject, by_rows: bool) -> None:
    """When an expert is ready decides when it is computed, not what."""
    call = data.draw(calls())
    ranks = data.draw(st.lists(st.integers(0, 2), min_size=E, max_size=E))
    rank_E = torch.tensor(ranks, dtype=torch.int32, device=call.ids_TA.device)
    assert torch.equal(run(layer(), call, by_rows=by_rows, rank_E=rank_E), run(layer(), call, by_rows=by_rows))


@every_form(FEW)
def test_zero_weights(data: st.DataObject, by_rows: bool) -> None:
    """A pair of weight zero counts as little as one of no expert."""
    call = data.draw(calls())
    ids_TA = torch.where(call.weights_TA == 0, E, call.ids_TA)
    same = Routed(x_TD=call.x_TD, ids_TA=ids_TA, weights_TA=call.weights_TA)
    assert torch.equal(run(layer(), same, by_rows=by_rows), run(layer(), call, by_rows=by_rows))


@EXAMPLES
@given(calls())
def test_forms_agree(call: Routed) -> None:
    one, other = (run(layer(), call, by_rows=by_rows) for by_rows in (True, False))
    assert error(one, other) < 1e-6
