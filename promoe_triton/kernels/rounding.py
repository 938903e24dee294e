"""Conversions between storage and sums: on a GPU those of the hardware, in the interpreter made equal to them.

Triton's interpreter keeps bf16 as 16-bit integers: it multiplies those in a dot, and cuts where it should round.
Where nothing is interpreted these helpers compile to one conversion, or to none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from promoe_triton.kernels.checks import IS_INTERPRETED

INTERPRETED = tl.constexpr(IS_INTERPRETED)


@triton.jit
def operand(x):
    """x, as a dot takes it."""
    if INTERPRETED:
        x = x.to(tl.float32)
    return x


@triton.jit
def rounded(y, dtype: tl.constexpr):
    """y (fp32) in the type it is stored in, to nearest, ties to even."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = y.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            y = bits.to(tl.float32, bitcast=True)
    return y.to(dtype)
