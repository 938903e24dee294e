"""The seams of the package: what a store, a link, a backend, a policy and a predictor promise each other.

Letters: T tokens, A active experts per token, R = T*A routed rows, E experts of a layer, S slots, D model
dim, F ffn dim. Words: an *expert* is a set of weights, the *store* is where all experts rest, a *slot* is a
place for one expert in fast memory, a *lease* a promise not to evict, the *link* copies from store to slot,
a *chunk* is what one copy moves, a *wave* is a set of experts computed together.

Nothing here touches a device, a thread, a clock or a file.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from promoe_triton.layout import ExpertLayout
    from promoe_triton.timeline import Timeline


PAGE = 4096
"""Alignment of slots, of chunks and of direct reads, in bytes."""


def round_up(nbytes: int, multiple: int = PAGE) -> int:
    return -(-nbytes // multiple) * multiple


R = TypeVar("R")


class ExpertKey(NamedTuple):
    """One expert of the model: ``layer`` counts the patched expert modules in the model's own order."""

    layer: int
    expert: int


expert_key = functools.cache(ExpertKey)
"""The key of an expert, made once: there are as many as the model has experts, and every layer wants some each time."""


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


@dataclass(slots=True, kw_only=True, eq=False)
class Transfer:
    """One copy of an expert, or of one part of it, into a slot, which it takes when its first chunk is handed out.

    Identity is what counts: two transfers of the same expert are two transfers. source: what whoever copies it noted
    of where it comes from when its copy began.
    """

    key: ExpertKey
    part: Part
    slot: int = -1
    source: object = None

    @property
    def name(self) -> str:
        return f"expert {self.key.expert} of MoE layer {self.key.layer}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuts:
    """How a transfer's bytes may be cut: running totals of its ranges; `whole`: not at all."""

    ends: Sequence[int]
    whole: bool = False


class Chunk(NamedTuple):
    """What one copy moves: bytes `begin` to `end` of a transfer, counted through its extents.

    speculative: nobody waited for them when they were handed out.
    """

    transfer: Transfer
    begin: int
    end: int
    speculative: bool = False


class Feed(Protocol):
    """Where a link gets its work: it asks for the next chunk and tells what became of it.

    Overtaking is nothing but asking again: a transfer that is passed over keeps its cursor.
    """

    def next_chunk(self, budget: int, speculative_budget: int | None = None) -> Chunk | None:
        """Hand out at most `budget` bytes of the most urgent transfer; None where there is nothing to do.

        speculative_budget: at most so many where nobody waits for them yet (None: as many as of any other;
        0: nothing of that kind).
        """
        ...

    @property
    def backlog(self) -> int:
        """How many transfers have bytes that were not handed out yet."""
        ...

    def landed(self, chunk: Chunk) -> bool:
        """Note that the chunk's bytes are in the slot; True where the transfer is complete with it.

        A complete transfer counts as in flight until `finished`, so that the link can touch the slot once more.
        """
        ...

    def finished(self, transfer: Transfer) -> bool:
        """Note that the link is done with a complete transfer's slot; whether its expert can be read there."""
        ...

    def failed(self, chunk: Chunk, error: BaseException) -> None:
        """Note that the chunk could not be copied; no more of its transfer is handed out."""
        ...

    def ended(self, transfers: Iterable[Transfer]) -> list[Transfer]:
        """Return those of these transfers that have arrived, and their experts can be read, or have failed."""
        ...

    def error(self, transfer: Transfer) -> BaseException | None:
        """Return what a transfer failed with."""
        ...


class Link(Protocol):
    """Copies experts from a store into slots, as a feed says. Every wait is bounded.

    The feed is used under the link's lock only: from the link's own threads, and through `tell`.
    """

    @property
    def cuts(self) -> Callable[[Transfer], Cuts]:
        """How the bytes of a transfer may be cut into chunks. Does not keep the link alive."""
        ...

    def tell(self, event: Callable[[], R]) -> R:
        """Run what changes the feed, and look for new work."""
        ...

    def wait(self, transfers: Sequence[Transfer]) -> Sequence[Transfer]:
        """Return those of these transfers that have arrived, one at least. After `arrivals` work sees their bytes.

        Raises PromoeError, naming the source and the offset, when a copy failed or made no progress within the
        link's bound. A chunk may still be in flight after that: `drain` tells.
        """
        ...

    def arrived(self, transfers: Sequence[Transfer]) -> Sequence[Transfer]:
        """Return those of these transfers that have arrived already, as `wait` does."""
        ...

    def arrivals(self, keys: Iterable[ExpertKey]) -> Mapping[ExpertKey, ExpertTensors]:
        """Return the tensors, views of a slot, of those of these experts that have arrived since this was last asked.

        Work that the calling thread issues from now on sees their bytes.
        """
        ...

    def fence(self, layer: int, slots: Iterable[int] | None) -> None:
        """Note that work issued so far reads these slots of a layer (None: any slot of any layer).

        Nothing is written to them before that work is done, however soon they are given to another expert. Called
        before the leases are given back, by the thread that computes.
        """
        ...

    def now(self) -> float:
        """Return the time by the link's clock, in seconds since whenever."""
        ...

    def settle(self) -> None:
        """Return when the bytes of all that has arrived are there."""
        ...

    def drain(self, patience: float) -> bool:
        """Start no further chunk, until `restart`.

        True once nothing is in flight, and any slot may be reused; False where that takes more than `patience`
        seconds. Call it again then: until it is true slots must not be touched.
        """
        ...

    def restart(self, feed: Feed) -> None:
        """Go on with another feed, after a drain."""
        ...

    @property
    def bytes_moved(self) -> int:
        """Bytes copied since the link was made, with what alignment reads along."""
        ...

    @property
    def bandwidth(self) -> float:
        """Bytes per second while copies are in flight, as measured lately; 0.0 before there were any."""
        ...

    @property
    def busy_seconds(self) -> float:
        """Seconds in which any copy was in flight."""
        ...

    @property
    def waited_seconds(self) -> float:
        """Seconds in which a device waited for copies before it computed, while the host went on."""
        ...

    def record(self, timeline: Timeline | None) -> None:
        """Note every chunk in a timeline from now on; None: in none."""
        ...

    def close(self) -> None:
        """Stop and join whatever the link runs. Idempotent."""
        ...


class Policy(Protocol):
    """Chooses which expert leaves when a slot is needed. Pure: told of events, asked for a victim."""

    def admitted(self, key: ExpertKey, cold: bool = False) -> None:
        """`key` has taken a slot; its bytes are on their way. cold: until it is used, it is the next to leave."""
        ...

    def used(self, keys: Iterable[ExpertKey]) -> None:
        """The layer asked for these, one after the other, whether they are in slots or not."""
        ...

    def expected(self, keys: Iterable[ExpertKey]) -> None:
        """A predictor that is worth it named these, the likeliest last, whether they are in slots or not."""
        ...

    def evicted(self, key: ExpertKey) -> None:
        """`key` has left its slot."""
        ...

    def victim(self, kept: Container[ExpertKey]) -> ExpertKey | None:
        """Name the admitted expert to evict next, none of those kept; None where there is none."""
        ...


class Seam(enum.Enum):
    """Where in the model an observation was made."""

    ENTERED = enum.auto()
    """Before the attention of a decoder layer: the residual stream."""
    ROUTED = enum.auto()
    """When a layer has routed its tokens: what its router saw."""
    LEFT = enum.auto()
    """After the last decoder layer: the residual stream, when no later layer of this token is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What a predictor may look at, at one seam of `layer`, in the order in which the model runs.

    state_TD is the router's input at ROUTED, which in some families is not what the experts are given, and the
    residual stream at the other seams; None where that is several streams. expert_ids_TA is known at ROUTED only;
    ids of E and more stand for no expert. token_ids_T is None where the model was not called with tokens. At least
    one of the three is given.
    """

    layer: int
    seam: Seam = Seam.ROUTED
    state_TD: Tensor | None
    expert_ids_TA: Tensor | None = None
    token_ids_T: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Return T."""
        return len(self._given)

    @property
    def device(self) -> torch.device:
        """Return where the observation is, and predictions from it are to be."""
        return self._given.device

    @property
    def _given(self) -> Tensor:
        return next(t for t in (self.state_TD, self.expert_ids_TA, self.token_ids_T) if t is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Experts expected at `layer`, `steps` tokens from now (0: this one), most likely first, with scores.

    expert_ids and scores are int64 and floating point of shape [n], where the state was. Scores rank the experts
    of one prediction; they are comparable between layers only where one predictor says so. Ids that are none of the
    layer's experts are passed over; so are predictions of layers that the model does not have.
    """

    layer: int
    steps: int
    expert_ids: Tensor
    scores: Tensor


class Predictor(Protocol):
    """Says which experts later layers will ask for. Only proactive links ask it."""

    def predict(self, seen: Observation) -> Sequence[Prediction]:
        """Rank experts of later layers, or of the next token's first ones. Never waits for the host.

        Every observation is shown once, in order, but for those where it has been given up; predictors that learn
        learn from it here. One that keeps nothing from one to the next may say so by an attribute `stateless`: in
        passes that are to have no predictions it is not asked.
        """
        ...


class Call(Protocol):
    """One pass of some tokens through one layer, between `LayerKernels.begin` and `combine`."""

    @property
    def asked(self) -> Tensor | None:
        """The experts this call needs, where only a device knows: [n], in any order, some maybe more than once.

        Ids that are none of the layer's are to be passed over. None where the host knows.
        """
        ...

    @property
    def experts(self) -> Collection[int]:
        """The distinct experts this call needs: no sentinel, none with weight zero only. May wait for a device."""
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

    def up(self, call: C, experts: Sequence[int] | None) -> None:
        """First product (gate and up) of these experts' rows; None: of every expert of the call."""
        ...

    def activate(self, call: C) -> None:
        """Activation and gating of all rows, after the last `up`."""
        ...

    def down(self, call: C, experts: Sequence[int] | None) -> None:
        """Second product of these experts' rows; None: of every expert of the call."""
        ...

    def combine(self, call: C) -> Tensor:
        """Weight the rows, sum them per token and return [T, D] in the input's dtype."""
        ...

    def graph_form(self) -> Callable[..., Tensor] | None:
        """Return what computes a layer whose parameters are its slots in compiled graphs; None: an opaque operation.

        Called with the experts module, hidden states, ids, weights, and int32 [E]: 0, 1, ... E - 1.
        """
        ...


class Backend(Protocol):
    """A way of computing: makes the kernels of one layer."""

    @property
    def name(self) -> str: ...

    def layer(self, experts: torch.nn.Module, layout: ExpertLayout, spec: ExpertSpec) -> LayerKernels[Any]:
        """Return the computation for this experts module, with no expert placed yet."""
        ...
