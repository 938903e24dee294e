"""Launching a kernel: by Triton the first time, and then straight to what it compiled.

Each time Triton looks anew at every argument, to find what it has compiled for such ones. That takes the host longer
than decoding one token takes the kernel; here one dictionary is looked at instead.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

ALIGNED = 16
"""Bytes. Triton compiles anew where an address is a multiple of it that was none, or the other way round."""

MOST = 4096
"""Entries, after which all are forgotten: numbers among the arguments (rows of a prompt, say) may take many values."""

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
"""What was compiled, and its compile-time arguments in their order, by all that it may depend on, and by device."""


def launch(kernel: Any, grid: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Launch `kernel[(grid,)](*args, **options)`, on the device of the first argument, which is a tensor.

    args: the run-time arguments, tensors and numbers, in their order. options: compile-time arguments and what the
    compiler is told, always in one order at one place of the code.
    """
    if not isinstance(kernel, triton.JITFunction) or torch.version.hip:
        # In the interpreter; and for AMD more than addresses decides, as the size of what they are in.
        kernel[(grid,)](*args, **options)
        return
    device = args[0].get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, args, options)
        return
    # Numbers with their type: 7 and 7.0 are equal, and compiled otherwise.
    about = [(a.dtype, a.data_ptr() % ALIGNED == 0) if isinstance(a, Tensor) else (a, a.__class__) for a in args]
    key = (id(kernel), device, *about, *options.values())
    found = _compiled.get(key)
    if found is not None:
        compiled, constants = found
        compiled[(grid, 1, 1)](*args, *constants)
        return
    compiled = kernel[(grid,)](*args, **options)
    if len(_compiled) >= MOST:
        _compiled.clear()
    _compiled[key] = compiled, tuple(options[name] for name in kernel.arg_names[len(args) :])
