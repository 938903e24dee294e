"""What a model is made of, as far as time and bytes go: from its configuration, without weights.

Letters: T tokens, E experts of a layer, A active ones per token, L MoE layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from promoe_triton.budget import Budget, LayerNeed, plan_slots
from promoe_triton.config import Config
from promoe_triton.errors import PromoeError
from promoe_triton.loading import read_configuration, skeleton_of
from promoe_triton.patch._swap import find_experts
from promoe_triton.predictors.reach import find_layers
from promoe_triton.protocols import PAGE, Cuts, ExpertSpec, Part, TensorSpec, round_up

MODELS = Path(__file__).parent / "models"
"""Configurations of published models, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One MoE layer: E experts, A of them per token, and the weights of an expert's two halves."""

    experts: int
    active: int
    up_weights: int
    down_weights: int

    def weights(self, part: Part) -> int:
        return self.up_weights * (Part.UP in part) + self.down_weights * (Part.DOWN in part)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model: its MoE layers, and all else that a pass reads.

    dense_weights: of everything but routed experts, embedding and head; head_weights: of the head. decoder_layers: with
    and without experts. kv_weights: numbers that one token adds to the KV cache. attention_width: heads times their
    dimension. bits: of a routed expert's weight; dense_bits: of all others.
    """

    name: str
    layers: tuple[LayerShape, ...]
    decoder_layers: int
    dense_weights: int
    head_weights: int
    kv_weights: int
    attention_width: int
    bits: float
    dense_bits: float

    def expert_bytes(self, layer: int, part: Part = Part.WHOLE) -> int:
        return round(self.layers[layer].weights(part) * self.bits / 8)

    @property
    def all_expert_bytes(self) -> int:
        return sum(shape.experts * self.expert_bytes(i) for i, shape in enumerate(self.layers))

    def budget(self, config: Config, memory: int = 0) -> Budget:
        """Return how many slots there are. memory: bytes they may take where the configuration leaves that open."""
        needs = self.needs()
        every = sum(need.experts * need.slot_bytes for need in needs)
        return plan_slots(config.slots, config.partition, needs, memory if config.slots is None else every)

    def memory(self, config: Config, batch: int, tokens: int) -> int:
        """Return the fast memory that a run takes: slots, all other weights, and the cache of `batch` texts' tokens.

        What a pass needs beside those is left out: it depends on how it is written.
        """
        weights = self.dense_weights + 2 * self.head_weights + batch * tokens * self.kv_weights
        return self.budget(config).nbytes + round(weights * self.dense_bits / 8)

    @property
    def accesses(self) -> int:
        """Return expert accesses of one token."""
        return sum(shape.active for shape in self.layers)

    def specs(self) -> list[ExpertSpec]:
        """Return what an expert consists of, by layer, as bytes."""

        def tensor(layer: int, name: str, part: Part) -> TensorSpec:
            return TensorSpec(name=name, part=part, shape=(self.expert_bytes(layer, part),), dtype=torch.uint8)

        return [
            ExpertSpec(tensors=(tensor(i, "up", Part.UP), tensor(i, "down", Part.DOWN)))
            for i in range(len(self.layers))
        ]

    def needs(self) -> list[LayerNeed]:
        return [
            LayerNeed(experts=shape.experts, spec=spec, slot_bytes=round_up(spec.nbytes))
            for shape, spec in zip(self.layers, self.specs(), strict=True)
        ]

    def cuts(self, layer: int, part: Part) -> Cuts:
        """Cut where one of an expert's tensors follows another: gate, up and down projection."""
        up = self.expert_bytes(layer, Part.UP)
        gate = up // 2 // PAGE * PAGE
        ends = (gate, up) if gate else (up,)
        match part:
            case Part.UP:
                return Cuts(ends=ends)
            case Part.DOWN:
                return Cuts(ends=(self.expert_bytes(layer, Part.DOWN),))
        return Cuts(ends=(*ends, self.expert_bytes(layer)))


def model_shape(name: str, *, bits: float = 16.0, trust: bool = False) -> ModelShape:
    """Return the shape of a checkpoint folder, a config.json or a hub id, of which no weights are fetched.

    bits: per weight of a routed expert. Raises PromoeError where there is no configuration, or no experts in it that
    can be patched.
    """
    configuration = read_configuration(name, {"trust_remote_code": trust})
    model = skeleton_of(name, {"config": configuration, "trust_remote_code": trust})
    found = find_experts(model)
    modules = [model.get_submodule(path) for path in found]
    specs = [layout.spec(module) for module, layout in zip(modules, found.values(), strict=True)]
    try:
        active = find_layers(model, {path: layout.experts for path, layout in found.items()}).active
    except ValueError as reason:
        raise PromoeError(f"{name} cannot be simulated: {reason}") from reason
    layers = tuple(
        LayerShape(
            experts=layout.experts, active=A, up_weights=_weights(spec, Part.UP), down_weights=_weights(spec, Part.DOWN)
        )
        for layout, A, spec in zip(found.values(), active, specs, strict=True)
    )
    routed = sum(shape.experts * shape.weights(Part.WHOLE) for shape in layers)
    every = {id(parameter): parameter.numel() for parameter in model.parameters()}
    embedding: Any = model.get_input_embeddings()
    head = embedding.weight.numel()
    tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is embedding.weight
    text = configuration.get_text_config()
    heads = int(text.num_attention_heads)
    width = int(getattr(text, "v_head_dim", None) or getattr(text, "head_dim", None) or text.hidden_size // heads)
    kv = int(getattr(text, "kv_lora_rank", 0) or 0) + int(getattr(text, "qk_rope_head_dim", 0) or 0)
    if not getattr(text, "kv_lora_rank", None):
        kv = 2 * int(getattr(text, "num_key_value_heads", None) or heads) * width
    return ModelShape(
        name=type(model).__name__,
        layers=layers,
        decoder_layers=int(text.num_hidden_layers),
        dense_weights=sum(every.values()) - routed - head * (1 if tied else 2),
        head_weights=head,
        kv_weights=kv * int(text.num_hidden_layers),
        attention_width=heads * width,
        bits=bits,
        dense_bits=16.0,
    )


def _weights(spec: ExpertSpec, part: Part) -> int:
    return sum(tensor.nbytes // tensor.dtype.itemsize for tensor in spec.tensors if tensor.part & part)
