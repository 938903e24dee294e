"""The layers that kernels are checked and measured with: of real models, and the numbers of tokens of a call."""

from __future__ import annotations

import dataclasses

from promoe_triton.kernels.launches import Layer
from promoe_triton.kernels.pool import Gate

TOKENS = (1, 2, 4, 8, 16, 32, 128, 512, 2048, 8192)

_QWEN3 = Layer(name="Qwen3-30B", D=2048, F=768, E=128, A=8)
_GPT_OSS = Layer(
    name="gpt-oss-20b",
    D=2880,
    F=2880,
    E=32,
    A=4,
    gate=Gate(activation="clamped_swiglu", gated=True, interleaved=True),
    transposed=True,
    bias=True,
)

LAYERS = (
    _QWEN3,
    Layer(name="Mixtral", D=4096, F=14336, E=8, A=2),
    _GPT_OSS,
    Layer(name="Qwen1.5-MoE", D=2048, F=1408, E=60, A=4),
    Layer(name="OLMoE", D=2048, F=1024, E=64, A=8),
    Layer(name="DeepSeek-V2-Lite", D=2048, F=1408, E=64, A=6),
    Layer(name="Qwen3.5-35B", D=2048, F=512, E=256, A=8),
    Layer(name="DeepSeek-V3", D=7168, F=2048, E=256, A=8),
    *(dataclasses.replace(layer, dtype=dtype) for layer in (_QWEN3, _GPT_OSS) for dtype in ("fp16", "fp32")),
)

WAVES = _QWEN3
"""The layer that is compiled a second time for experts in waves."""


def title(layer: Layer) -> str:
    return layer.name if layer.dtype == "bf16" else f"{layer.name} {layer.dtype}"
