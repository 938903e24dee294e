"""The link between a store and the slots of a model."""

from __future__ import annotations

import torch

from promoe_triton.budget import Budget, free_memory
from promoe_triton.chunking import BUS_LATENCY, DISK_LATENCY
from promoe_triton.config import Config
from promoe_triton.links.device import DeviceFiller
from promoe_triton.links.filling import Filler, SlotFiller
from promoe_triton.links.sources import DiskSource, HostSource
from promoe_triton.links.streams import Streams
from promoe_triton.links.threads import ThreadedLink
from promoe_triton.memory import DeviceMemory, SlotMemory
from promoe_triton.protocols import ExpertSpec, Link
from promoe_triton.stores.checkpoint import CheckpointStore
from promoe_triton.stores.host import HostStore


def make_link(
    config: Config, device: torch.device, streams: Streams, store: CheckpointStore | HostStore, budget: Budget
) -> Link:
    """Take memory for the slots, and start the link that fills them."""
    return ThreadedLink(
        _filler(config, device, streams, store, budget),
        depth=config.depth,
        chunking=config.cuts(DISK_LATENCY if isinstance(store, CheckpointStore) else BUS_LATENCY),
        timeout=config.io_timeout,
        limit=config.limit,
    )


def _filler(
    config: Config, device: torch.device, streams: Streams, store: CheckpointStore | HostStore, budget: Budget
) -> Filler:
    specs = store.specs
    slots: dict[ExpertSpec, int] = {}
    for spec, share in zip(specs, budget.slots_of_layer, strict=True):
        slots[spec] = slots.get(spec, 0) + share
    sizes = dict(zip(specs, budget.slot_bytes, strict=True))
    if isinstance(store, CheckpointStore) and device.type == "cpu":
        places = {spec: SlotMemory(n, sizes[spec]) for spec, n in slots.items()}
        return SlotFiller(store, [places[spec] for spec in specs], direct_io(config, store, budget, device))
    memories = {spec: DeviceMemory(n, sizes[spec], device) for spec, n in slots.items()}
    source = (
        DiskSource(store, streams, direct_io(config, store, budget, device))
        if isinstance(store, CheckpointStore)
        else HostSource(store, streams)
    )
    return DeviceFiller(source, [memories[spec] for spec in specs], streams)


def direct_io(config: Config, store: CheckpointStore, budget: Budget, device: torch.device) -> bool:
    """Whether to read past the page cache: not where all experts fit in memory beside the slots that are there."""
    if config.io == "auto":
        size = sum(file.stat().st_size for file in store.files)
        return size + (budget.nbytes if device.type == "cpu" else 0) > free_memory()
    return config.io == "direct"
