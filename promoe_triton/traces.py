"""Traces: what a model's MoE layers were given and which experts they chose, on some text (paper, learned predictor).

A folder with `trace.json` (what was recorded, of which model; which shards are complete) and shards of whole documents:

| tensor               | shape, dtype            | meaning                                                          |
|----------------------|-------------------------|------------------------------------------------------------------|
| token_ids, document  | [T] int32               | the tokens of all documents, and whose they are                  |
| text                 | [T] int32               | which of the texts a document was cut from                       |
| position             | [T] int32               | place in its document                                            |
| is_prefill           | [T] bool                | whether it belongs to the prompt                                 |
| ids.L, weights.L     | [T, A] int16, float32   | experts that layer L chose, E and more: none; routing weights    |
| state.L              | [T, D] the model's own  | what the router of layer L was given                             |
| entered.L            | [T, D] the model's own  | residual stream before the attention of layer L                  |
| left                 | [T, D] the model's own  | residual stream after the last layer                             |

The last three are there where states were asked for, and where the model has one residual stream.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from promoe_triton.errors import PromoeError

FORMAT = 2
HEADER = "trace.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedLayer:
    """One MoE layer: path of its experts module, E, A, and the size D of what its router is given."""

    path: str
    experts: int
    active: int
    hidden: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One complete file: so many documents, with so many tokens together."""

    file: str
    documents: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One document of a trace, read from its file as it is asked for. text: which it is of. T: its tokens."""

    number: int
    text: int
    tensors: Mapping[str, Any]
    begin: int
    end: int

    @property
    def tokens(self) -> int:
        """Return T."""
        return self.end - self.begin

    @property
    def token_ids_T(self) -> Tensor:
        return self._read("token_ids")

    @property
    def is_prefill_T(self) -> Tensor:
        return self._read("is_prefill")

    def expert_ids_TA(self, layer: int) -> Tensor:
        """Return the experts chosen, int64; E and more stand for none."""
        return self._read(f"ids.{layer}").long()

    def weights_TA(self, layer: int) -> Tensor:
        return self._read(f"weights.{layer}")

    def state_TD(self, layer: int) -> Tensor | None:
        """Return what the router was given; None where it was not recorded."""
        return self._maybe(f"state.{layer}")

    def entered_TD(self, layer: int) -> Tensor | None:
        """Return the residual stream before the layer's attention; None where it was not recorded."""
        return self._maybe(f"entered.{layer}")

    def left_TD(self) -> Tensor | None:
        """Return the residual stream after the last layer; None where it was not recorded."""
        return self._maybe("left")

    def _maybe(self, name: str) -> Tensor | None:
        return self._read(name) if name in self.tensors else None

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self.tensors[name][self.begin : self.end]
        return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A recorded trace. about: the model, its revision, dtype and gates, the texts with their hashes, versions."""

    folder: Path
    about: Mapping[str, Any]
    layers: tuple[TracedLayer, ...]
    shards: tuple[Shard, ...]

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    def check_model(self, gates: object) -> None:
        """Raise PromoeError where this is a trace of a model with other gates than those of this `fingerprint`."""
        if gates != self.about.get("gates"):
            raise PromoeError(
                f"the trace in {self.folder} is of another model: {self.about.get('model')}, whose routers have other "
                "weights"
            )

    def check_states(self) -> None:
        """Raise PromoeError where hidden states were not recorded, at which predictors look."""
        if next(self.read()).state_TD(0) is None:
            raise PromoeError(f"the trace in {self.folder} has no hidden states; record it with --states")

    def read(self) -> Iterator[Document]:
        """Yield all documents in order; no more is in memory than is asked of one. Raises PromoeError for bad files."""
        number = 0
        for shard in self.shards:
            path = self.folder / shard.file
            try:
                with safe_open(path, framework="pt") as file:
                    documents, texts = file.get_tensor("document"), file.get_tensor("text")
                    bounds = [0, *(documents.diff().nonzero()[:, 0] + 1).tolist(), len(documents)]
                    if (len(bounds) - 1, len(documents)) != (shard.documents, shard.tokens):
                        raise PromoeError(f"{path} does not hold the documents that {HEADER} says")
                    tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no mapping
                    for begin, end in pairwise(bounds):
                        yield Document(number=number, text=int(texts[begin]), tensors=tensors, begin=begin, end=end)
                        number += 1
            except (OSError, SafetensorError) as error:
                raise PromoeError(f"{path} cannot be read ({error}): record the trace again") from error


def read_trace(folder: Path | str) -> Trace:
    """Open a trace. Raises PromoeError where there is none, an empty one, or one of another format."""
    folder = Path(folder)
    trace = _header(folder)
    if trace is None:
        raise PromoeError(f"{folder} holds no trace (no {HEADER}): promoe-triton trace records one")
    if not trace.tokens:
        raise PromoeError(f"the trace in {folder} is empty: nothing was recorded to its end; record it again")
    for shard in trace.shards:
        if not (folder / shard.file).is_file():
            raise PromoeError(f"the trace in {folder} lacks {shard.file}; record it again")
    return trace


def _header(folder: Path) -> Trace | None:
    path = folder / HEADER
    if not path.exists():
        return None
    try:
        header = json.loads(path.read_text())
        if header["format"] != FORMAT:
            raise PromoeError(f"{path} has format {header['format']}, this version reads {FORMAT}; record it again")
        return Trace(
            folder=folder,
            about=header["about"],
            layers=tuple(TracedLayer(**layer) for layer in header["layers"]),
            shards=tuple(Shard(**shard) for shard in header["shards"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PromoeError(f"{path} is no header of a trace ({error}); record it again") from error


class TraceWriter:
    """Writes a trace, shard by shard; begun again with the same model and texts, it goes on after what is complete.

    shard_tokens: a shard is written once it has so many tokens, so that memory stays bounded.
    Raises PromoeError where the folder holds a trace of something else.
    """

    def __init__(
        self, folder: Path, about: Mapping[str, Any], layers: Sequence[TracedLayer], shard_tokens: int
    ) -> None:
        self._folder, self._about, self._layers = folder, json.loads(json.dumps(about)), tuple(layers)
        self._shard_tokens = shard_tokens
        self._pending: list[dict[str, Tensor]] = []
        known = _header(folder)
        if known is not None and (known.about, known.layers) != (self._about, self._layers):
            others = [name for name in about if known.about.get(name) != self._about[name]] or ["layers"]
            raise PromoeError(
                f"{folder} holds a trace of something else (other {', '.join(others)}); name another folder, or "
                "remove it"
            )
        self._shards = list(known.shards) if known is not None else []
        folder.mkdir(parents=True, exist_ok=True)
        self._write_header()

    @property
    def documents(self) -> int:
        """How many documents are complete on disk or wait to be written."""
        return sum(shard.documents for shard in self._shards) + len(self._pending)

    def add(self, tensors: Mapping[str, Tensor], text: int) -> None:
        """Add one document of a text: all tensors of the table above but `document` and `text`."""
        like = tensors["token_ids"]
        numbers = {"document": torch.full_like(like, self.documents), "text": torch.full_like(like, text)}
        self._pending.append({**tensors, **numbers})
        if sum(len(document["token_ids"]) for document in self._pending) >= self._shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as a shard."""
        if not self._pending:
            return
        tensors = {name: torch.cat([document[name] for document in self._pending]) for name in self._pending[0]}
        file = f"shard-{len(self._shards):05}.safetensors"
        partial = self._folder / f"{file}.part"
        save_file(tensors, partial)
        partial.replace(self._folder / file)
        self._shards.append(Shard(file=file, documents=len(self._pending), tokens=len(tensors["token_ids"])))
        self._pending.clear()
        self._write_header()

    def _write_header(self) -> None:
        header = {
            "format": FORMAT,
            "about": self._about,
            "layers": [asdict(layer) for layer in self._layers],
            "shards": [asdict(shard) for shard in self._shards],
        }
        partial = self._folder / f"{HEADER}.part"
        partial.write_text(json.dumps(header, indent=1) + "\n")
        partial.replace(self._folder / HEADER)
