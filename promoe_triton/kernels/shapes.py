"""Shapes of MoE layers: those of real models that kernels are checked, tuned and measured with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from promoe_triton.kernels.pool import Gate
from promoe_triton.kernels.tiles import Call, Shape

TOKENS = (1, 2, 4, 8, 16, 32, 128, 512, 2048, 8192)
"""Numbers of tokens of a call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """D, F, E and A of a layer, and how its experts are kept: transposed as [K, N], biased with a bias each."""

    name: str
    D: int
    F: int
    E: int
    A: int
    gate: Gate = field(default_factory=lambda: Gate(activation="silu", gated=True))
    transposed: bool = False
    biased: bool = False

    def __str__(self) -> str:
        return f"{self.D}/{self.F}/{self.E}/{self.A}"

    @property
    def up(self) -> Shape:
        return Shape(N=self.F, K=self.D, gated=self.gate.gated, transposed=self.transposed)

    @property
    def down(self) -> Shape:
        return Shape(N=self.D, K=self.F, gated=False, transposed=self.transposed)

    @property
    def up_rows(self) -> int:
        """Rows of the first weight: those of gate and up."""
        return (2 if self.gate.gated else 1) * self.F

    def call(self, T: int, dtype: torch.dtype) -> Call:
        return Call(T=T, A=self.A, E=self.E, dtype=dtype)

    def expert_bytes(self, dtype: torch.dtype) -> int:
        biases = (self.up_rows + self.D) if self.biased else 0
        return (self.up_rows * self.D + self.D * self.F + biases) * dtype.itemsize

    def nbytes(self, dtype: torch.dtype) -> int:
        return self.E * self.expert_bytes(dtype)


GPT_OSS = Gate(activation="clamped_swiglu", gated=True, interleaved=True)

MAIN = (
    LayerShape(name="Qwen3-30B", D=2048, F=768, E=128, A=8),
    LayerShape(name="Mixtral", D=4096, F=14336, E=8, A=2),
    LayerShape(name="gpt-oss-20b", D=2880, F=2880, E=32, A=4, gate=GPT_OSS, transposed=True, biased=True),
    LayerShape(name="Qwen1.5-MoE", D=2048, F=1408, E=60, A=4),
)
FURTHER = (
    LayerShape(name="OLMoE", D=2048, F=1024, E=64, A=8),
    LayerShape(name="DeepSeek-V2-Lite", D=2048, F=1408, E=64, A=6),
    LayerShape(name="Qwen3.5-35B", D=2048, F=512, E=256, A=8),
    LayerShape(name="DeepSeek-V3", D=7168, F=2048, E=256, A=8),
)
TINY = (
    LayerShape(name="tiny", D=64, F=48, E=8, A=2),
    LayerShape(name="tiny gpt-oss", D=48, F=64, E=4, A=2, gate=GPT_OSS, transposed=True, biased=True),
)
"""For rehearsals in Triton's interpreter."""

SHAPES = {shape.name: shape for shape in (*MAIN, *FURTHER, *TINY)}
