"""The link between a store and the slots of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from promoe_triton.budget import Budget, free_memory
from promoe_triton.chunking import BUS_LATENCY, DISK_LATENCY
from promoe_triton.config import Config
from promoe_triton.links.device import DeviceFiller
from promoe_triton.links.filling import Filler, SlotFiller
from promoe_triton.links.issued import IssuedLink
from promoe_triton.links.sources import DiskSource, HostSource
from promoe_triton.links.streams import Streams
from promoe_triton.links.threads import ThreadedLink
from promoe_triton.memory import DeviceMemory, SlotMemory
from promoe_triton.protocols import ExpertSpec, Link
from promoe_triton.stores.checkpoint import CheckpointStore
from promoe_triton.stores.host import HostStore

M = TypeVar("M")


def make_link(
    config: Config, device: torch.device, streams: Streams, store: CheckpointStore | HostStore, budget: Budget
) -> Link:
    """Take memory for the slots, and start the link that fills them."""
    if isinstance(store, CheckpointStore):
        filler: Filler = _from_files(config, device, streams, store, budget)
        chunking = config.cuts(DISK_LATENCY)
    else:
        source = HostSource(store, streams)
        filler = DeviceFiller(source, _on_device(device, store, budget), streams)
        chunking = config.cuts(BUS_LATENCY)
        if source.is_direct:
            return IssuedLink(
                filler,
                streams,
                depth=config.depth,
                chunking=chunking,
                timeout=config.io_timeout,
                limit=config.limit,
            )
    return ThreadedLink(filler, depth=config.depth, chunking=chunking, timeout=config.io_timeout, limit=config.limit)


def _from_files(
    config: Config, device: torch.device, streams: Streams, store: CheckpointStore, budget: Budget
) -> Filler:
    direct = direct_io(config, store, budget, device)
    if device.type == "cpu":
        return SlotFiller(store, _memories(store, budget, SlotMemory), direct)
    return DeviceFiller(DiskSource(store, streams, direct), _on_device(device, store, budget), streams)


def _on_device(device: torch.device, store: CheckpointStore | HostStore, budget: Budget) -> list[DeviceMemory]:
    return _memories(store, budget, lambda slots, slot_bytes: DeviceMemory(slots, slot_bytes, device))


def _memories(store: CheckpointStore | HostStore, budget: Budget, make: Callable[[int, int], M]) -> list[M]:
    """Take memory for the slots of each layer; experts alike share it. make: from slots and bytes of each."""
    slots: dict[ExpertSpec, int] = {}
    for spec, share in zip(store.specs, budget.slots_of_layer, strict=True):
        slots[spec] = slots.get(spec, 0) + share
    sizes = dict(zip(store.specs, budget.slot_bytes, strict=True))
    made = {spec: make(count, sizes[spec]) for spec, count in slots.items()}
    return [made[spec] for spec in store.specs]


def direct_io(config: Config, store: CheckpointStore, budget: Budget, device: torch.device) -> bool:
    """Whether to read past the page cache: not where all experts fit in memory beside the slots that are there."""
    if config.io == "auto":
        size = sum(file.stat().st_size for file in store.files)
        return size + (budget.nbytes if device.type == "cpu" else 0) > free_memory()
    return config.io == "direct"
