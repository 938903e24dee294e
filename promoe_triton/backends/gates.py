"""Which fused activation an experts module's own gate is, found by trying it; what runs instead where it is none."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from promoe_triton.kernels import twins
from promoe_triton.kernels.activation import ACTIVATIONS
from promoe_triton.kernels.pool import Gate
from promoe_triton.layout import ExpertLayout

WIDTH = 193
"""Values that are tried in each operand; an odd number, so that halves and turns cannot be mixed up."""


def own_gate(module: nn.Module, layout: ExpertLayout, up_RN: Tensor, gated: bool) -> Tensor:
    """Return what the module itself makes of the columns of its first product."""
    if gated and hasattr(module, "_apply_gate"):
        whole: Any = module._apply_gate
        h_RF: Tensor = whole(up_RN)
        return h_RF
    activation = attrgetter(layout.activation)(module)
    if gated:
        gate_RF, up_RF = up_RN.chunk(2, dim=-1)
        h_RF = activation(gate_RF) * up_RF
    else:
        h_RF = activation(up_RN)
    return h_RF


@torch.no_grad()
def fused_gate(module: nn.Module, layout: ExpertLayout, gated: bool) -> Gate | None:
    """Return the gate that the kernels can compute in the module's place; None where no candidate gives its values.

    All are tried on the same numbers, spread over three times the limit at which the module clamps.
    """
    limit, alpha = _number(module, "limit", 7.0), _number(module, "alpha", 1.702)
    generator = torch.Generator().manual_seed(0)
    probe = torch.linspace(-3.0 * limit, 3.0 * limit, WIDTH)
    up_N = torch.cat([probe, probe[torch.randperm(WIDTH, generator=generator)]]) if gated else probe
    own = own_gate(module, layout, up_N.view(1, -1), gated)[0]
    for activation in ACTIVATIONS[1:]:
        for interleaved in (False, True) if gated else (False,):
            if activation == "clamped_swiglu" and not gated:
                continue
            gate = Gate(activation=activation, gated=gated, interleaved=interleaved, alpha=alpha, limit=limit)
            tried = twins.activate(up_N.double(), gate)
            if tried.shape == own.shape and torch.allclose(own.double(), tried, rtol=1e-5, atol=1e-5):
                return gate
    return None


def _number(module: nn.Module, name: str, default: float) -> float:
    value = getattr(module, name, None)
    return float(value) if isinstance(value, int | float) and value > 0 else default
