"""How an expert's bytes get from files into a slot: which ranges land where, and what is moved afterwards.

Buffered reads can start anywhere, so every tensor is read to its own aligned place. Direct reads must be
aligned in the file and in memory, and tensors in a checkpoint begin at any phase; so a tensor's place in the
slot has the phase (offset modulo the page) it has in the file, and the pages it shares with its neighbours are
read along. What cannot lie so, because its pieces are apart in the file, lands in scratch space first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from promoe_triton.memory import ALIGN
from promoe_triton.protocols import PAGE, ExpertSpec, Part, TensorSpec, round_up


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A contiguous range of a file that holds (part of) one tensor; of no file where it is elsewhere."""

    file: Path = Path()
    offset: int = 0
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A range of a file and the place in a slot where its bytes land.

    The first `needed` of `nbytes` must arrive; the file may end inside the page that holds the last of them.
    """

    file: Path
    offset: int
    nbytes: int
    needed: int
    slot_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Bytes to move within a slot once everything has landed."""

    source: int
    target: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorImage:
    """One tensor in a slot: what is read for it, what is moved, and where it then begins."""

    spec: TensorSpec
    extents: tuple[Extent, ...]
    moves: tuple[Move, ...]
    start: int
    end: int

    def view(self, slot: Tensor) -> Tensor:
        """Return the tensor as a view of the slot's bytes (uint8 [slot_bytes])."""
        return view_bytes(slot, self.start, self.spec.shape, self.spec.dtype)


@dataclass(frozen=True, kw_only=True)
class SlotImage:
    """One expert, or a part of it, in a slot."""

    tensors: tuple[TensorImage, ...]

    @property
    def slot_bytes(self) -> int:
        return max(tensor.end for tensor in self.tensors)

    @cached_property
    def extents(self) -> tuple[Extent, ...]:
        return tuple(extent for tensor in self.tensors for extent in tensor.extents)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Running totals of the extents' bytes."""
        return tuple(accumulate(extent.nbytes for extent in self.extents))

    @cached_property
    def moves(self) -> tuple[Move, ...]:
        return tuple(move for tensor in self.tensors for move in tensor.moves)

    @cached_property
    def files(self) -> dict[Path, int]:
        """The files that are read, with the first offset in each."""
        return {extent.file: extent.offset for extent in reversed(self.extents)}

    @cached_property
    def places(self) -> tuple[tuple[TensorSpec, int], ...]:
        """Where each tensor begins: images with equal places have the same views of a slot."""
        return tuple((tensor.spec, tensor.start) for tensor in self.tensors)

    def of(self, part: Part) -> SlotImage:
        if part == Part.WHOLE:
            return self
        return SlotImage(tensors=tuple(tensor for tensor in self.tensors if tensor.spec.part & part))

    def views(self, slot: Tensor) -> dict[str, Tensor]:
        """Return the tensors by name, as views of the slot's bytes (uint8 [slot_bytes])."""
        return {tensor.spec.name: tensor.view(slot) for tensor in self.tensors}


def view_bytes(buffer: Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """View bytes of a uint8 buffer as a tensor; `start` must be a multiple of the dtype's size."""
    return buffer.narrow(0, start, math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def merge(pieces: Sequence[Piece]) -> list[Piece]:
    """Join pieces that follow each other in the same file."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if last and last.file == piece.file and last.offset + last.nbytes == piece.offset:
            merged[-1] = Piece(file=last.file, offset=last.offset, nbytes=last.nbytes + piece.nbytes)
        else:
            merged.append(piece)
    return merged


def slot_image(spec: ExpertSpec, pieces: Mapping[str, Sequence[Piece]], direct: bool) -> SlotImage:
    """Lay out one expert. `pieces` are the ranges of each tensor, if it has any, in the order of its bytes."""
    place = _place_direct if direct else _place_buffered
    tensors: list[TensorImage] = []
    start = 0
    for tensor in spec.tensors:
        if tensor.name not in pieces:
            continue
        image = place(tensor, merge(pieces[tensor.name]), start)
        tensors.append(image)
        start = image.end
    return SlotImage(tensors=tuple(tensors))


APART = 256
"""Bytes. Tensors that can begin anywhere begin at multiples of it: kernels address experts in steps of 64 elements."""


def _place_buffered(spec: TensorSpec, pieces: Sequence[Piece], start: int) -> TensorImage:
    start = round_up(start, APART)
    extents = []
    target = start
    for piece in pieces:
        nbytes = piece.nbytes
        extents.append(Extent(file=piece.file, offset=piece.offset, nbytes=nbytes, needed=nbytes, slot_offset=target))
        target += nbytes
    return TensorImage(spec=spec, extents=tuple(extents), moves=(), start=start, end=target)


def _place_direct(spec: TensorSpec, pieces: Sequence[Piece], start: int) -> TensorImage:
    start = round_up(start)
    extents, landed = [], []
    for piece in pieces:
        phase = piece.offset % PAGE
        extents.append(
            Extent(
                file=piece.file,
                offset=piece.offset - phase,
                nbytes=round_up(phase + piece.nbytes),
                needed=phase + piece.nbytes,
                slot_offset=start,
            )
        )
        landed.append(start + phase)
        start += extents[-1].nbytes
    if len(pieces) == 1 and landed[0] % operand_alignment(spec.dtype) == 0:
        return TensorImage(spec=spec, extents=tuple(extents), moves=(), start=landed[0], end=start)
    # Pieces are gathered leftwards to one aligned place at or below the first: moves in order never overwrite
    # what is still to be moved.
    target = first = landed[0] - landed[0] % ALIGN
    moves = []
    for piece, source in zip(pieces, landed, strict=True):
        moves.append(Move(source=source, target=target, nbytes=piece.nbytes))
        target += piece.nbytes
    return TensorImage(spec=spec, extents=tuple(extents), moves=tuple(moves), start=first, end=start)


def operand_alignment(dtype: torch.dtype) -> int:
    """Return the alignment in bytes below which a product may round differently.

    Single-precision matrix-vector products of the CPU's library take another path for operands that are not
    16-byte aligned, with other bits (seen on an AMD EPYC with torch 2.13; not for bf16 and fp16).
    """
    return 16 if dtype == torch.float32 else dtype.itemsize
