"""Bad input raises before a launch, naming what was expected and what came. Nothing here waits for the device."""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

if TYPE_CHECKING:
    from promoe_triton.kernels.pool import Pool, Projection
    from promoe_triton.kernels.schedule import Schedule

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _probe():
    """Nothing: how it was decorated tells whether kernels of this process run on a GPU or in the interpreter."""


IS_INTERPRETED = not isinstance(_probe, triton.JITFunction)
"""Whether TRITON_INTERPRET was set when the kernels were imported: they run on the CPU then, for tests."""


@triton.jit
def _count(n):
    """Nothing, n times."""
    for _ in range(n):
        pass


@functools.cache
def check_interpreter() -> None:
    """Raise RuntimeError where Triton's interpreter fails on the NumPy that is installed, as 3.6 does on NumPy 2.4.

    That refuses to make a number of an array of one element, which older interpreters take for every bound of a loop.
    """
    try:
        _count[(1,)](1)
    except Exception as error:
        raise RuntimeError(
            f"Triton {triton.__version__}'s interpreter does not work with NumPy {version('numpy')} ({error}); "
            "install numpy<2.4, or a newer Triton. On a GPU nothing is interpreted: unset TRITON_INTERPRET"
        ) from error


def expect(holds: bool, name: str, expected: str, got: object) -> None:
    """Raise ValueError unless something holds."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def expect_type(holds: bool, name: str, expected: str, got: object) -> None:
    """Raise TypeError unless something holds."""
    if not holds:
        raise TypeError(f"{name}: expected {expected}, got {got}")


def check_device(**tensors: Tensor | None) -> None:
    """All on one device, which kernels of this process can read."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    (first, device), *_ = devices.items()
    for name, other in devices.items():
        expect(other == device, name, f"on {device} as {first}", f"a tensor on {other}")
    on_host = device.type == "cpu"
    expect(
        not on_host or IS_INTERPRETED,
        first,
        "a tensor on a GPU (Triton's interpreter, TRITON_INTERPRET=1 set before the import, takes the CPU's)",
        f"a tensor on {device}",
    )
    if on_host:
        check_interpreter()


def check_routing(ids_TA: Tensor, weights_TA: Tensor) -> None:
    expect_type(ids_TA.dtype in (torch.int64, torch.int32), "expert ids", "int64 or int32", ids_TA.dtype)
    expect_type(weights_TA.dtype in FLOATS, "routing weights", "a floating type", weights_TA.dtype)
    expect(ids_TA.dim() == 2, "expert ids", "[T, A]", list(ids_TA.shape))
    same = weights_TA.shape == ids_TA.shape
    expect(same, "routing weights", f"{list(ids_TA.shape)} as the expert ids", list(weights_TA.shape))
    expect(ids_TA.is_contiguous(), "expert ids", "a contiguous tensor", f"strides {ids_TA.stride()}")
    expect(weights_TA.is_contiguous(), "routing weights", "a contiguous tensor", f"strides {weights_TA.stride()}")
    expect(ids_TA.numel() < 2**31, "routed pairs", "fewer than 2^31", ids_TA.numel())
    # On a GPU looking would wait; there ids below zero are of no expert, as ids of E and more.
    if ids_TA.device.type == "cpu" and ids_TA.numel():
        expect(int(ids_TA.min()) >= 0, "expert ids", "0 or more", int(ids_TA.min()))


def check_matrix(name: str, tensor: Tensor, columns: int) -> None:
    expect(tensor.dim() == 2 and tensor.shape[1] == columns, name, f"[rows, {columns}]", list(tensor.shape))
    expect(tensor.stride(1) == 1 or columns == 1, name, "columns that lie together", f"strides {tensor.stride()}")


def check_pool(name: str, pool: Pool, E: int, shape: tuple[int, ...]) -> None:
    data, slots = pool.data, pool.slot_of_E
    expect(data.shape[1:] == shape, name, f"[S, {', '.join(map(str, shape))}]", list(data.shape))
    expect(1 in data.stride()[1:] or 1 in shape, name, "an inner dimension that lies together", data.stride())
    expect_type(slots.dtype in (torch.int32, torch.int64), f"slots of {name}", "int32 or int64", slots.dtype)
    expect(slots.shape == (E,) and slots.is_contiguous(), f"slots of {name}", f"contiguous [{E}]", list(slots.shape))


def check_projection(out: Tensor, x: Tensor, projection: Projection, wave_E: Tensor | None) -> None:
    weight, E = projection.weight, projection.experts
    expect(weight.data.dim() == 3, "weight", "[S, N, K]", list(weight.data.shape))
    rows, K = weight.data.shape[1:]
    check_pool("weight", weight, E, (rows, K))
    even = not projection.gate.gated or rows % 2 == 0
    expect(even, "rows of the weight", "an even number, of gate and up", rows)
    expect_type(x.dtype in FLOATS, "input", "float32, float16 or bfloat16", x.dtype)
    same = weight.data.dtype == x.dtype or projection.scale is not None
    expect_type(same, "weight", f"{x.dtype} as the input, or a scale beside it", weight.data.dtype)
    check_matrix("input", x, K)
    check_matrix("output", out, projection.N)
    if projection.bias is not None:
        check_pool("bias", projection.bias, E, (rows,))
        expect_type(projection.bias.data.dtype in FLOATS, "bias", "a floating type", projection.bias.data.dtype)
    if projection.scale is not None:
        check_pool("scale", projection.scale, E, (rows,))
        dtype = projection.scale.data.dtype
        expect_type(dtype == torch.float32, "scale", "float32", dtype)
    if wave_E is not None:
        expect(wave_E.shape == (E,) and wave_E.is_contiguous(), "wave", f"contiguous [{E}]", list(wave_E.shape))
        expect_type(wave_E.dtype == torch.int32, "wave", "int32", wave_E.dtype)
    pools = [pool for pool in (projection.bias, projection.scale) if pool is not None]
    more = {f"pool {i}": tensor for i, pool in enumerate(pools) for tensor in pool.tensors}
    check_device(input=x, output=out, weight=weight.data, slots=weight.slot_of_E, wave=wave_E, **more)


def check_rows(
    out: Tensor, x: Tensor, ids_TA: Tensor, weights_TA: Tensor, projection: Projection, wave_E: Tensor | None
) -> None:
    check_routing(ids_TA, weights_TA)
    check_projection(out, x, projection, wave_E)
    check_device(input=x, **{"expert ids": ids_TA, "routing weights": weights_TA})
    T, R = ids_TA.shape[0], ids_TA.numel()
    expect(x.shape[0] in (T, R), "input", f"{T} rows (tokens) or {R} (pairs)", x.shape[0])
    expect(out.shape[0] == R, "output", f"{R} rows", out.shape[0])


def check_grouped(
    out: Tensor,
    x: Tensor,
    schedule: Schedule,
    weights_TA: Tensor,
    projection: Projection,
    wave_E: Tensor | None,
    *,
    gather: bool,
    rows: int,
) -> None:
    check_projection(out, x, projection, wave_E)
    check_device(input=x, schedule=schedule.packed, **{"routing weights": weights_TA})
    expect_type(weights_TA.dtype in FLOATS, "routing weights", "a floating type", weights_TA.dtype)
    expect(weights_TA.is_contiguous(), "routing weights", "a contiguous tensor", f"strides {weights_TA.stride()}")
    R = schedule.R
    # Rows of a block beyond those of the tile would be dropped in silence.
    expect(schedule.block <= rows, "schedule", f"blocks of at most {rows} rows, as the tile has", schedule.block)
    size = 2 * R + 3 * schedule.B + 1
    expect(schedule.packed.shape == (size,), "schedule", f"[{size}]", list(schedule.packed.shape))
    expect(weights_TA.numel() == R, "routing weights", f"{R} as the schedule", list(weights_TA.shape))
    taken = weights_TA.shape[0] if gather else R
    expect(x.shape[0] == taken, "input", f"{taken} rows", x.shape[0])
    expect(out.shape[0] == R, "output", f"{R} rows", out.shape[0])
