"""From what the user asked for to slots per layer, within the memory there is. Pure but for asking how much that is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from promoe_triton.config import Partition, Slots, format_size, parse_size
from promoe_triton.errors import PromoeError
from promoe_triton.protocols import ExpertKey, ExpertSpec, Policy
from promoe_triton.slots import SlotTable


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNeed:
    """What one layer wants slots for: `experts` experts of `spec`, `slot_bytes` of memory for each slot."""

    experts: int
    spec: ExpertSpec
    slot_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Slots per layer; `shared` where the layers of one spec draw them from one partition."""

    slots_of_layer: tuple[int, ...]
    slot_bytes: tuple[int, ...]
    shared: bool

    @property
    def slots(self) -> int:
        return sum(self.slots_of_layer)

    @property
    def nbytes(self) -> int:
        return sum(n * size for n, size in zip(self.slots_of_layer, self.slot_bytes, strict=True))

    def tables(self, specs: Sequence[ExpertSpec], policy: Callable[[], Policy]) -> list[SlotTable]:
        """Share the slots of each kind of expert out to its layers, or to one table for all of them.

        specs: by layer. policy: makes a fresh one for each table.
        """
        firsts: Counter[ExpertSpec] = Counter()
        ranges = []
        for spec, slots in zip(specs, self.slots_of_layer, strict=True):
            ranges.append(range(firsts[spec], firsts[spec] + slots))
            firsts[spec] += slots
        if not self.shared:
            return [SlotTable(slots, policy()) for slots in ranges]
        shared = {spec: SlotTable(range(slots), policy()) for spec, slots in firsts.items()}
        return [shared[spec] for spec in specs]


def first_experts(
    tables: Sequence[SlotTable], keys: Iterable[Sequence[ExpertKey]], popularity: Mapping[ExpertKey, float]
) -> list[ExpertKey]:
    """Return what the slots hold at the start: the most popular experts where that is known.

    tables: by layer. keys: all experts of a layer, for those layers that have slots.
    """
    of_table: dict[int, tuple[SlotTable, list[ExpertKey]]] = {}
    for layer in keys:
        table = tables[layer[0].layer]
        of_table.setdefault(id(table), (table, []))[1].extend(layer)
    chosen: list[ExpertKey] = []
    for table, found in of_table.values():
        ranked = sorted(found, key=lambda key: (-popularity.get(key, 0.0), key.expert, key.layer))
        chosen += ranked[: len(table)]
    return chosen


def spread(count: int, needs: Sequence[LayerNeed]) -> tuple[int, ...]:
    """Share `count` slots equally between layers, none above its experts; what is left over goes first.

    The first layers get the remainder because they are predicted worst.
    """
    shares = [0] * len(needs)
    left = min(count, sum(need.experts for need in needs))
    while left:
        open_layers = [i for i, need in enumerate(needs) if shares[i] < need.experts]
        each = min(left // len(open_layers), min(needs[i].experts - shares[i] for i in open_layers))
        for i in open_layers if each else open_layers[:left]:
            shares[i] += each or 1
            left -= each or 1
    return tuple(shares)


def plan_slots(slots: Slots, partition: Partition, needs: Sequence[LayerNeed], memory: int) -> Budget:
    """Turn the user's `slots` into slots per layer.

    memory: bytes that slots may take; more than that is refused with both numbers.
    Raises ValueError where `slots` cannot serve the model and PromoeError where it does not fit in memory.
    """
    total = sum(need.experts for need in needs)
    pools = Counter(need.spec for need in needs)

    def shared(count: int) -> bool:
        return partition == "global" or count < len(needs)

    def share(count: int) -> tuple[int, ...]:
        shares = spread(count, needs)
        return _one_per_pool(shares, needs) if shared(count) and count >= len(pools) else shares

    def cost(count: int) -> int:
        return sum(n * need.slot_bytes for n, need in zip(share(count), needs, strict=True))

    if slots is None or isinstance(slots, str):
        limit = memory if slots is None else parse_size(slots)
        low, high = 0, total
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if cost(middle) <= limit else (low, middle - 1)
        count = low
        if count == 0:
            largest = max(need.slot_bytes for need in needs)
            raise ValueError(
                f"{format_size(limit)} {'of free memory ' if slots is None else ''}hold no expert: "
                f"one slot takes {format_size(largest)}"
            )
    elif isinstance(slots, float):
        count = max(1, round(slots * total))
    else:
        count = min(slots, total)

    if count < len(pools):
        raise ValueError(f"this model has {len(pools)} kinds of experts and needs as many slots, got {count}")
    if partition == "layer" and count < len(needs):
        raise ValueError(f"partition='layer' needs at least one slot for each of {len(needs)} layers, got {count}")
    budget = Budget(
        slots_of_layer=share(count), slot_bytes=tuple(need.slot_bytes for need in needs), shared=shared(count)
    )
    if budget.nbytes > memory:
        raise PromoeError(
            f"{count} slots take {format_size(budget.nbytes)}, but only {format_size(memory)} of memory are free; "
            "ask for fewer slots"
        )
    return budget


def _one_per_pool(shares: tuple[int, ...], needs: Sequence[LayerNeed]) -> tuple[int, ...]:
    """Move single slots so that every kind of expert has one; there are at least as many slots as kinds."""
    moved = list(shares)
    held: Counter[ExpertSpec] = Counter()
    for share, need in zip(moved, needs, strict=True):
        held[need.spec] += share
    for i, need in enumerate(needs):
        if held[need.spec] == 0:
            donor = max(range(len(needs)), key=lambda j: held[needs[j].spec] if moved[j] else 0)
            moved[donor] -= 1
            held[needs[donor].spec] -= 1
            moved[i] += 1
            held[need.spec] += 1
    return tuple(moved)


RAM = torch.device("cpu")


def free_memory(device: torch.device = RAM) -> int:
    """Bytes that may still be taken in the memory of a device."""
    if device.type == "cpu":
        return available_memory()
    free, _ = torch.cuda.mem_get_info(device)
    # What torch keeps for itself and does not use.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def available_memory() -> int:
    """Bytes of RAM this process may still take: the least of the machine's and its control groups'."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    for limit, usage, stat in control_groups():
        try:
            ceiling, used = int(limit.read_text()), int(usage.read_text())
            counts = dict(line.split() for line in stat.read_text().splitlines() if line)
            # Cached and mapped files give way; version 1 counts the groups below under names of their own.
            cache = sum(
                int(counts.get(f"total_{kind}", counts.get(kind, 0))) for kind in ("active_file", "inactive_file")
            )
        except (OSError, ValueError):  # no limit: "max", or a group we cannot see
            continue
        available = min(available, max(ceiling - used + cache, 0))
    return available


def control_groups() -> list[tuple[Path, Path, Path]]:
    """Limit, usage and statistics files of every memory control group this process is in (v2 and v1)."""
    found: list[tuple[Path, Path, Path]] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group == root.parent:
                break
            found.append((group / names[0], group / names[1], group / "memory.stat"))
    return found
