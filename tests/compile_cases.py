"""Kernels that break the rules on purpose, compiled by a process that interprets nothing: prints what was found.

Run by test_kernels_compiled.py, as `python tests/compile_cases.py`.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
import triton.language as tl

from promoe_triton.kernels import grouped, rows
from promoe_triton.kernels.compiled import compile_request, request
from promoe_triton.kernels.devices import devices
from promoe_triton.kernels.launches import Launch, launches
from promoe_triton.kernels.rules import Facts, judge
from promoe_triton.kernels.shapes import LayerShape
from promoe_triton.kernels.tiles import TileTable, table_for


@triton.jit
def grouped_kernel(
    out_ptr,
    x_ptr,
    w_ptr,
    K,
    IS_GATED: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A product as one writes it first: a mask in the loop over K, and rows at a distance that nothing is known of."""
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
        w = tl.load(w_ptr + n[None, :] * K + k[:, None], mask=(k < K)[:, None], other=0.0)
        acc = tl.dot(x, w, acc)
    tl.store(out_ptr + m[:, None] * BLOCK_N + n[None, :], acc)


def masked(target: str) -> dict[str, str]:
    tensors = [torch.empty(1 << 20, dtype=torch.bfloat16, device="meta") for _ in range(2)]
    constants = {"IS_GATED": False, "IS_INTERLEAVED": False, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
    options: dict[str, Any] = {**constants, "num_warps": 8, "num_stages": 3}
    # 2049: known to be no multiple of 16.
    args = (torch.empty(1 << 14, device="meta"), *tensors, 2049)
    launch = Launch(stage="up", kernel=f"{__name__}:grouped_kernel", grid=1, args=args, options=options)
    return broken(launch, target)


def broken(launch: Launch, target: str) -> dict[str, str]:
    one = request(launch, target)
    return judge(Facts(request=one, compiled=compile_request(one), device=devices()[target])).broken


def tile(columns: int, depth: int, warps: int, stages: int) -> dict[str, int]:
    return {"columns": columns, "gated_columns": columns, "depth": depth, "warps": warps, "stages": stages}


def with_tile(target: str, T: int, entry: dict[str, int], stage: str, *, D: int = 2048) -> dict[str, str]:
    """Return what is broken of a stage of Qwen3-30B (or one with another D) at a tile for T tokens."""
    table = TileTable(target=target, entries={"16": {"rows": entry, "grouped": {"128": entry}}})
    shape = LayerShape(name="", D=D, F=768, E=128, A=8)
    return next(broken(launch, target) for launch in launches(shape, T, torch.bfloat16, table) if launch.stage == stage)


def with_tf32(target: str) -> dict[str, str]:
    """Return what is broken of a shipped kernel in fp32 whose products may be cut to TF32."""
    jits = (grouped.multiply, grouped.grouped_kernel)
    sources = [jit.src for jit in jits]
    assert 'input_precision="ieee"' in sources[0]
    grouped.multiply._unsafe_update_src(sources[0].replace('input_precision="ieee"', 'input_precision="tf32"'))
    grouped.grouped_kernel._unsafe_update_src(sources[1])  # forgets what it was made of
    try:
        return shipped(target, torch.float32)
    finally:
        for jit, source in zip(jits, sources, strict=True):
            jit._unsafe_update_src(source)


def shipped(target: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, str]:
    shape = LayerShape(name="", D=2048, F=768, E=128, A=8)
    used = launches(shape, 2048, dtype, table_for(target))
    return next(broken(launch, target) for launch in used if launch.stage == "up")


def versions() -> dict[str, int]:
    """Return how many versions of each kernel calls of eight numbers of tokens need, which differ in nothing else."""
    shape = LayerShape(name="", D=2048, F=768, E=128, A=7)
    wanted: dict[str, set[Any]] = {}
    for T in range(101, 109):
        for launch in launches(shape, T, torch.bfloat16, table_for("sm_90")):
            name = f"{launch.stage} {launch.kernel.rpartition(':')[2]}"
            wanted.setdefault(name, set()).add(request(launch, "sm_90"))
    return {name: len(requests) for name, requests in wanted.items()}


def main() -> None:
    kernel = rows.rows_kernel
    found = {
        "masked on sm_80": masked("sm_80"),
        "masked on sm_90": masked("sm_90"),
        "too large for sm_90": with_tile("sm_90", 2048, tile(256, 64, 8, 5), "down"),
        "too large for sm_120": with_tile("sm_120", 2048, tile(128, 64, 8, 5), "down"),
        "too many registers": with_tile("sm_80", 2048, tile(128, 64, 8, 3), "up"),
        "rows that are not aligned": with_tile("sm_90", 2048, tile(128, 64, 8, 3), "up", D=2046),
        "single rows that are not aligned": with_tile("sm_90", 1, tile(8, 512, 4, 1), "up", D=2046),
        "shipped": shipped("sm_90"),
        "shipped in fp32": shipped("sm_90", torch.float32),
        **{
            f"fp32 with TF32 allowed on {target}": with_tf32(target)
            for target in ("sm_80", "sm_90", "sm_100", "sm_120")
        },
    }
    assert rows.rows_kernel is kernel, "kernels stand where they stood"
    print(json.dumps({"broken": found, "versions": versions()}))


if __name__ == "__main__":
    main()
