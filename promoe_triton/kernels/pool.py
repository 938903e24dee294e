"""Where experts lie: data[slot_of_E[e]] for every expert e that is resident.

| name      | shape    | meaning                                                                      |
|-----------|----------|------------------------------------------------------------------------------|
| data      | S, ...   | one tensor of every slot, a view of the buffer of all slots: any slot stride |
| slot_of_E | E        | int32 or int64: the slot of each expert, -1: not resident                    |

The product of slot and slot stride is taken in 64 bits (Qwen3-30B's pool passes 2^31 elements at slot 683), offsets
inside an expert in 32. Tensors that lie at no regular distance come as a view with slot stride 1, their slots being
distances in elements.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from promoe_triton.kernels.activation import ACTIVATIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """One tensor of every expert in slots."""

    data: Tensor
    slot_of_E: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.data, self.slot_of_E


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What becomes of a product: see `activation`. gated: its columns are gate and up, in halves or by turns.

    alpha, limit: of "clamped_swiglu".
    """

    activation: str = "none"
    gated: bool = False
    interleaved: bool = False
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.interleaved and not self.gated:
            raise ValueError("interleaved columns are those of gate and up, but gated is False")
        if self.activation == "clamped_swiglu" and not self.gated:
            raise ValueError("clamped_swiglu combines gate and up, but gated is False")


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """One product of every expert: rows times weight, times scale, plus bias, then the gate.

    weight: [S, N, K], in memory also [S, K, N]: its strides tell. scale: fp32 [S, N], one factor for every row of
    the weight, for weights that are stored in another type than the rows; bias: [S, N].
    """

    weight: Pool
    bias: Pool | None = None
    scale: Pool | None = None
    gate: Gate = field(default_factory=Gate)

    @property
    def K(self) -> int:
        return self.weight.data.shape[2]

    @property
    def N(self) -> int:
        """Columns of the result."""
        return self.weight.data.shape[1] // (2 if self.gate.gated else 1)

    @property
    def is_transposed(self) -> bool:
        """Whether N is the dimension that lies together in memory."""
        return self.weight.data.stride(2) != 1

    @property
    def experts(self) -> int:
        return self.weight.slot_of_E.shape[0]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What a kernel is given of it, in the order of both products' signatures, from w_ptr to limit.

        Where there is no bias or scale the weight stands in its place, and is not read for it.
        """
        weight, bias, scale = self.weight, self.bias or self.weight, self.scale or self.weight
        return (
            *weight.tensors,
            *weight.data.stride(),
            *bias.tensors,
            bias.data.stride(0),
            *scale.tensors,
            scale.data.stride(0),
            self.gate.alpha,
            self.gate.limit,
        )

    @property
    def constants(self) -> dict[str, Any]:
        """What a kernel is compiled for."""
        return {
            "N": self.N,
            "K": self.K,
            "ACTIVATION": self.gate.activation,
            "IS_GATED": self.gate.gated,
            "IS_INTERLEAVED": self.gate.interleaved,
            "HAS_BIAS": self.bias is not None,
            "HAS_SCALE": self.scale is not None,
        }


@triton.jit
def slot_base(data_ptr, slot_ptr, e, stride_s):
    """Address of expert e's tensor."""
    return data_ptr + tl.load(slot_ptr + e).to(tl.int64) * stride_s


@triton.jit
def is_due(slot_ptr, wave_ptr, e, HAS_WAVE: tl.constexpr):
    """Whether expert e is resident and belongs to this wave."""
    due = tl.load(slot_ptr + e) >= 0
    if HAS_WAVE:
        due = due & (tl.load(wave_ptr + e) != 0)
    return due


@triton.jit
def begin_of_tile(n, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """First column of a tile: the last tile ends where the columns end, and shares some with the one before.

    So all tiles are whole. Repeating the last column instead would hide from the compiler which columns lie together.
    """
    if N % BLOCK_N == 0 or N < BLOCK_N:
        return n
    else:
        return tl.minimum(n, N - BLOCK_N)


@triton.jit
def rows_of_tile(first, ROWS: tl.constexpr, ALL: tl.constexpr):
    """Rows of the weight from `first` on; where there are fewer than a tile has, the last one is repeated."""
    rows = first + tl.arange(0, ROWS)
    if ALL < ROWS:
        rows = tl.minimum(rows, ALL - 1)
    return rows


@triton.jit
def is_own(cols, n, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which columns of a tile are its own to write: not those of the tile before, nor such as are not there."""
    if N < BLOCK_N:
        return cols < N
    else:
        return cols >= n
