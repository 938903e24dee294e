"""h = activation(gate) * up, or activation(up): what is computed between the two products, in fp32.

| ACTIVATION       | of gate g and up u                                   | of u alone |
|------------------|------------------------------------------------------|------------|
| "none"           |                                                      | u          |
| "silu"           | g sigmoid(g) u                                       | u sigmoid(u) |
| "gelu"           | g Phi(g) u                                           | u Phi(u) |
| "gelu_tanh"      | the same with Phi by tanh                            | |
| "relu2"          | max(g, 0)^2 u                                        | max(u, 0)^2 |
| "clamped_swiglu" | g' sigmoid(alpha g') (u' + 1), g' = min(g, limit), u' = clamp(u, -limit, limit) | |
"""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "relu2", "clamped_swiglu")


@triton.jit
def activate_one(g, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        g = g / (1.0 + tl.exp(-g))
    elif ACTIVATION == "gelu":
        g = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh z) / 2 = sigmoid(2 z)
        g = g / (1.0 + tl.exp(-1.5957691216057308 * (g + 0.044715 * g * g * g)))
    elif ACTIVATION == "relu2":
        g = tl.maximum(g, 0.0)
        g = g * g
    else:
        tl.static_assert(ACTIVATION == "none", "an activation of one operand")
    return g


@triton.jit
def activate_gated(g, u, alpha, limit, ACTIVATION: tl.constexpr):
    if ACTIVATION == "clamped_swiglu":
        g = tl.minimum(g, limit)
        u = tl.minimum(tl.maximum(u, -limit), limit)
        h = g / (1.0 + tl.exp(-alpha * g)) * (u + 1.0)
    else:
        h = activate_one(g, ACTIVATION) * u
    return h
