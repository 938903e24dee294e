"""Qwen3-MoE models with random weights, in memory and on disk."""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from promoe_triton.demo.inflate import inflate
from promoe_triton.patch._rest import checkpoint_store
from promoe_triton.patch._swap import find_experts
from promoe_triton.stores.checkpoint import CheckpointStore
from promoe_triton.stores.resolve import resolve_files

DEMO = Path(__file__).resolve().parents[1] / "promoe_triton" / "demo"
MODEL, HELDOUT = DEMO / "model", DEMO / "heldout.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """E experts, A of them per token, F wide; the rest is the same for all benchmarks but the demo's twins."""

    experts: int
    active: int
    width: int
    dtype: torch.dtype = torch.bfloat16
    hidden: int = 512
    layers: int = 8
    vocabulary: int = 2048

    def __str__(self) -> str:
        kind = {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]
        return f"{self.experts} experts, top-{self.active}, F {self.width}, {kind}"

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.width * self.dtype.itemsize

    def config(self) -> Qwen3MoeConfig:
        return Qwen3MoeConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=max(self.hidden // 128, 1),
            head_dim=64,
            num_experts=self.experts,
            num_experts_per_tok=self.active,
            moe_intermediate_size=self.width,
            intermediate_size=self.width,
            norm_topk_prob=True,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            dtype=self.dtype,
        )


def random_model(shape: Shape, seed: int = 0) -> nn.Module:
    """Return a model whose every weight is normal with 0.04, the experts' drawn from one block for speed."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=shape.dtype)
    model = model.to_empty(device="cpu").eval()
    block = torch.randn(2**20 + 1).mul_(0.04).to(shape.dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif ".experts." in name:
                flat = parameter.view(-1)
                for start in range(0, flat.numel(), block.numel()):
                    part = flat[start : start + block.numel()]
                    part.copy_(block[: part.numel()])
            else:
                parameter.normal_(0.0, 0.04)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.tie_weights()
    return model


def sharing_weights(model: nn.Module) -> nn.Module:
    """Return a copy of the model with its own modules and configuration, over the very same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def write_random(shape: Shape, folder: Path) -> Path:
    """Write a random model as `save_pretrained` writes it; return its folder. Needs the model's size in RAM."""
    if not (folder / "config.json").exists():
        random_model(shape).save_pretrained(folder)
    return folder


def open_store(folder: Path) -> CheckpointStore:
    """Return the experts of a checkpoint as the product finds them there."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return checkpoint_store(model, find_experts(model), resolve_files(str(folder)))


@contextlib.contextmanager
def large_checkpoint(
    source: Path, scratch: Path | None, expert_bytes: int, label: str, dtype: str | None = None
) -> Iterator[Path]:
    """Write the demo model (or random weights, where there is none) with larger experts; removed at the end.

    dtype: of all weights (None: the source's).
    """
    with tempfile.TemporaryDirectory(prefix="promoe-bench-", dir=scratch) as place:
        folder = Path(place) / "model"
        print(f"Writing {label}", flush=True)
        if is_trained(source):
            if dtype is not None:
                source = cast(source, Path(place) / "cast", dtype)
            inflate(source, folder, expert_bytes=expert_bytes)
        else:
            width = -(-expert_bytes // (3 * 512 * 2 * 64)) * 64
            write_random(Shape(experts=64, active=8, width=width), folder)
        os.sync()
        yield folder


def cast(source: Path, folder: Path, dtype: str) -> Path:
    """Write a checkpoint with all weights in another type."""
    AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def is_trained(source: Path) -> bool:
    return (source / "config.json").exists()


def sizes(folder: Path) -> Sizes:
    """Return how large a checkpoint and its experts are."""
    store = open_store(folder)
    config = AutoConfig.from_pretrained(folder)
    each = store.specs[0].nbytes
    return Sizes(
        experts=config.num_hidden_layers * config.num_experts,
        expert_bytes=each,
        slot_bytes=store.slot_bytes(0, config.num_experts),
        total_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """experts: over all layers. slot_bytes: room one expert takes in memory, with what alignment adds."""

    experts: int
    expert_bytes: int
    slot_bytes: int
    total_bytes: int

    @property
    def dense_bytes(self) -> int:
        return self.total_bytes - self.experts * self.expert_bytes


def prompts(source: Path, count: int, length: int) -> list[list[int]]:
    """Return token ids from all over the demo's held-out text, or random ones where there is no demo model."""
    if not is_trained(source):
        return torch.randint(2048, (count, length), generator=torch.Generator().manual_seed(1)).tolist()
    ids = AutoTokenizer.from_pretrained(source)(HELDOUT.read_text())["input_ids"]
    return [ids[start : start + length] for start in range(0, len(ids) - length, len(ids) // count)][:count]
