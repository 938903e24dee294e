"""Safetensors files as ranges of bytes: headers, and whether a file is still the one that was indexed."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from promoe_triton.errors import PromoeError

logger = logging.getLogger(__name__)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRef:
    """One tensor in a file; `offset` is where its bytes begin, from the start of the file."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: Path) -> dict[str, TensorRef]:
    """Return the tensors of one safetensors file by name.

    Raises PromoeError, naming the file and the offset, where it is not one or ends too early.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise PromoeError(f"{file} is not a safetensors file, or is truncated: its header ends after {size}")
        try:
            entries = json.loads(handle.read(length))
        except ValueError as error:
            raise PromoeError(f"{file} is not a safetensors file: no JSON header at offset 8") from error
    refs = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise PromoeError(f"{file}: tensor {name} has dtype {entry['dtype']}, which is not supported")
        begin, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise PromoeError(
                f"{file} is truncated: tensor {name} lies at offsets {8 + length + begin} to {8 + length + end}, "
                f"but the file has {size} bytes; download or copy it again"
            )
        refs[name] = TensorRef(
            file=file,
            offset=8 + length + begin,
            shape=tuple(entry["shape"]),
            dtype=DTYPES[entry["dtype"]],
        )
    return refs


def read_headers(files: Iterable[Path]) -> dict[str, TensorRef]:
    """Return the tensors of a whole checkpoint by name."""
    refs: dict[str, TensorRef] = {}
    for file in files:
        if not file.exists():
            raise PromoeError(f"{file} is missing from the checkpoint; download or copy it again")
        refs |= read_header(file)
    return refs


@dataclass(frozen=True, slots=True)
class _Stamp:
    size: int
    mtime_ns: int
    inode: int


class Unchanged:
    """Checks that files are the ones that were indexed.

    The common case is one `stat`. Where that differs (a file was replaced, or moved away and back) the header
    and 64 blocks spread over the file are compared with those seen at the start.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._stamps = {file: _stamp(file) for file in files}
        self._digests = {file: _digest(file) for file in self._stamps}

    @property
    def files(self) -> Mapping[Path, object]:
        return self._stamps

    def check(self, file: Path) -> bool:
        """Return False where the file was exchanged for an equal one: open handles to it are stale.

        Raises PromoeError where it is missing or has other contents.
        """
        try:
            stamp = _stamp(file)
        except FileNotFoundError:
            raise PromoeError(f"{file} has gone while the model was using it; put it back and call again") from None
        known = self._stamps[file]
        if stamp == known:
            return True
        if stamp.size != known.size:
            raise PromoeError(
                f"{file} has changed while the model was using it: {stamp.size} bytes instead of {known.size}, "
                f"so its contents end or differ from offset {min(stamp.size, known.size)} on; "
                "put the original file back and call again"
            )
        if _digest(file) != self._digests[file]:
            raise PromoeError(
                f"{file} has changed while the model was using it (same size, other contents from offset 0 on); "
                "put the original file back and call again"
            )
        logger.warning("%s was written anew with the same contents; going on", file)
        self._stamps[file] = stamp
        return False


def _stamp(file: Path) -> _Stamp:
    status = os.stat(file)
    return _Stamp(status.st_size, status.st_mtime_ns, status.st_ino)


def _digest(file: Path, samples: int = 64, block: int = 4096) -> bytes:
    digest = hashlib.blake2b()
    size = file.stat().st_size
    with file.open("rb", buffering=0) as handle:
        length = int.from_bytes(handle.read(8), "little")
        digest.update(handle.read(min(length, size)))
        for i in range(samples):
            handle.seek(max(size - block, 0) * i // max(samples - 1, 1))
            digest.update(handle.read(block))
    return digest.digest()
