"""The ways of computing a layer, by name."""

from __future__ import annotations

import torch

from promoe_triton.backends.torch import TorchBackend
from promoe_triton.protocols import Backend


def make_backend(name: str, device: torch.device) -> Backend:
    """Return the backend of that name; "auto": Triton's kernels on a GPU, plain torch elsewhere.

    Raises PromoeError where it cannot compute on that device.
    """
    if name == "auto":
        name = "triton" if device.type == "cuda" else "torch"
    if name == "torch":
        return TorchBackend()
    # Not before it is asked for: Triton takes seconds to import, and does not exist everywhere.
    from promoe_triton.backends.triton import TritonBackend, check_runs_on

    check_runs_on(device)
    return TritonBackend()
