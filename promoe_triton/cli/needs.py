"""What a model needs, from its configuration alone: the model is built without weights, and counted."""

from __future__ import annotations

import itertools
import mmap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from promoe_triton.budget import LayerNeed, available_memory, plan_slots
from promoe_triton.cli.generation import check_exists
from promoe_triton.config import format_size
from promoe_triton.errors import PromoeError
from promoe_triton.loading import read_configuration, skeleton_of
from promoe_triton.patch._rest import checkpoint_store, room_for_context
from promoe_triton.patch._swap import find_experts
from promoe_triton.predictors.reach import find_layers
from promoe_triton.protocols import round_up
from promoe_triton.stores.reader import FileReader
from promoe_triton.stores.resolve import resolve_files
from promoe_triton.stores.safetensors_files import Unchanged

HIT_RATIOS = {0.125: 0.269, 0.25: 0.426, 0.5: 0.684, 0.75: 0.878, 1.0: 1.0}
"""By share of the experts in slots, the hit ratio of LRU while decoding, measured on the demo model's held-out text
(its card). The paper's authors found 0.27, 0.44, 0.68 and 0.89 on DeepSeek-MoE."""

MEASURING_SECONDS = 2.0

CHUNK = 4 << 20
"""Bytes of one read of that measurement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a share of slots takes. memory_bytes: slots, dense part and context together.

    token_bytes: expected to be read per token while decoding, None where experts per token are not known.
    """

    share: float
    slots: int
    slot_bytes: int
    memory_bytes: int
    fits: bool
    token_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a model consists of, in bytes. experts, expert_bytes: per MoE layer, and of one expert there.

    top_k: most experts per token, None where nothing names it. store: where the experts rest, or why nowhere.
    """

    architecture: str
    dtype: str
    experts: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    top_k: int | None
    dense_bytes: int
    context_bytes: int
    free_bytes: int
    store: str
    choices: tuple[Choice, ...]

    @property
    def layers(self) -> int:
        return len(self.experts)

    @property
    def all_expert_bytes(self) -> int:
        return sum(n * each for n, each in zip(self.experts, self.expert_bytes, strict=True))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "layers": self.layers, "all_expert_bytes": self.all_expert_bytes}


def model_needs(name: str, dtype: str = "auto", trust: bool = False) -> Needs:
    """Return the needs of a checkpoint folder, a config.json or a hub id, of which no weights are fetched.

    trust: whether code that comes with the model may run.
    Raises PromoeError where there is no configuration, or the model has no experts that can be patched.
    """
    check_exists(name)
    configuration = read_configuration(name, {"trust_remote_code": trust})
    if dtype != "auto":
        configuration.dtype = getattr(torch, dtype)
    model = skeleton_of(name, {"config": configuration, "trust_remote_code": trust})
    found = find_experts(model)
    modules = [model.get_submodule(path) for path in found]
    layouts = list(found.values())
    specs = [layout.spec(module) for module, layout in zip(modules, layouts, strict=True)]
    place, slot_bytes = "no weights here, a configuration alone", [round_up(spec.nbytes) for spec in specs]
    if not Path(name).is_file():
        try:
            store = checkpoint_store(model, found, resolve_files(name, local_files_only=True))
            place = store.describe()
            slot_bytes = [store.slot_bytes(index, layout.experts) for index, layout in enumerate(layouts)]
        except PromoeError as reason:
            place = f"no checkpoint here ({reason})"
    experts = tuple(layout.experts for layout in layouts)
    total = sum(n * spec.nbytes for n, spec in zip(experts, specs, strict=True))
    dense = sum(parameter.nbytes for parameter in model.parameters()) - total
    context, free = room_for_context(model), available_memory()
    active = active_experts(model, {path: layout.experts for path, layout in found.items()})
    layer_needs = [
        LayerNeed(experts=n, spec=spec, slot_bytes=size)
        for n, spec, size in zip(experts, specs, slot_bytes, strict=True)
    ]
    return Needs(
        architecture=type(model).__name__,
        dtype=", ".join(dict.fromkeys(str(t.dtype).removeprefix("torch.") for spec in specs for t in spec.tensors)),
        experts=experts,
        expert_bytes=tuple(spec.nbytes for spec in specs),
        top_k=None if active is None else max(active),
        dense_bytes=dense,
        context_bytes=context,
        free_bytes=free,
        store=place,
        choices=tuple(_choice(share, layer_needs, dense + context, free, active) for share in HIT_RATIOS),
    )


def _choice(share: float, needs: Sequence[LayerNeed], beside: int, free: int, active: Sequence[int] | None) -> Choice:
    total = sum(need.experts * need.slot_bytes for need in needs)
    budget = plan_slots(share, "auto", needs, total)
    memory = budget.nbytes + beside
    used = None if active is None else sum(A * need.spec.nbytes for A, need in zip(active, needs, strict=True))
    return Choice(
        share=share,
        slots=budget.slots,
        slot_bytes=budget.nbytes,
        memory_bytes=memory,
        fits=memory <= free,
        token_bytes=None if used is None else round((1.0 - HIT_RATIOS[share]) * used),
    )


def measure_bandwidth(name: str) -> float:
    """Return bytes per second of reading a checkpoint past the page cache, in about two seconds.

    Raises PromoeError where no checkpoint is here.
    """
    files = [file for file in resolve_files(name, local_files_only=True) if file.stat().st_size >= 2 * CHUNK]
    if not files:
        raise PromoeError(f"{name} has no file of {format_size(2 * CHUNK)} or more to measure the disk with")
    places = itertools.cycle([(f, offset) for f in files for offset in range(0, f.stat().st_size - CHUNK, CHUNK)])
    nbytes, taken, buffer = 0, 0.0, memoryview(mmap.mmap(-1, CHUNK))
    with FileReader(Unchanged(files), direct=True) as reader:
        began = time.perf_counter()
        while taken < MEASURING_SECONDS:
            reader.read_into(*next(places), CHUNK, buffer, 0)
            nbytes, taken = nbytes + CHUNK, time.perf_counter() - began
    return nbytes / taken


def active_experts(model: Any, experts: Mapping[str, int]) -> tuple[int, ...] | None:
    """Return how many experts a token gets in each layer; None where the model does not say."""
    try:
        return find_layers(model, experts).active
    except ValueError:
        return None
