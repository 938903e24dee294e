"""One process that loads a checkpoint in one way, decodes greedily, and says what that took.

Reads a request as JSON from standard input, writes the answer as the last line of standard output. Started by
the benchmarks that compare processes; not for use by hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

OURS, ON_DISK, AUTO, STOCK = "promoe_triton", "accelerate, experts on disk", "accelerate, auto", "transformers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to load and to generate.

    variant: OURS; ON_DISK: accelerate with the experts on disk and all else in RAM; AUTO: accelerate's own
        placement with `slot_bytes` of RAM for weights; STOCK: everything in RAM.
    slots: experts in RAM, for OURS. group: memory control group to join before anything is imported.
    prompts: token ids; each is generated from for itself, `new_tokens` each.
    """

    variant: str
    folder: str
    prompts: Sequence[Sequence[int]]
    new_tokens: int
    slots: int = 0
    slot_bytes: int = 0
    group: str | None = None
    offload_folder: str | None = None
    cores: int = 2


@dataclass(slots=True, kw_only=True)
class Answer:
    """What it took. Anonymous memory in bytes; prefill and step times in seconds; disk_bytes: while decoding."""

    tokens: list[list[int]] = field(default_factory=list)
    prefill_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    load_seconds: float = 0.0
    disk_bytes: int = 0
    anon_imported: int = 0
    anon_loading: int = 0
    anon_generating: int = 0
    stats: dict[str, Any] = field(default_factory=dict)


class Failed(Exception):
    """The process ended without an answer; the message has its last words."""


def ask(request: Request, timeout: float = 3600.0) -> Answer:
    """Run a request in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve())]
    done = subprocess.run(
        command, input=json.dumps(asdict(request)), capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode:
        words = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise Failed(f"{request.variant} ended with code {done.returncode}: {words or 'no message'}")
    return Answer(**json.loads(done.stdout.splitlines()[-1]))


class PeakAnonymous:
    """The most anonymous memory this process had inside the block, looked at every `period` seconds."""

    def __init__(self, period: float) -> None:
        self._period = period
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak = 0

    def _watch(self) -> None:
        while not self._over.wait(self._period):
            self.peak = max(self.peak, anonymous())

    def __enter__(self) -> PeakAnonymous:
        self.peak = anonymous()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous())


def anonymous() -> int:
    """Return this process's resident anonymous memory in bytes."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def disk_bytes() -> int:
    """Return the bytes this process has had read from disk, page faults included."""
    with open("/proc/self/io") as io:
        return int(next(line for line in io if line.startswith("read_bytes:")).split()[1])


def load(request: Request) -> Any:
    import promoe_triton

    if request.variant == OURS:
        return promoe_triton.from_pretrained(request.folder, slots=request.slots)
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": "auto"}
    if request.variant == ON_DISK:
        layers = range(AutoConfig.from_pretrained(request.folder).num_hidden_layers)
        dense = ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate")
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        places |= {f"model.layers.{i}.{name}": "cpu" for i in layers for name in dense}
        places |= {f"model.layers.{i}.mlp.experts": "disk" for i in layers}
        options |= {"device_map": places, "offload_folder": request.offload_folder}
    elif request.variant == AUTO:
        limits = {"cpu": request.slot_bytes}
        options |= {"device_map": "auto", "max_memory": limits, "offload_folder": request.offload_folder}
    return AutoModelForCausalLM.from_pretrained(request.folder, **options).eval()


def generate(model: Any, request: Request, answer: Answer) -> None:
    import torch

    before = disk_bytes()
    for prompt in request.prompts:
        began = time.perf_counter()
        out = model(torch.tensor([list(prompt)]), use_cache=True)
        answer.prefill_seconds.append(time.perf_counter() - began)
        cache, tokens = out.past_key_values, [int(out.logits[0, -1].argmax())]
        for _ in range(request.new_tokens):
            began = time.perf_counter()
            out = model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
            answer.step_seconds.append(time.perf_counter() - began)
        answer.tokens.append(tokens)
    answer.disk_bytes = disk_bytes() - before


def main() -> None:
    request = Request(**json.load(sys.stdin))
    if request.group is not None:
        import memory_group

        memory_group.join(Path(request.group))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-request.cores :])

    import torch

    import promoe_triton

    torch.set_num_threads(request.cores)
    answer = Answer(anon_imported=anonymous())
    began = time.perf_counter()
    with PeakAnonymous(period=0.002) as watch:
        model = load(request)
    answer.load_seconds, answer.anon_loading = time.perf_counter() - began, watch.peak
    with torch.inference_mode(), PeakAnonymous(period=0.05) as watch:
        generate(model, request, answer)
    answer.anon_generating = watch.peak
    if request.variant == OURS:
        answer.stats = promoe_triton.stats(model).as_dict()
    print(json.dumps(asdict(answer)))


if __name__ == "__main__":
    main()
