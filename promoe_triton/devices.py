"""The device that a patched model runs on, and how the rest of the model gets there and back."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from promoe_triton.errors import PromoeError


def resolve_device(name: str) -> torch.device:
    """Return the device of that name; "auto": the GPU, if there is one. Raises PromoeError where it does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise PromoeError(f"device={name!r}, but torch sees no GPU here; use device='cpu', or a torch built for it")
    number = torch.cuda.current_device() if device.index is None else device.index
    if number >= torch.cuda.device_count():
        raise PromoeError(f"device={name!r}, but torch sees {torch.cuda.device_count()} GPUs, numbered from 0")
    return torch.device("cuda", number)


def dense_bytes(model: nn.Module, experts: Iterable[Tensor]) -> int:
    """Return the bytes of all parameters and buffers beside the experts'."""
    return sum(tensor.nbytes for tensor in _dense(model, experts))


def move_dense(model: nn.Module, device: torch.device, experts: Iterable[Tensor] = ()) -> None:
    """Move parameters and buffers to a device, one after the other; the objects stay. Experts and meta tensors stay."""
    for tensor in _dense(model, experts):
        tensor.data = tensor.data.to(device)


def _dense(model: nn.Module, experts: Iterable[Tensor]) -> list[Tensor]:
    left = {id(tensor) for tensor in experts}
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return [t for key, t in tensors.items() if key not in left and t.device.type != "meta"]
