"""The learned predictor: what the later gates would choose today, corrected by what training found (paper, section on
the learned predictor).

The paper trains a network for each layer from nothing. The later layer's own gate is a better start, and holds on text
unlike that of the training, so what is learned is only a correction to its logits, through a few hidden units: where
nothing is to be learned it is zero, and the gate is what is left.

    logits = u W + b + relu(u C + c) O       u the standardised state [T, D], W and b the gates of the layers in reach
    logits = o + relu(u C + c) O             the paper's network, to compare with

Letters: D model dim, R hidden units, H layers in reach of a seam, G rows of a router.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from promoe_triton.errors import PromoeError
from promoe_triton.predictors.gates import Gate, Gates
from promoe_triton.protocols import Seam

FORMAT = "promoe predictor 3"

Source = tuple[int, Seam]
"""From where a prediction is made: a layer, and a seam of it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Head:
    """What was learned for one source, nearest layer first: relu(u in_DR + in_R) out_RHG, added to the gates' logits.

    out_HG: added instead of the gates' logits; None: those are what it is added to.
    """

    in_DR: Tensor
    in_R: Tensor
    out_RHG: Tensor
    out_HG: Tensor | None = None

    @property
    def reach(self) -> int:
        """Return H, of how many layers it speaks; those beyond are asked by their gates alone."""
        return int(self.out_RHG.shape[1])

    def fits(self, gates: Gates) -> bool:
        """Whether all parts have the number of dimensions and the sizes they share with each other and the gates."""
        if [part.dim() for part in self.tensors().values()] != [2, 1, 3, 2][: len(self.tensors())]:
            return False
        sizes = {tuple(gate.weight_GD.shape) for gate in gates.layers if isinstance(gate, Gate)}
        (D, R), G = self.in_DR.shape, self.out_RHG.shape[2]
        goes_with = self.out_HG is None or self.out_HG.shape == self.out_RHG.shape[1:]
        return R == len(self.in_R) == len(self.out_RHG) and (G, D) in sizes and goes_with

    def tensors(self) -> dict[str, Tensor]:
        """Return what it consists of, by field."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def like(self, matrix: Tensor) -> Head:
        """Return this head where `matrix` is, in its dtype."""
        return Head(**{name: tensor.to(matrix) for name, tensor in self.tensors().items()})


Heads = Mapping[Source, Head]

_NAMES = {"in": "in_DR", "in_bias": "in_R", "out": "out_RHG", "out_bias": "out_HG"}
"""What the tensors of a head are called in a file."""


def fingerprint(gates: Gates) -> str:
    """Return what tells the gates of one model from those of another: the routers' weights, rounded to bf16."""
    each = "|".join("" if gate is None else gate.digest for gate in gates.layers)
    return hashlib.blake2b(each.encode(), digest_size=16).hexdigest()


def save_heads(path: Path, heads: Heads, gates: Gates, report: Mapping[str, object]) -> None:
    """Write a predictor for the model whose gates these are. report: how it was made, for people."""
    tensors: dict[str, Tensor] = {}
    for (layer, seam), head in heads.items():
        found = head.tensors()
        tensors |= {f"{layer}.{seam.name}.{n}": found[f].contiguous() for n, f in _NAMES.items() if f in found}
    about = {"format": FORMAT, "gates": fingerprint(gates), "report": json.dumps(report)}
    partial = path.with_name(f"{path.name}.part")
    save_file(tensors, partial, metadata=about)
    partial.replace(path)


def load_heads(path: Path, gates: Gates) -> dict[Source, Head]:
    """Read a predictor. Raises PromoeError where the file is none, or one of another model."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError) as error:
        raise PromoeError(f"{path} cannot be read as a predictor: {error}") from error
    if about.get("format") != FORMAT:
        raise PromoeError(f"{path} is no predictor of this version (promoe-triton train writes one)")
    if about.get("gates") != fingerprint(gates):
        raise PromoeError(f"{path} was trained for another model, whose routers have other weights or sizes")
    parts: dict[Source, dict[str, Tensor]] = {}
    try:
        for full, tensor in tensors.items():
            layer, seam, name = full.split(".")
            parts.setdefault((int(layer), Seam[seam]), {})[_NAMES[name]] = tensor
        heads = {source: Head(**found) for source, found in parts.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise PromoeError(f"{path} is damaged: a tensor is missing, or one has an unknown name ({error})") from error
    if not heads:
        raise PromoeError(f"{path} is damaged: it holds no tensors")
    for (layer, _), head in heads.items():
        if not (0 <= layer < len(gates.layers) and head.fits(gates)):
            raise PromoeError(f"{path} is damaged: its tensors for layer {layer} fit neither each other nor the model")
    return heads
