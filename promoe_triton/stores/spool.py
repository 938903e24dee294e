"""A temporary copy of loaded experts on disk, in the form of a stacked safetensors checkpoint."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from promoe_triton.config import format_size
from promoe_triton.errors import PromoeError
from promoe_triton.layout import ExpertLayout
from promoe_triton.protocols import PAGE, round_up
from promoe_triton.stores.checkpoint import CheckpointStore
from promoe_triton.stores.conversion import ParameterSource
from promoe_triton.stores.safetensors_files import DTYPES, read_header

logger = logging.getLogger(__name__)

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def spool(modules: Sequence[nn.Module], layouts: Sequence[ExpertLayout], folder: Path | str | None) -> CheckpointStore:
    """Write the experts of loaded modules to a temporary folder, one file for each layer.

    The folder's name and size are logged; it is removed with the last reference to the store, or at exit.
    Raises PromoeError where the disk is too full, with the size needed, and where the folder cannot be written to.
    """
    parameters = [
        {name: module.get_parameter(name).detach() for name in layout.names}
        for module, layout in zip(modules, layouts, strict=True)
    ]
    needed = sum(round_up(t.nbytes) for layer in parameters for t in layer.values())
    parent = Path(folder) if folder else Path(tempfile.gettempdir())
    if not parent.is_dir():
        raise PromoeError(
            f"spool_dir must be a folder that exists, {parent} is {'a file' if parent.exists() else 'not there'}"
        )
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise PromoeError(
            f"the spool needs {format_size(needed)}, but {parent} has {format_size(free)} free; name another "
            "folder with spool_dir="
        )
    try:
        place = Path(tempfile.mkdtemp(prefix="promoe-spool-", dir=parent))
    except OSError as error:
        raise PromoeError(f"cannot write to spool_dir {parent}: {error.strerror}; name another folder") from error
    try:
        progress = transformers_logging.tqdm(list(enumerate(parameters)), desc="Spooling experts", leave=False)
        files = [place / f"layer-{index:03d}.safetensors" for index in range(len(parameters))]
        for index, tensors in progress:
            _write(files[index], tensors)
        sources = [
            _sources(file, tensors, layout) for file, tensors, layout in zip(files, parameters, layouts, strict=True)
        ]
        specs = [layout.spec(module) for module, layout in zip(modules, layouts, strict=True)]
        store = CheckpointStore(specs, sources, f"spool {place} ({format_size(needed)})")
    except BaseException as error:
        shutil.rmtree(place, ignore_errors=True)
        if isinstance(error, OSError):
            raise PromoeError(
                f"cannot write the spool of {format_size(needed)} to {parent}: {error.strerror}"
            ) from error
        raise
    weakref.finalize(store, _remove, place, os.getpid())
    logger.warning("the experts now rest in %s (%s); it is removed at exit", place, format_size(needed))
    return store


def _remove(place: Path, owner: int) -> None:
    """Remove a spool, unless this process is a fork of its owner: the owner's weights are nowhere else."""
    if os.getpid() == owner:
        shutil.rmtree(place, ignore_errors=True)


def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whose data begin at a page, so that direct reads need no copies."""
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header = header.ljust(round_up(len(header) + 8, PAGE) - 8)
    with file.open("wb") as handle:
        handle.write(len(header).to_bytes(8, "little"))
        handle.write(header)
        for tensor in tensors.values():
            handle.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _sources(file: Path, tensors: Mapping[str, Tensor], layout: ExpertLayout) -> dict[str, ParameterSource]:
    refs = read_header(file)
    return {
        name: ParameterSource(
            parameter=name,
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            experts=layout.stacked(tensor),
            refs={name: [refs[name]]},
        )
        for name, tensor in tensors.items()
    }
