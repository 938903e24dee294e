"""Hardware and software as data files: read, checked, and refused with the file's name where something is missing."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from promoe_triton.errors import PromoeError

FOLDER = Path(__file__).parent / "hardware"
SOFTWARE = Path(__file__).parent / "software.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A machine: fast memory, what computes, and the link that fills it.

    memory_bytes: of fast memory. memory_bandwidth: bytes per second that computing reads weights with. matmul_flops:
    operations per second of products. launch_seconds: what starting one operation costs the host. asynchronous: whether
    operations are started ahead of the device, so that the longer of the two counts; else both add up. link_bandwidth,
    link_latency: bytes per second, and seconds until a copy's first byte. slowed, link_slowed: how much longer
    computing takes while the link copies, and copying while something is computed. sources: where each number is from.
    """

    name: str
    memory_bytes: float
    memory_bandwidth: float
    matmul_flops: float
    launch_seconds: float
    asynchronous: bool
    link_bandwidth: float
    link_latency: float
    slowed: float
    link_slowed: float
    sources: dict[str, str]

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "memory_bandwidth", "matmul_flops", "link_bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if self.launch_seconds < 0 or self.link_latency < 0 or self.slowed < 1 or self.link_slowed < 1:
            raise ValueError("launch_seconds and link_latency must not be negative, slowed and link_slowed at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """How many operations are started where. loop: of transformers' eager code and the like.

    layer: for a layer beside its routed experts. call: for a call of the experts, whatever their number; absent: how
    many as long the host takes more, for decisions and copies, where not all layers have every expert. up, down: for
    the products of one wave. expert_up, expert_down: for those of each of its experts. head: once per pass. predict:
    for a prediction.
    """

    name: str
    layer: float
    call: float
    absent: float
    up: float
    down: float
    expert_up: float
    expert_down: float
    head: float
    predict: float
    source: str


def hardware_names() -> list[str]:
    """Return the machines that come with the package."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def read_hardware(name: str) -> Hardware:
    """Return one of `hardware_names`, or what a JSON file says. Raises PromoeError where it cannot be read."""
    file = FOLDER / f"{name}.json"
    if not file.exists():
        file = Path(name)
    if not file.exists():
        raise PromoeError(f"no hardware {name!r}: expected one of {', '.join(hardware_names())}, or a JSON file")
    found: Hardware = _read(Hardware, _load(file), file)
    missing = [field.name for field in fields(Hardware) if field.name not in (*found.sources, "name", "sources")]
    if missing:
        raise PromoeError(f"{file} gives no source of {', '.join(missing)}; name one for each under 'sources'")
    return found


def read_software(name: str) -> Software:
    """Return a way of computing that comes with the package. Raises ValueError where there is none of that name."""
    known = _load(SOFTWARE)
    if name not in known:
        raise ValueError(f"software must be one of {', '.join(known)}, got {name!r}")
    found: Software = _read(Software, {"name": name, **known[name]}, SOFTWARE)
    return found


def _load(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise PromoeError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise PromoeError(f"{file} should hold one JSON object, and holds a {type(found).__name__}")
    return found


def _read(kind: Any, cells: dict[str, Any], file: Path) -> Any:
    names = [field.name for field in fields(kind)]
    if missing := [name for name in names if name not in cells]:
        raise PromoeError(f"{file} lacks {', '.join(missing)}; see {kind.__name__} for what each is")
    if unknown := [name for name in cells if name not in names]:
        raise PromoeError(f"{file} has {', '.join(unknown)}, which nobody reads; there are {', '.join(names)}")
    for field in fields(kind):
        kinds: tuple[type, ...] = {"str": (str,), "float": (int, float), "bool": (bool,)}.get(str(field.type), (dict,))
        if not isinstance(cells[field.name], kinds) or (isinstance(cells[field.name], bool) and field.type != "bool"):
            raise PromoeError(f"{file}: {field.name} should be a {field.type}, and is {cells[field.name]!r}")
    try:
        return kind(**cells)
    except ValueError as error:
        raise PromoeError(f"{file}: {error}") from error
