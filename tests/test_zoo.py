"""The tiny models are worth testing with: they run, they route, and a seed names one model."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from zoo import FAMILIES, moe_experts

TOKENS = 7
NEW = 4


def _experts_in_use(experts: nn.Module) -> int:
    """How many experts the last backward pass gave a gradient to, whatever way the module keeps them."""
    if isinstance(experts, nn.ModuleDict | nn.ModuleList):
        return sum(any(_has_gradient(p) for p in child.parameters()) for child in experts.children())
    count = cast(int, getattr(experts, "num_experts", None) or getattr(experts, "num_routed_experts", None))
    weights = [p for p in experts.parameters() if p.dim() >= 2 and _has_gradient(p)]
    per_expert = [cast(Tensor, p.grad).reshape(count, -1) for p in weights if p.shape[0] % count == 0]
    return min((int(gradient.any(1).sum()) for gradient in per_expert), default=0)


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


@pytest.mark.parametrize("name", FAMILIES)
def test_runs_and_routes(name: str) -> None:
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = family.build()
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}

    output: Any = model(**family.inputs(model, TOKENS))
    values = output.logits if family.causal else output[0]
    assert values.isfinite().all()
    assert values.flatten(0, -2).std(0).min() > 0  # tokens differ

    values.square().sum().backward()
    experts = moe_experts(model)
    assert len(experts) >= 2
    assert max(map(_experts_in_use, experts.values())) >= 2


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.generates])
def test_generates(name: str) -> None:
    family = FAMILIES[name]
    torch.manual_seed(0)
    model: Any = family.build()
    ids = family.inputs(model, TOKENS)["input_ids"]
    out = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert out.shape == (1, NEW + (1 if model.config.is_encoder_decoder else TOKENS))


@pytest.mark.parametrize("name", FAMILIES)
def test_same_seed_same_model(name: str) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(1)
        states.append(FAMILIES[name].build().state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
