"""Make the experts of a checkpoint larger without changing what the model computes.

An expert computes ``down @ (silu(gate @ x) * (up @ x))``. Rows added to gate and up, with columns of zeros added
to down, add F terms that are exactly 0. So a small trained model becomes one with experts of any size, with its
own text and its own routing.

Letters: D hidden size, F intermediate size of one expert.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promoe_triton.config import format_size
from promoe_triton.errors import PromoeError
from promoe_triton.stores.resolve import INDEX, resolve_files
from promoe_triton.stores.safetensors_files import DTYPES, TensorRef, read_headers

SHARD_BYTES = 10**9
"""Size at which a new file begins."""
MULTIPLE = 64
"""F is rounded up to a multiple of this."""

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_BESIDE = ("*.json", "*.txt", "*.jinja", "*.model")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What inflating a checkpoint will write. experts: over all layers; expert_bytes: of one expert."""

    width: int
    experts: int
    expert_bytes: int
    total_bytes: int
    config: dict[str, Any]
    tensors: dict[str, TensorRef]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape a tensor of the source will have."""
        shape = self.tensors[name].shape
        match = _EXPERT.fullmatch(name)
        if match is None:
            return shape
        return (shape[0], self.width) if match[3] == "down" else (self.width, shape[1])

    def nbytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * self.tensors[name].dtype.itemsize


def plan_inflation(source: Path | str, expert_bytes: int) -> Plan:
    """Say what `inflate` would write, from the checkpoint's headers alone.

    Raises PromoeError for a checkpoint that is no Qwen3-MoE with experts one by one, ValueError where its
    experts are larger than `expert_bytes` already.
    """
    folder = Path(source)
    tensors = read_headers(resolve_files(str(folder)))
    config = json.loads((folder / "config.json").read_text())
    experts = [name for name in tensors if (m := _EXPERT.fullmatch(name)) and m[3] == "gate"]
    if config.get("model_type") != "qwen3_moe" or not experts:
        raise PromoeError(f"{folder} cannot be inflated: expected a qwen3_moe checkpoint with its experts one by one")
    first = tensors[experts[0]]
    width, hidden = first.shape
    row = 3 * hidden * first.dtype.itemsize
    if expert_bytes < width * row:
        raise ValueError(
            f"experts of {format_size(expert_bytes)} were asked for, but those of {folder} have "
            f"{format_size(width * row)} already; ask for more"
        )
    wider = max(-(-expert_bytes // (row * MULTIPLE)) * MULTIPLE, width)
    plan = Plan(
        width=wider,
        experts=len(experts),
        expert_bytes=wider * row,
        total_bytes=sum(ref.nbytes for ref in tensors.values()) + (wider - width) * row * len(experts),
        config={**config, "moe_intermediate_size": wider},
        tensors=tensors,
    )
    assert plan.total_bytes == sum(plan.nbytes(name) for name in tensors)
    return plan


def expert_bytes_for(source: Path | str, total_bytes: int) -> int:
    """Return the size of one expert at which all experts of `source` together take `total_bytes`."""
    # However large an expert is asked for, their number stays the same.
    return -(-total_bytes // plan_inflation(source, total_bytes).experts)


def inflate(
    source: Path | str,
    target: Path | str,
    *,
    expert_bytes: int,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> Plan:
    """Write the checkpoint `source` to the folder `target` with experts of at least `expert_bytes` each.

    Written file by file with one tensor in memory at a time, named as transformers' save_pretrained names them.
    seed: of the random rows. on_progress: called with the bytes written since the last call.
    Raises PromoeError, before anything is written, where the disk is too full; else as `plan_inflation`.
    """
    plan = plan_inflation(source, expert_bytes)
    target = Path(target)
    check_disk(target, plan.total_bytes)
    target.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(plan))
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    generator = torch.Generator().manual_seed(seed)
    for file, names in zip(files, shards, strict=True):
        _write(target / file, names, plan, generator, on_progress)
    index = {
        "metadata": {"total_size": plan.total_bytes},
        "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
    }
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (target / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n")
    for pattern in _BESIDE:
        for file_beside in Path(source).glob(pattern):
            if file_beside.name not in ("config.json", INDEX):
                shutil.copyfile(file_beside, target / file_beside.name)
    return plan


def check_disk(folder: Path, nbytes: int) -> None:
    """Raise PromoeError unless `nbytes` fit on the disk where `folder` is or will be."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise PromoeError(
            f"the checkpoint needs {format_size(nbytes)} of disk, but {folder} has {format_size(free)} free; ask for "
            "smaller experts or another folder"
        )


def _shards(plan: Plan) -> Iterator[list[str]]:
    """Group the tensors in the order of their names, each layer's experts one after the other."""
    names: list[str] = []
    size = 0
    for name in sorted(plan.tensors, key=_natural):
        nbytes = plan.nbytes(name)
        if names and size + nbytes > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _write(
    file: Path, names: list[str], plan: Plan, generator: torch.Generator, on_progress: Callable[[int], None] | None
) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + plan.nbytes(name)
        dtype = _NAMES[plan.tensors[name].dtype]
        entries[name] = {"dtype": dtype, "shape": list(plan.shape(name)), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as handle:
        handle.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            tensor = _padded(name, plan, generator).contiguous().view(-1).view(torch.uint8)
            handle.write(tensor.numpy().data)
            if on_progress:
                on_progress(tensor.nbytes)


def _padded(name: str, plan: Plan, generator: torch.Generator) -> Tensor:
    """Return a tensor of the source with its padding: random rows as large as its own, or columns of zeros."""
    ref, shape = plan.tensors[name], plan.shape(name)
    with ref.file.open("rb") as handle:
        handle.seek(ref.offset)
        tensor = torch.frombuffer(bytearray(handle.read(ref.nbytes)), dtype=ref.dtype).view(ref.shape)
    if shape == tuple(tensor.shape):
        return tensor
    rows, columns = tensor.shape
    if shape[0] == rows:
        padded = tensor.new_zeros(shape)
    else:
        spread = float(tensor.float().std()) if tensor.numel() > 1 else 1.0
        padded = tensor.new_empty(shape).normal_(0.0, spread, generator=generator)
    padded[:rows, :columns] = tensor
    return padded
