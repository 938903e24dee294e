"""Safetensors files as ranges of bytes: headers, and whether a file is still the one that was indexed."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
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
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


BLOCK = 64 * 2**10
"""Bytes of a small file that are compared at a time; a difference is named by the block it is in."""

SAMPLE, SAMPLE_EVERY = 4096, 4 * 2**20
"""Length of the blocks of a large file that are looked at, and the distance from one to the next."""

READ_WHOLE = 64 * 2**20
"""Files up to this many bytes are compared whole."""


class Unchanged:
    """Checks that files are the ones that were indexed.

    The common case is one `stat`. Where that differs, a small file's contents are compared with those seen at the
    start. A large file's are too many to have been seen all: it passes only where nothing but its path can have
    moved, that is where device, inode, size and modification time are what they were. Samples of its contents may
    refuse it too, and never let it pass.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._stamps = {file: _stamp(file) for file in files}
        self._digests = {file: _digests(file) for file in self._stamps}

    @property
    def files(self) -> Mapping[Path, object]:
        return self._stamps

    def stamp(self, file: Path) -> object:
        """Return what tells the file that was checked last from one written since, even with equal contents."""
        return self._stamps[file]

    def identity(self, file: Path) -> tuple[int, int]:
        """Return device and inode of the file that was checked last: handles to any other are stale."""
        stamp = self._stamps[file]
        return stamp.device, stamp.inode

    def check(self, file: Path, offset: int | None = None) -> bool:
        """Return False where the file was moved or exchanged for an equal one since it was checked last.

        offset: of the read that this is for, if there is one; named where nothing tells which bytes differ.
        Raises PromoeError where it is missing, has other contents, or may have.
        """
        try:
            stamp = _stamp(file)
        except FileNotFoundError:
            raise PromoeError(f"{file} has gone while the model was using it; put it back and call again") from None
        if stamp == self._stamps[file]:
            return True
        self._compare(file, stamp, "" if offset is None else f", noticed at a read at offset {offset}")
        logger.warning("%s was moved or written anew; going on, since its contents are the same", file)
        self._stamps[file] = stamp
        return False

    def _compare(self, file: Path, stamp: _Stamp, noticed: str) -> None:
        """Raise PromoeError unless a file whose stamp is another now surely has the contents it had."""
        known = self._stamps[file]
        changed = f"{file} has changed while the model was using it"
        remedy = "put the original file back and call again"
        if known.size > READ_WHOLE:
            remedy = "put the original back (cp -p over it keeps its time) and call again, or load the model again"
        if stamp.size != known.size:
            ends = "ends" if stamp.size < known.size else "should have ended"
            raise PromoeError(
                f"{changed}: {stamp.size} bytes instead of {known.size}, it {ends} at offset "
                f"{min(stamp.size, known.size)}; {remedy}"
            )
        pairs = zip_longest(_digests(file), self._digests[file])
        differing = next((index for index, (now, before) in enumerate(pairs) if now != before), None)
        if differing is not None:
            length, every = _blocks(known.size)
            raise PromoeError(
                f"{changed}: same size, other contents in the {length} bytes from offset {differing * every} on; "
                f"{remedy}"
            )
        if known.size <= READ_WHOLE or stamp._replace(ctime_ns=known.ctime_ns) == known:
            return
        what = "inode, it is another file" if stamp[:2] != known[:2] else "modification time"
        if stamp[:2] != known[:2]:
            remedy = "move the original file back and call again, or load the model again"
        raise PromoeError(
            f"{changed}: same size, but another {what}{noticed}, and it is too large to compare all of its contents; "
            f"{remedy}"
        )


def _stamp(file: Path) -> _Stamp:
    status = os.stat(file)
    return _Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _blocks(size: int) -> tuple[int, int]:
    """Return the length of the blocks that are compared in a file of `size` bytes, and their distance."""
    return (BLOCK, BLOCK) if size <= READ_WHOLE else (SAMPLE, SAMPLE_EVERY)


def _digests(file: Path) -> list[bytes]:
    """Return a digest for each block of the file that is compared."""
    size = file.stat().st_size
    length, every = _blocks(size)
    with file.open("rb", buffering=0) as handle:
        return [
            hashlib.blake2b(os.pread(handle.fileno(), length, offset), digest_size=32).digest()
            for offset in range(0, size, every)
        ]
