"""Every choice a user can make, in one frozen dataclass that validates itself."""

from __future__ import annotations

import difflib
import math
import numbers
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from promoe_triton.chunking import Chunking, ChunkingName
from promoe_triton.policies import POLICIES
from promoe_triton.protocols import Predictor
from promoe_triton.techniques import ABLATION, Step, Technique

Slots = int | float | str | None
Partition = Literal["auto", "layer", "global"]
IO = Literal["auto", "buffered", "direct"]
StoreKind = Literal["auto", "checkpoint", "spool", "memory"]
BackendName = Literal["auto", "torch", "triton"]
PREDICTORS = ("auto", "gate", "history", "token", "random", "none")

LEARNED = ".safetensors"
"""How the name of a file with a learned predictor ends."""

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


MOST_READS = 256
"""The largest `depth`: more threads than that only wait for each other."""


def plain_number(value: Any) -> Any:
    """Return a number of any library (numpy's, as read from a table) as Python's own, anything else as it came."""
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def parse_size(text: str) -> int:
    """Return the bytes that a size with its unit names: ``"12GiB"``, ``"800 MB"``, ``"1.5e9 B"``."""
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]+)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    try:
        size = float(match[1]) * unit if match and unit else math.nan
    except ValueError:
        size = math.nan
    if not math.isfinite(size):
        raise ValueError(f"a size is a number with a unit such as '12GiB' or '800MB', got {text!r}")
    return int(size)


def format_size(nbytes: float) -> str:
    """Return bytes as a person reads them: ``9.4 MB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(nbytes) >= size:
            return f"{nbytes / size:.3g} {unit}" if abs(nbytes) < 999.5 * size else f"{nbytes / size:.0f} {unit}"
    return f"{nbytes:.0f} B"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How `patch` and `from_pretrained` run the experts of a model.

    slots: how many experts fast memory holds: a count over the whole model (int >= 1), a share of all experts
        (float in (0, 1]), or a size with its unit (``"12GiB"``). None: whatever fits, everything where it does.
    device: where slots live and the model runs: ``"cuda"`` (or ``"cuda:1"``), ``"cpu"`` (RAM); ``"auto"``: the GPU if
        there is one. The rest of the model is moved there, and back when it is unpatched.
    store: where experts rest when they are not in slots. ``"memory"``: in RAM as they were loaded (for slots on a GPU;
        with slots in RAM for tests); ``"checkpoint"``: the files the model came from; ``"spool"``: a temporary copy of
        a loaded model; ``"auto"``: memory for a GPU where RAM suffices, else the checkpoint if it holds these very
        weights (`from_pretrained`: if its experts can be read one at a time), else a spool.
    spool_dir: folder for the spool; None takes the system's temporary folder.
    io: ``"direct"`` reads past the page cache, ``"buffered"`` through it; ``"auto"`` is buffered when all
        experts fit in available memory beside the slots.
    depth: copies in flight, each on its own thread (and, to a GPU, its own stream); from the host's memory to a GPU
        they are on one stream, and it counts only where chunks have a fixed size.
    chunking: how copies are cut. ``"adaptive"``: as long as `chunk` where a layer waits for them, and of what is
        copied ahead no more at a time than takes `latency` seconds, so that an urgent copy can overtake;
        ``"fixed"``: `chunk` bytes; ``"tensor"``: one tensor; ``"expert"``: `chunk` bytes, but nothing overtakes an
        expert that has begun.
    chunk: the most bytes of one copy, as an int or a size with its unit; a multiple of 4096. (From the host's memory to
        a GPU ``"adaptive"`` copies whole experts where a layer waits: nothing could overtake them.)
    latency: seconds that an urgent copy may wait for what is in flight ahead of need. None: as suits the link, 4 ms
        where a disk is in the way, 0.25 ms from the host's memory to a GPU.
    bandwidth: a limit on bytes per second from the store, as a number or a size with its unit (``"1.5GB/s"``), to
        see how a slower disk or bus would do; None: what there is.
    partition: ``"layer"`` gives each layer its own equal share of the slots, ``"global"`` lets layers compete;
        ``"auto"`` is per layer unless there are fewer slots than layers.
    policy: which expert leaves when a slot is needed: ``"lru"``, ``"lfru"``, ``"predicted"`` (uses and predictions,
        both fading), ``"static"``; ``"auto"`` is the third, and LRU at the steps of the paper's ablation.
    profile: a popularity profile (`save_profile`) that says which experts are loaded at the start and that
        ``"static"`` ranks by.
    warm: fill the slots when the model is patched, so that the first prompt finds them full.
    predictor: what says which experts to copy ahead: ``"gate"`` (the later layer's own router, asked today),
        ``"token"`` and ``"history"`` (tables learned while running), ``"auto"`` (the gate, and tables where it
        cannot see), ``"random"``, ``"none"``, a file that `promoe-triton train` wrote, or a `Predictor`.
    always_predict: predict in every decode pass. By default passes with and without predictions are compared while
        the model runs, and those that are slower become rare.
    distance: how many layers ahead to predict, at least 1.
    width: experts named per layer and token; None: as many as the router chooses.
    ablation: which of the paper's techniques are on: ``"all"``, or a step of its ablation (``"static"``,
        ``"layer"``, ``"lru"``, ``"+prefetch"``, ``"+chunks"``, ``"+preemption"``, ``"+reorder"``), or one alone
        (``"chunks"``, ``"preemption"``, ``"reorder"``). For measuring; the output is always the same.
    backend: what computes: ``"torch"``, ``"triton"`` (kernels for GPUs; with slots in RAM only in Triton's
        interpreter, for tests), ``"auto"``: Triton on a GPU, torch elsewhere.
    tiles: a table of tiles for the kernels in place of the shipped one, as `promoe-triton tune` writes it. Resident
        layers stay out of CUDA graphs with it, as graphs know the shipped one only.
    io_timeout: seconds without progress after which a read is given up with an error.
    lock_timeout: seconds a forward waits for another thread's forward through the same layer.
    """

    slots: Slots = None
    device: str = "auto"
    store: StoreKind = "auto"
    spool_dir: Path | str | None = None
    io: IO = "auto"
    depth: int = 4
    chunking: ChunkingName = "adaptive"
    chunk: int | str = "4MiB"
    latency: float | None = None
    bandwidth: float | str | None = None
    partition: Partition = "auto"
    policy: str = "auto"
    profile: Path | str | None = None
    warm: bool = True
    predictor: str | Path | Predictor = "auto"
    always_predict: bool = False
    distance: int = 2
    width: int | None = None
    ablation: str = "all"
    backend: BackendName = "auto"
    tiles: Path | str | None = None
    io_timeout: float = 60.0
    lock_timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in (
            "slots",
            "depth",
            "chunk",
            "latency",
            "bandwidth",
            "distance",
            "width",
            "io_timeout",
            "lock_timeout",
        ):
            object.__setattr__(self, name, plain_number(getattr(self, name)))
        check_slots(self.slots)
        check_device_name(self.device)
        for name, choices in (
            ("store", get_args(StoreKind)),
            ("io", get_args(IO)),
            ("partition", get_args(Partition)),
            ("policy", ("auto", *POLICIES)),
            ("backend", get_args(BackendName)),
            ("chunking", get_args(ChunkingName)),
            ("ablation", tuple(ABLATION)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if isinstance(self.chunk, bool) or not isinstance(self.chunk, int | str):
            raise TypeError(f"chunk must be an int or a size such as '4MiB', got {self.chunk!r}")
        if self.chunk_bytes < 4096 or self.chunk_bytes % 4096:
            raise ValueError(f"chunk must be a positive multiple of 4096 bytes, got {self.chunk!r}")
        if isinstance(self.predictor, Path):
            object.__setattr__(self, "predictor", str(self.predictor))
        if isinstance(self.predictor, str) and self.predictor not in PREDICTORS:
            if not self.predictor.endswith(LEARNED):
                raise ValueError(
                    f"predictor must be one of {', '.join(PREDICTORS)}, a file of a learned one (*{LEARNED}), or a "
                    f"Predictor, got {self.predictor!r}"
                )
            if not Path(self.predictor).is_file():
                raise ValueError(f"there is no predictor {self.predictor}")
        if not isinstance(self.predictor, str) and not callable(getattr(self.predictor, "predict", None)):
            raise TypeError(f"predictor must be a name or have a method predict, got {self.predictor!r}")
        for name, value in (
            ("depth", self.depth),
            ("distance", self.distance),
            ("width", 1 if self.width is None else self.width),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.depth > MOST_READS:
            raise ValueError(f"depth must be at most {MOST_READS}, each is a thread of its own, got {self.depth}")
        if isinstance(self.bandwidth, bool) or not isinstance(self.bandwidth, int | float | str | None):
            raise TypeError(f"bandwidth must be a number or a size such as '1.5GB/s', got {self.bandwidth!r}")
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise ValueError(f"bandwidth must be positive and finite, in bytes per second, got {self.bandwidth!r}")
        for name in ("warm", "always_predict"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("spool_dir", "profile", "tiles"):
            if not isinstance(getattr(self, name), Path | str | None):
                raise TypeError(f"{name} must be a path, got {getattr(self, name)!r}")
        for name in ("io_timeout", "lock_timeout", "latency"):
            if name == "latency" and self.latency is None:
                continue
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int | float):
                raise TypeError(f"{name} must be a number of seconds, got {getattr(self, name)!r}")
            if not 0 < getattr(self, name) <= threading.TIMEOUT_MAX:
                raise ValueError(f"{name} must be a positive number of seconds, got {getattr(self, name)!r}")

    @property
    def chunk_bytes(self) -> int:
        return parse_size(self.chunk) if isinstance(self.chunk, str) else self.chunk

    @property
    def limit(self) -> float | None:
        """Bytes per second that the link may move at most."""
        if isinstance(self.bandwidth, str):
            return float(parse_size(self.bandwidth.removesuffix("/s")))
        return None if self.bandwidth is None else float(self.bandwidth)

    @property
    def step(self) -> Step:
        """What is on of the paper's techniques."""
        return ABLATION[self.ablation]

    @property
    def predicts(self) -> bool:
        """Whether experts may be copied ahead of need."""
        return Technique.PREFETCH in self.step.techniques and self.predictor != "none"

    @property
    def replacement(self) -> str:
        """The policy's name."""
        if self.step.static:
            return "static"
        if self.policy != "auto":
            return self.policy
        return "predicted" if self.ablation == "all" else "lru"

    @property
    def overtake(self) -> bool:
        """Whether an urgent copy may pass another between two of its chunks: not where chunks are off."""
        return self._chunking != "expert"

    def cuts(self, latency: float) -> Chunking:
        """Return how copies are cut. latency: that of this kind of link, where `self.latency` leaves it open."""
        latency = latency if self.latency is None else self.latency
        return Chunking(name=self._chunking, longest=self.chunk_bytes, latency=latency)

    @property
    def _chunking(self) -> ChunkingName:
        return self.chunking if Technique.CHUNKS in self.step.techniques else "expert"


def configured(config: object, options: Mapping[str, Any]) -> Config:
    """Return `config` (None: the defaults) with some fields overridden. Raises TypeError where it is something else."""
    if config is None:
        config = Config()
    if not isinstance(config, Config):
        hint = f"; for the number of slots write slots={config!r}" if isinstance(config, int | float | str) else ""
        raise TypeError(f"config must be a promoe_triton.Config, got {config!r}{hint}")
    known = [field.name for field in fields(Config)]
    for name in options:
        if name not in known:
            meant = meant_by(name)
            hint = f"; did you mean {meant}?" if meant else f"; there are {', '.join(known)}"
            raise TypeError(f"there is no option {name!r}{hint}")
    return replace(config, **options)


def meant_by(name: str) -> str | None:
    """Return the option whose name is spelled nearly like this one, if there is one."""
    close = difflib.get_close_matches(name, [field.name for field in fields(Config)], n=1, cutoff=0.8)
    return close[0] if close else None


def check_device_name(name: object) -> None:
    """Raise TypeError or ValueError unless `name` is "auto", "cpu", "cuda" or a GPU such as "cuda:1"."""
    if not isinstance(name, str):
        raise TypeError(f"device must be a name such as 'cuda', got {name!r}")
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name) is None:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or a GPU such as 'cuda:1', got {name!r}")


def check_slots(slots: Slots) -> None:
    """Raise TypeError or ValueError unless `slots` is a count, a share, a size or None."""
    if slots is None:
        return
    if isinstance(slots, bool) or not isinstance(slots, int | float | str):
        raise TypeError(f"slots must be a count, a share or a size such as '12GiB', got {slots!r}")
    if isinstance(slots, str):
        if parse_size(slots) <= 0:
            raise ValueError(f"slots as a size must be positive, got {slots!r}")
    elif isinstance(slots, float):
        if not 0 < slots <= 1:
            raise ValueError(f"slots as a share of all experts must be in (0, 1], got {slots!r}; a count is an int")
    elif slots < 1:
        raise ValueError(f"slots as a count must be at least 1, got {slots}")
