"""What is measured: one model, opened for every run with other options, from files or from the host's memory."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from models import sizes
from torch import nn
from transformers import AutoModelForCausalLM

import promoe_triton
from promoe_triton.config import Config
from promoe_triton.patch._swap import find_experts


class Moved:
    """Bytes that were moved in the background. Several threads may add to it."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.nbytes += nbytes


class Subject(Protocol):
    """link: what is between experts and slots. experts: over all layers."""

    link: str
    device: torch.device
    experts: int

    def opened(self, options: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """Give the model in slots, as new."""
        ...

    def streaming(self) -> contextlib.AbstractContextManager[Moved]:
        """Keep the link at work in the background, as fast as it goes; give what it has moved."""
        ...


class OnDisk:
    """A checkpoint, read past the page cache unless told otherwise."""

    link = "the disk"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.device = torch.device("cpu")
        self.experts = sizes(folder).experts

    @contextlib.contextmanager
    def opened(self, options: Mapping[str, Any]) -> Iterator[Any]:
        gc.collect()
        yield load(self._folder, options)

    @contextlib.contextmanager
    def streaming(self) -> Iterator[Moved]:
        moved = Moved()
        files = sorted(self._folder.glob("*.safetensors"))

        def read(over: threading.Event) -> None:
            buffer = mmap.mmap(-1, 4 << 20)
            handles = [os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files]
            while not over.is_set():
                for handle in handles:
                    offset = 0
                    while not over.is_set() and os.preadv(handle, [buffer], offset) == len(buffer):
                        offset += len(buffer)
                        moved.add(len(buffer))
            for handle in handles:
                os.close(handle)

        with _in_background(read, threads=Config().depth):
            yield moved


class InMemory:
    """A model in the host's memory, for slots on a device (on a CPU: slots beside it, as a rehearsal)."""

    link = "the bus"

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.layouts = find_experts(model)
        self.experts = sum(layout.experts for layout in self.layouts.values())

    @contextlib.contextmanager
    def opened(self, options: Mapping[str, Any]) -> Iterator[Any]:
        patched = promoe_triton.patch(self.model, device=str(self.device), store="memory", **options)
        try:
            yield patched
        finally:
            promoe_triton.unpatch(patched)

    @contextlib.contextmanager
    def streaming(self) -> Iterator[Moved]:
        moved = Moved()
        is_cuda = self.device.type == "cuda"
        source = torch.empty(4 << 20, dtype=torch.uint8, pin_memory=is_cuda)
        target = torch.empty_like(source, device=self.device)

        def copy(over: threading.Event) -> None:
            stream = torch.cuda.Stream(self.device) if is_cuda else None
            with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
                while not over.is_set():
                    for _ in range(8):
                        target.copy_(source, non_blocking=True)
                    if stream:
                        stream.synchronize()
                    moved.add(8 * len(source))

        with _in_background(copy, threads=1):
            yield moved


@contextlib.contextmanager
def _in_background(work: Any, threads: int) -> Iterator[None]:
    over = threading.Event()
    running = [threading.Thread(target=work, args=(over,)) for _ in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in running:
            thread.join()


def load(folder: Path, options: Mapping[str, Any]) -> Any:
    """Return the model in slots, read past the page cache unless told otherwise."""
    return promoe_triton.from_pretrained(str(folder), **{"io": "direct"} | dict(options))


@torch.no_grad()
def inflated(source: Path, expert_bytes: int) -> nn.Module:
    """Return the demo model, in RAM, with experts of at least so many bytes that compute what they did.

    As `promoe_triton.demo.inflate` writes it, but for the random rows: they repeat, which takes seconds, not minutes.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    block = torch.randn(2**20 + 1, generator=torch.Generator().manual_seed(0))
    for path in find_experts(model):
        module = model.get_submodule(path)
        up, down = module.gate_up_proj, module.down_proj
        E, D, F = down.shape
        wider = max(-(-expert_bytes // (3 * D * down.element_size() * 64)) * 64, F)
        filler = (block * up[0].float().std()).to(up.dtype)
        # Its rows: all of the gate's, then all of the other projection's.
        rows = up.new_empty(E, 2, wider, D)
        flat = rows.view(-1)
        for start in range(0, flat.numel(), filler.numel()):
            flat[start : start + filler.numel()] = filler[: flat.numel() - start]
        rows[:, :, :F] = up.view(E, 2, F, D)
        columns = down.new_zeros(E, D, wider)
        columns[:, :, :F] = down
        module.gate_up_proj = nn.Parameter(rows.view(E, 2 * wider, D), requires_grad=False)
        module.down_proj = nn.Parameter(columns, requires_grad=False)
    model.config.moe_intermediate_size = wider
    return model
