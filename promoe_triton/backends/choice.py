"""The ways of computing a layer, by name."""

from __future__ import annotations

from pathlib import Path

import torch

from promoe_triton.backends.torch import TorchBackend
from promoe_triton.protocols import Backend


def make_backend(name: str, device: torch.device, tiles: Path | None = None) -> Backend:
    """Return the backend of that name; "auto": Triton's kernels on a GPU, plain torch elsewhere.

    tiles: a table for the kernels to take in place of the shipped one. Raises PromoeError where the backend cannot
    compute on that device, or the table is none for it.
    """
    if name == "auto":
        name = "triton" if device.type == "cuda" else "torch"
    if name == "torch":
        return TorchBackend()
    # Not before it is asked for: Triton takes seconds to import, and does not exist everywhere.
    from promoe_triton.backends.triton import TritonBackend, check_runs_on, own_table

    check_runs_on(device)
    return TritonBackend() if tiles is None else TritonBackend(own_table(device, tiles))
