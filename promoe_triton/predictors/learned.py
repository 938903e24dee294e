"""The learned predictor: what the later gates would choose today, corrected by what training found (paper, section on
the learned predictor).

The paper trains a network for each layer from nothing. The later layer's own gate is a better start, and holds on text
unlike that of the training, so what is learned is only a correction to its logits, of low rank: where nothing is to be
learned it is zero, and the gate is what is left.

    logits = u W + b + (u C) O         u the standardised state [T, D], W and b the gates of the layers in reach

Letters: D model dim, R rank of the correction, H layers in reach of a seam, G rows of a router.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from promoe_triton.errors import PromoeError
from promoe_triton.predictors.gates import Gate, Gates
from promoe_triton.protocols import Seam

FORMAT = "promoe predictor 1"

Source = tuple[int, Seam]
"""From where a prediction is made: a layer, and a seam of it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Correction:
    """What is added to the logits of the layers in reach of one source: (u code_DR) out_RHG, nearest layer first."""

    code_DR: Tensor
    out_RHG: Tensor

    @property
    def reach(self) -> int:
        """Return H, how many layers it corrects; those beyond keep what their gates say."""
        return int(self.out_RHG.shape[1])

    def like(self, matrix: Tensor) -> Correction:
        """Return this correction where `matrix` is, in its dtype."""
        return Correction(code_DR=self.code_DR.to(matrix), out_RHG=self.out_RHG.to(matrix))


Corrections = Mapping[Source, Correction]


def fingerprint(gates: Gates) -> str:
    """Return what tells the gates of one model from those of another: the routers' weights, rounded to bf16."""
    digest = hashlib.blake2b(digest_size=16)
    for gate in gates.layers:
        if isinstance(gate, Gate):
            rounded = gate.weight_GD.detach().to("cpu", torch.bfloat16).contiguous()
            digest.update(rounded.view(torch.uint8).numpy().tobytes())
        digest.update(b"|")
    return digest.hexdigest()


def save_corrections(path: Path, corrections: Corrections, gates: Gates, report: Mapping[str, object]) -> None:
    """Write a predictor for the model whose gates these are. report: how it was made, for people."""
    tensors = {}
    for (layer, seam), correction in corrections.items():
        tensors[f"{layer}.{seam.name}.code"] = correction.code_DR.contiguous()
        tensors[f"{layer}.{seam.name}.out"] = correction.out_RHG.contiguous()
    about = {"format": FORMAT, "gates": fingerprint(gates), "report": json.dumps(report)}
    partial = path.with_name(f"{path.name}.part")
    save_file(tensors, partial, metadata=about)
    partial.replace(path)


def load_corrections(path: Path, gates: Gates) -> dict[Source, Correction]:
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
        raise PromoeError(f"{path} was trained for another model: its routers have other weights")
    corrections = {}
    for name in tensors:
        layer, seam, kind = name.split(".")
        if kind == "code":
            source = int(layer), Seam[seam]
            corrections[source] = Correction(code_DR=tensors[name], out_RHG=tensors[f"{layer}.{seam}.out"])
    return corrections
