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
from typing import Any, NamedTuple

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
    if not isinstance(entries, dict):
        raise PromoeError(f"{file} is not a safetensors file: its header is no table of tensors")
    entries.pop("__metadata__", None)
    return {name: _ref(file, name, entry, 8 + length, size) for name, entry in entries.items()}


def _ref(file: Path, name: str, entry: Any, start: int, size: int) -> TensorRef:
    """Read one tensor's entry of a header whose data begin at `start` of a file of `size` bytes."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        known = DTYPES.get(dtype)
        nbytes = math.prod(shape) * (known.itemsize if known else 0)
    except (TypeError, KeyError, ValueError) as error:
        raise PromoeError(f"{file} is not a safetensors file: its entry for tensor {name} is {entry!r}") from error
    if known is None:
        raise PromoeError(f"{file}: tensor {name} has dtype {dtype}, which is not supported")
    if begin < 0 or end - begin != nbytes:
        raise PromoeError(
            f"{file} is not a safetensors file: tensor {name} of {nbytes} bytes is said to lie at {begin} to {end}"
        )
    if start + end > size:
        raise PromoeError(
            f"{file} is truncated: tensor {name} lies at offsets {start + begin} to {start + end}, "
            f"but the file has {size} bytes; download or copy it again"
        )
    return TensorRef(file=file, offset=start + begin, shape=shape, dtype=known)


def read_headers(files: Iterable[Path]) -> dict[str, TensorRef]:
    """Return the tensors of a whole checkpoint by name."""
    refs: dict[str, TensorRef] = {}
    for file in files:
        if not file.exists():
            raise PromoeError(f"{file} is missing from the checkpoint; download or copy it again")
        refs |= read_header(file)
    return refs


class _Stamp(NamedTuple):
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


SAMPLE_EVERY = 4 * 2**20
"""Distance in bytes of the blocks that stand for a large file's contents; smaller than most experts."""

READ_WHOLE = 64 * 2**20
"""Files up to this many bytes are compared whole."""


class Unchanged:
    """Checks that files are the ones that were indexed.

    The common case is one `stat`. Where that differs (a file was replaced, or moved away and back) the contents
    are compared with those seen at the start: whole for small files, a block every few megabytes for large ones.
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
        logger.warning(
            "%s was moved or written anew; going on, since %s",
            file,
            "its contents are the same" if stamp.size <= READ_WHOLE else "blocks all over it are the same",
        )
        self._stamps[file] = stamp
        return False


def _stamp(file: Path) -> _Stamp:
    status = os.stat(file)
    return _Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _digest(file: Path, block: int = 4096) -> bytes:
    digest = hashlib.blake2b()
    size = file.stat().st_size
    with file.open("rb", buffering=0) as handle:
        if size <= READ_WHOLE:
            digest.update(handle.read())
        for offset in range(0, size if size > READ_WHOLE else 0, SAMPLE_EVERY):
            digest.update(os.pread(handle.fileno(), block, offset))
    return digest.digest()
