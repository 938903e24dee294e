"""Other ways to run a model with some of its experts on a GPU, each given as many bytes for them as ours."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import record
import torch
from decoding import Decoder
from proactive import Length, texts
from subjects import InMemory
from timing import ratios, settle, take_turns
from torch import Tensor, nn

from promoe_triton.devices import move_dense

OURS, LRU = "promoe_triton", "promoe_triton, lru"
ACCELERATE = "accelerate, cpu offload"
POLICYLANG, POLICYLANG_AHEAD = "moe-policylang, lru", "moe-policylang, lru + history, async"


class CannotRun(Exception):
    """Something is missing here; the message says what."""


@contextlib.contextmanager
def ours(subject: InMemory, share: float, ablation: str = "all") -> Iterator[Any]:
    with subject.opened({"slots": round(share * subject.experts), "ablation": ablation}) as model:
        yield model


@contextlib.contextmanager
def accelerate(subject: InMemory, share: float) -> Iterator[Any]:
    """Keep the experts of the first layers on the device; accelerate brings those of each other layer whole."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    modules = [subject.model.get_submodule(path) for path in subject.layouts]
    staying = modules[: round(share * len(modules))]
    with _dense_on_device(subject):
        try:
            for module in staying:
                module.to(subject.device)
            for module in modules[len(staying) :]:
                cpu_offload(module, execution_device=subject.device)
            yield subject.model
        finally:
            for module in modules:
                remove_hook_from_submodules(module)
                module.to("cpu")
                vars(module).pop("forward", None)  # which it leaves there


@contextlib.contextmanager
def policylang(subject: InMemory, share: float, ahead: bool) -> Iterator[Any]:
    """Give each layer's pool the same share. ahead: with its prefetching by history, over streams of its own."""
    if importlib.util.find_spec("moe_policylang") is None:
        raise CannotRun("moe-policylang is not installed")
    if subject.device.type != "cuda":
        raise CannotRun("it needs a GPU")
    import moe_policylang

    capacity = round(share * next(iter(subject.layouts.values())).experts)
    # Without this block, all layers share a cache that takes experts of the same number for the same.
    layers = (
        f"per_layer {{ allocation = uniform total_budget = {capacity * len(subject.layouts)} "
        f"min_capacity = {capacity} max_capacity = {capacity} rebalance_interval = 0 }}"
    )
    prefetch = "prefetch { strategy = history budget = 4 }" if ahead else ""
    policy = f"policy bench {{ cache {{ capacity = {capacity} eviction = lru }} {prefetch} {layers} }}"
    model: Any = subject.model
    before = model.config._experts_implementation
    with _dense_on_device(subject):
        attached = moe_policylang.attach(model, policy, gpu_device=subject.device.index or 0, async_transfers=ahead)
        try:
            yield model
        finally:
            attached.detach()
            model.config._experts_implementation = before
            for path in subject.layouts:
                for place in (path, path.rpartition(".")[0]):
                    left = vars(model.get_submodule(place))
                    for name in ("forward", "_moe_policylang_ctx"):
                        left.pop(name, None)


@contextlib.contextmanager
def _dense_on_device(subject: InMemory) -> Iterator[None]:
    """Move all but the experts to the device, and back."""
    experts: list[nn.Parameter] = [
        parameter for path in subject.layouts for parameter in subject.model.get_submodule(path).parameters()
    ]
    move_dense(subject.model, subject.device, experts)
    try:
        yield
    finally:
        move_dense(subject.model, torch.device("cpu"), experts)


WAYS: dict[str, Callable[..., AbstractContextManager[Any]]] = {
    OURS: ours,
    LRU: lambda subject, share: ours(subject, share, ablation="lru"),
    ACCELERATE: accelerate,
    POLICYLANG: lambda subject, share: policylang(subject, share, ahead=False),
    POLICYLANG_AHEAD: lambda subject, share: policylang(subject, share, ahead=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What a run took: seconds per token; the most bytes on the device; the tokens it would have gone on with."""

    seconds: float
    peak: int
    greedy: Tensor


def decode(
    way: AbstractContextManager[Any], ids: Sequence[Sequence[int]], warm_up: int, device: torch.device
) -> Decoded:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with way as model:
        decoder, tokens = Decoder(model, ids), len(ids[0]) - warm_up
        decoder.step(warm_up)
        settle(device)
        began = time.perf_counter()
        decoder.step(tokens)
        settle(device)
        seconds = (time.perf_counter() - began) / tokens
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        return Decoded(seconds=seconds, peak=peak, greedy=torch.cat(decoder.greedy).cpu())


def case_of(share: float) -> str:
    return f"decode, {share:.1%} in slots, beside others"


def measure(subject: InMemory, results: record.Results, share: float, length: Length) -> None:
    """Let all take turns over the same texts; what cannot run here is a row that says why."""
    case = case_of(share)
    if results.has(case):
        return
    results.begin()
    with subject.opened({"slots": 1.0}) as model:
        wanted = []
        for ids in texts(length):
            decoder = Decoder(model, ids)
            decoder.step(len(ids[0]))
            wanted.append(torch.cat(decoder.greedy).cpu())
    runs: dict[str, list[Decoded]] = {}
    rows = []
    for name, way in WAYS.items():
        try:
            # Not counted: what is compiled and tuned on first use.
            decode(way(subject, share), texts(length)[0][:1], length.warm_up, subject.device)
        # Whatever another library does here, the rest can be measured.
        except Exception as error:
            text = str(error) if isinstance(error, CannotRun) else repr(error)
            rows.append(record.row(case, name, "cannot run", "", [0.0], note=" ".join(text.split())[:300]))
        else:
            runs[name] = []

    def run(name: str) -> float:
        ids = texts(length)[len(runs[name])]
        runs[name].append(decode(WAYS[name](subject, share), ids, length.warm_up, subject.device))
        return runs[name][-1].seconds

    take_turns({name: lambda name=name: run(name) for name in runs}, length.repeats)  # type: ignore[misc]
    for name, found in runs.items():
        same = [float((r.greedy == want).float().mean()) for r, want in zip(found, wanted, strict=True)]
        rows += [
            record.row(case, name, "time", "ms/token", [r.seconds * 1e3 for r in found], better="lower"),
            record.row(case, name, "tokens as resident", "share", same, target=1.0 if name in (OURS, LRU) else None),
            record.row(case, name, "most memory", "GB", [r.peak / 1e9 for r in found], better="lower"),
        ]
        if name != OURS:
            faster = ratios([r.seconds for r in found], [r.seconds for r in runs[OURS]])
            rows.append(record.row(case, f"{OURS} / {name}", "speed", "x", faster))
    results.write(rows)
