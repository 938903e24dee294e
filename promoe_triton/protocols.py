"""The seams of the package: what a store, a link, a backend, a policy and a predictor promise each other.

Letters: T tokens, A active experts per token, R = T*A routed rows, E experts of a layer, S slots, D model
dim, F ffn dim. Words: an *expert* is a set of weights, the *store* is where all experts rest, a *slot* is a
place for one expert in fast memory, a *lease* a promise not to evict, the *link* copies from store to slot,
a *chunk* is what one copy moves, a *wave* is a set of experts computed together.

Nothing here touches a device, a thread, a clock or a file.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor


class ExpertKey(NamedTuple):
    """One expert of the model: ``layer`` counts the patched expert modules in the model's own order."""

    layer: int
    expert: int


class Part(enum.Flag):
    """The halves of an expert in the order the layer needs them: up (and gate) projection, then down."""

    UP = enum.auto()
    DOWN = enum.auto()
    WHOLE = UP | DOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of one expert, as the layer computes with it."""

    name: str
    part: Part
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSpec:
    """What one expert of a layer consists of; layers with equal specs can share slots."""

    tensors: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of weights, without the padding a slot may add."""
        return sum(spec.nbytes for spec in self.tensors)

    def names(self, part: Part) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.tensors if spec.part & part)


ExpertTensors = Mapping[str, Tensor]
"""The tensors of one expert (or of one part of it) by name, shaped as its `ExpertSpec` says."""


class Store(Protocol):
    """Where every expert of a model rests. Read-only; layers, models and threads may share it."""

    @property
    def specs(self) -> Sequence[ExpertSpec]:
        """What an expert consists of, by layer."""
        ...

    def load(self, key: ExpertKey) -> ExpertTensors:
        """Return the expert's tensors in host memory: views where they rest there, fresh copies elsewhere.

        For unpatching, verifying and saving; serving goes through slots and a link.
        """
        ...

    def describe(self) -> str:
        """Say in one line where the experts rest."""
        ...

    def close(self) -> None:
        """Give back files and memory. Idempotent."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A range of a file and the place in a slot where its bytes land."""

    file: Path
    offset: int
    nbytes: int
    slot_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One expert, or one part of it, on its way into a slot.

    Identity is what counts: two transfers of the same expert are two transfers.
    """

    key: ExpertKey
    part: Part
    slot: int

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class Link(Protocol):
    """Copies experts from a store into slots. Submitting never blocks; every wait is bounded."""

    def submit(self, transfer: Transfer) -> None:
        """Queue a copy. The slot belongs to the transfer until it is waited for or cancelled."""
        ...

    def wait(self, transfer: Transfer) -> ExpertTensors:
        """Block until the bytes have landed and return the tensors, views of the slot's memory.

        Raises PromoeError, naming the source and the offset, when the copy failed or made no progress within
        the link's bound; nothing of the transfer is in flight after that.
        """
        ...

    def cancel(self, transfer: Transfer) -> None:
        """Start no further copy for it, and return once nothing of it is in flight. Never raises."""
        ...

    @property
    def bytes_moved(self) -> int:
        """Bytes copied since the link was made, with what alignment reads along."""
        ...

    def close(self) -> None:
        """Stop and join whatever the link runs. Idempotent."""
        ...


class Policy(Protocol):
    """Chooses which expert leaves when a slot is needed. Pure: told of events, asked for a victim."""

    def admitted(self, key: ExpertKey) -> None:
        """`key` has taken a slot."""
        ...

    def used(self, key: ExpertKey) -> None:
        """`key`, which is in a slot, was asked for by the layer."""
        ...

    def evicted(self, key: ExpertKey) -> None:
        """`key` has left its slot."""
        ...

    def victim(self, leased: Collection[ExpertKey]) -> ExpertKey | None:
        """Name the admitted expert to evict next, none of the leased ones; None where all are leased."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Experts of one layer in the order they are expected to be needed, most likely first."""

    layer: int
    experts: tuple[int, ...]


class Predictor(Protocol):
    """Says which experts later layers will ask for. Only proactive links ask it."""

    def predict(self, layer: int, router_input_TD: Tensor) -> Sequence[Prediction]:
        """Rank experts of later layers, given what `layer`'s router has just seen."""
        ...


class Call(Protocol):
    """One pass of some tokens through one layer, between `LayerKernels.begin` and `combine`."""

    @property
    def experts(self) -> Sequence[int]:
        """The distinct experts this call needs: no sentinel, none with weight zero only."""
        ...


C = TypeVar("C", bound=Call)


class LayerKernels(Protocol[C]):
    """The computation of one layer, in stages, over experts it has been told are readable.

    `up` and `down` take any subset of the call's experts in any order, each expert once; the split into
    subsets never changes a bit of the result.
    """

    def place(self, expert: int, tensors: ExpertTensors) -> None:
        """These tensors of `expert` (whole, or the names of one part) may be read from now on."""
        ...

    def remove(self, expert: int) -> None:
        """`expert` is no longer readable."""
        ...

    def begin(self, x_TD: Tensor, expert_ids_TA: Tensor, weights_TA: Tensor) -> C:
        """Group the rows by expert. Ids of E and more are sentinels: such pairs contribute nothing."""
        ...

    def up(self, call: C, experts: Sequence[int]) -> None:
        """First product (gate and up) of these experts' rows."""
        ...

    def activate(self, call: C) -> None:
        """Activation and gating of all rows, after the last `up`."""
        ...

    def down(self, call: C, experts: Sequence[int]) -> None:
        """Second product of these experts' rows."""
        ...

    def combine(self, call: C) -> Tensor:
        """Weight the rows, sum them per token and return [T, D] in the input's dtype."""
        ...


class Backend(Protocol):
    """A way of computing: makes the kernels of one layer."""

    @property
    def name(self) -> str: ...

    def layer(self, experts: torch.nn.Module, spec: ExpertSpec) -> LayerKernels[Call]:
        """Return the computation for this experts module, with no expert placed yet."""
        ...
