"""Where a model's experts rest, and how much memory there is for their slots."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from promoe_triton.budget import Budget, LayerNeed, free_memory, plan_slots
from promoe_triton.config import Config, format_size, parse_size
from promoe_triton.errors import PromoeError
from promoe_triton.layout import ExpertLayout
from promoe_triton.memory import in_files, own_memory
from promoe_triton.protocols import ExpertKey, ExpertSpec
from promoe_triton.runtime import Popularity
from promoe_triton.stores.checkpoint import CheckpointStore, same_tensors
from promoe_triton.stores.conversion import map_parameters
from promoe_triton.stores.host import HostStore, ResidentStore
from promoe_triton.stores.resolve import checkpoint_files
from promoe_triton.stores.safetensors_files import read_headers
from promoe_triton.stores.spool import spool

logger = logging.getLogger(__name__)

RESERVE = 2**30
"""Bytes of memory left free for activations where the number of slots is ours to choose."""


def expert_parameters(modules: Sequence[nn.Module], layouts: Sequence[ExpertLayout]) -> list[nn.Parameter]:
    """Return the experts' parameters, each once."""
    parameters = [
        module.get_parameter(n) for module, layout in zip(modules, layouts, strict=True) for n in layout.names
    ]
    return list({id(parameter): parameter for parameter in parameters}.values())


def mapped(model: nn.Module, leaving: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """Return what lies in mapped files and stays in memory, so that it needs memory of its own."""
    left = set(map(id, leaving))
    return in_files(tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in left)


def nbytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def check_own_memory(staying: Sequence[torch.Tensor]) -> None:
    """Raise PromoeError where weights that lie in mapped files do not fit in the memory that is free."""
    needed, free = nbytes_of(staying), free_memory()
    if needed > free:
        raise PromoeError(
            f"{format_size(needed)} of weights lie in mapped files, and the model would change with them; their own "
            f"memory is as much, but only {format_size(free)} are free; keep fewer experts resident (slots=...)"
        )


def covers(slots: int | float | str, experts: int, weights: int) -> bool:
    """Whether slots take in every one of so many experts, which have so many bytes of weights."""
    if isinstance(slots, str):
        return parse_size(slots) >= weights
    return slots >= 1.0 if isinstance(slots, float) else slots >= experts


def room_for_context(model: Any) -> int:
    """Return bytes for activations and the KV cache of one sequence as long as the model allows."""
    configuration = model.config.get_text_config()

    def number(*names: str) -> int:
        for name in names:
            # A configuration that differs by layer may refuse to name one value for all.
            with contextlib.suppress(Exception):
                if isinstance(value := getattr(configuration, name, None), int):
                    return value
        return 0

    layers, length = number("num_hidden_layers"), number("max_position_embeddings")
    queries = number("num_attention_heads")
    heads = number("num_key_value_heads", "num_attention_heads")
    width = number("head_dim") or number("hidden_size") // max(queries, 1)
    return RESERVE + 2 * layers * heads * width * length * int(model.dtype.itemsize)


def plan(config: Config, store: CheckpointStore | HostStore, layouts: Sequence[ExpertLayout], memory: int) -> Budget:
    """Share out slots whose size fits every expert of the store, however it lies in its file."""
    sizes: dict[ExpertSpec, int] = {}
    for index, (spec, layout) in enumerate(zip(store.specs, layouts, strict=True)):
        sizes[spec] = max(sizes.get(spec, 0), store.slot_bytes(index, layout.experts))
    needs = [
        LayerNeed(experts=layout.experts, spec=spec, slot_bytes=sizes[spec])
        for spec, layout in zip(store.specs, layouts, strict=True)
    ]
    return plan_slots(config.slots, config.partition, needs, memory)


def rest(
    model: nn.Module, found: Mapping[str, ExpertLayout], config: Config, device: torch.device
) -> CheckpointStore | HostStore:
    """Return a store that holds exactly the model's experts.

    In memory for slots on a GPU, where RAM suffices; else in the model's checkpoint where that is so, else a spool.
    """
    modules = [model.get_submodule(path) for path in found]
    if config.store == "memory" or (config.store == "auto" and device.type != "cpu"):
        try:
            return _in_memory(modules, list(found.values()))
        except PromoeError as reason:
            if config.store == "memory":
                raise
            logger.warning("the experts cannot rest in memory: %s", reason)
    if config.store != "spool":
        try:
            store = checkpoint_store(model, found, checkpoint_files(model))
            verify(store, modules, list(found.values()))
            return store
        except PromoeError as reason:
            if config.store == "checkpoint":
                raise
            logger.warning("the experts cannot rest in the model's own checkpoint: %s", reason)
    return spool(modules, list(found.values()), config.spool_dir)


def _in_memory(modules: Sequence[nn.Module], layouts: Sequence[ExpertLayout]) -> HostStore:
    """Return the experts as they are in the modules' parameters, which get memory of their own first."""
    mapped = in_files(expert_parameters(modules, layouts))
    check_own_memory(mapped)
    own_memory(mapped)
    pairs = list(zip(modules, layouts, strict=True))
    return HostStore(
        [layout.spec(module) for module, layout in pairs],
        layouts,
        [{name: module.get_parameter(name) for name in layout.names} for module, layout in pairs],
    )


def checkpoint_store(
    model: nn.Module,
    found: Mapping[str, ExpertLayout],
    files: Sequence[Path],
    key_mapping: Mapping[str, str] | None = None,
) -> CheckpointStore:
    """Return the experts of `model` as they rest in these files."""
    modules = {path: model.get_submodule(path) for path in found}
    parameters = {
        f"{path}.{name}": layout.stacked(modules[path].get_parameter(name))
        for path, layout in found.items()
        for name in layout.names
    }
    sources = map_parameters(model, parameters, read_headers(files), key_mapping)
    return CheckpointStore(
        [layout.spec(modules[path]) for path, layout in found.items()],
        [{name: sources[f"{path}.{name}"] for name in layout.names} for path, layout in found.items()],
        f"checkpoint {files[0].parent}",
    )


def verify(store: CheckpointStore, modules: Sequence[nn.Module], layouts: Sequence[ExpertLayout]) -> None:
    """Raise PromoeError unless every expert in the store equals the loaded one bit for bit."""
    loaded = ResidentStore(modules, layouts)
    keys = [ExpertKey(i, e) for i, layout in enumerate(layouts) for e in range(layout.experts)]
    for key in transformers_logging.tqdm(keys, desc="Comparing experts with the checkpoint", leave=False):
        if not same_tensors(store, key, loaded.load(key)):
            raise PromoeError(
                f"expert {key.expert} of MoE layer {key.layer} differs from {store.describe()}: the weights were "
                "changed after loading"
            )


def load_profile(path: Path | str, layouts: Sequence[ExpertLayout]) -> Popularity:
    """Read a profile; raises PromoeError where it is none, or one of another model."""
    try:
        uses = [[float(count) for count in layer] for layer in json.loads(Path(path).read_text())["uses"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PromoeError(f"{path} is no popularity profile (save_profile writes one): {error}") from error
    shape, expected = [len(layer) for layer in uses], [layout.experts for layout in layouts]
    if shape != expected:
        raise PromoeError(
            f"{path} is the profile of another model: it has {len(shape)} layers of {sorted(set(shape))} experts, "
            f"this model has {len(expected)} of {sorted(set(expected))}"
        )
    return {ExpertKey(i, e): count for i, layer in enumerate(uses) for e, count in enumerate(layer)}
