"""Train the demo model: a small Qwen3-MoE language model of the CPython documentation.

To retrain (about 23 MB of bf16 weights; two CPU threads; no accelerator is needed)::

    apt-get install python3.11-doc                 # the documentation sources, PSF licence
    nice -n 5 python bench/model/train.py --minutes 60
    python bench/model/card.py                     # measures the result, writes the model card

``train.py`` reads the reStructuredText sources of the documentation and the sources of Python's standard
library, trains a byte-level BPE tokenizer and the model, and writes the checkpoint in the format of
transformers (``AutoModelForCausalLM.from_pretrained`` loads it) plus the record of the run.  The learning
rate follows the wall clock, so a run always ends at ``--minutes`` with the rate decayed; the number of steps
thus depends on the machine.  A checkpoint is kept every ten minutes below ``--work``; after an interruption
``--export-only`` writes the model from the last one.

Documents are split by the hash of their relative path; one in twenty is held out and never trained on (nor
seen by the tokenizer).  Held-out documentation goes to ``promoe_triton/demo/heldout.txt``.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import platform
import re
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from fast_experts import register_fast_experts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeConfig

ROOT = Path(__file__).resolve().parents[2]
EOS = "<|endoftext|>"
HELD_OUT_ONE_IN = 20
HELD_OUT_BYTES = 200_000  # upper limit of the packaged held-out text
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__", "pydoc_data", "encodings"}


@dataclass(frozen=True)
class Document:
    """One text: its source (``docs`` or ``code``), its relative path, whether it is held out."""

    source: str
    path: str
    text: str
    held_out: bool


def plain_rst(text: str) -> str:
    """Documentation source with less markup: roles become literals, labels and index entries go."""
    text = re.sub(
        r"^( *)\.\. (?:index|_[^:\n]+|sectionauthor|moduleauthor|highlight|testsetup)::?[^\n]*\n"
        r"(?:\1 +[^\n]*\n)*\n?",
        "",
        text,
        flags=re.M,
    )
    text = re.sub(r":(?:[a-z]+:)?[a-z-]+:`[!~]?([^`<]+?)(?:\s*<[^`>]*>)?`", r"``\1``", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip() + "\n"


def is_held_out(path: str) -> bool:
    """Whether the document at this relative path belongs to the held-out twentieth."""
    return int(hashlib.sha256(path.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def read_documents(docs: Path, stdlib: Path) -> list[Document]:
    """All documents of both folders, sorted by path."""
    found: list[Document] = []
    for path in sorted(docs.rglob("*.rst.txt")):
        name = path.relative_to(docs).as_posix()
        found.append(Document("docs", name, plain_rst(path.read_text(errors="replace")), is_held_out(name)))
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib).as_posix()
        if SKIPPED_FOLDERS.isdisjoint(Path(name).parts) and not path.name.startswith("_sysconfigdata"):
            found.append(Document("code", name, path.read_text(errors="replace"), is_held_out(name)))
    return found


def manifest(documents: list[Document]) -> dict[str, dict[str, int | str]]:
    """Files, bytes and SHA-256 of the concatenated text, per source and split."""
    out: dict[str, dict[str, int | str]] = {}
    for source in ("docs", "code"):
        for held_out in (False, True):
            data = [d.text.encode() for d in documents if d.source == source and d.held_out == held_out]
            joined = b"".join(data)
            out[f"{source} {'held out' if held_out else 'trained'}"] = {
                "files": len(data),
                "bytes": len(joined),
                "sha256": hashlib.sha256(joined).hexdigest(),
            }
    return out


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers saves and loads it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: every text round-trips; token 0 separates documents and ends generation."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


COMMON: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "rope_theta": 10_000.0,
    "initializer_range": 0.04,
    "router_aux_loss_coef": 0.01,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
"""What the architectures have in common."""


def olmoe_config(vocab_size: int) -> OlmoeConfig:
    """Another architecture to try predictors on: routing weights are not normalised, attention has no groups."""
    return OlmoeConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        num_hidden_layers=10,
        intermediate_size=48,
        num_attention_heads=3,
        num_key_value_heads=3,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        **COMMON,
    )


def demo_config(vocab_size: int) -> Qwen3MoeConfig:
    """The architecture of the demo model."""
    return Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=8,
        intermediate_size=192,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        **COMMON,
    )


CONFIGS = {"demo": demo_config, "olmoe": olmoe_config}


def encode_stream(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> Tensor:
    """Documents joined by the separator token -> int64[tokens]."""
    ids: list[int] = [0]
    for encoded in tokenizer([d.text for d in documents], verbose=False)["input_ids"]:
        ids += encoded
        ids.append(0)
    return torch.tensor(ids)


def windows(stream: Tensor, length: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless int64[length + 1] windows; every pass cuts at a fresh offset and shuffles."""
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        count = (len(stream) - 1 - offset) // length
        for i in torch.randperm(count, generator=generator).tolist():
            yield stream[offset + i * length : offset + (i + 1) * length + 1]


class Routing:
    """Collects each layer's router logits fp32[tokens, experts] and choices int64[tokens, top_k]."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda _m, _i, out: self.seen.append((out[0], out[2])))

    def balance_loss(self) -> Tensor:
        """Switch-style load balancing per layer, then the mean: 1 when every layer is balanced. Empties."""
        losses = []
        for logits, chosen in self.seen:
            experts = logits.shape[-1]
            share = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
            losses.append(experts * (share * logits.softmax(-1).mean(0)).sum())
        self.seen.clear()
        return torch.stack(losses).mean()


def next_token_loss(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Mean cross entropy (nats per token) of int64[rows, length + 1]."""
    hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden).flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, routing: Routing, stream: Tensor, length: int) -> float:
    """Nats per token on 32 windows spread evenly over the held-out documentation."""
    starts = torch.linspace(0, len(stream) - length - 1, 32).long().tolist()
    batch = torch.stack([stream[i : i + length + 1] for i in starts])
    loss = sum(float(next_token_loss(model, part)) for part in torch.split(batch, 8)) / 4
    routing.seen.clear()
    return loss


def learning_rate(progress: float, step: int, peak: float, warmup_steps: int = 100) -> float:
    """Linear warm-up over steps, then a cosine over progress (0..1) down to 1 % of the peak."""
    return (
        peak * min(1.0, (step + 1) / warmup_steps) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
    )


def cpu_model() -> str:
    """The processor's name as the kernel tells it."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return match[1] if match else platform.processor()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model (see the top of this file).")
    parser.add_argument("--architecture", choices=CONFIGS, default="demo", help="another needs its own --out and so on")
    parser.add_argument("--docs", type=Path, default=Path("/usr/share/doc/python3.11/html/_sources"))
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--out", type=Path, default=ROOT / "promoe_triton/demo/model")
    parser.add_argument("--heldout", type=Path, default=ROOT / "promoe_triton/demo/heldout.txt")
    parser.add_argument("--record", type=Path, default=ROOT / "bench/results/model/train.json")
    parser.add_argument("--work", type=Path, default=ROOT / "build/model-run", help="checkpoints")
    parser.add_argument("--minutes", type=float, default=60.0, help="wall-clock budget of the training")
    parser.add_argument("--docs-share", type=float, default=0.8, help="share of windows from documentation")
    parser.add_argument("--step-tokens", type=int, default=2048, help="tokens per step")
    parser.add_argument(
        "--length",
        type=int,
        default=512,
        help="tokens per window in the last fifth of the time; half as many before, where attention costs less",
    )
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export-only", action="store_true", help="export the last checkpoint, no training")
    return parser.parse_args()


def keep_memory() -> None:
    """Tell glibc to reuse large blocks: fresh pages for every activation cost more than the arithmetic."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mmap for large blocks
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep freed memory


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the bf16 checkpoint and the tokenizer for stock transformers."""
    model.to(torch.bfloat16).eval().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner only
    tokenizer.save_pretrained(out)


def held_out_text(documents: list[Document]) -> str:
    """Whole held-out documents, in the order of their hashes, as many as fit the limit."""
    chosen, size = [], 0
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.path.encode()).digest()):
        length = len(document.text.encode()) + 1
        if size + length <= HELD_OUT_BYTES:
            chosen.append(document.text)
            size += length
    return "\n".join(chosen)


def train(
    args: argparse.Namespace,
    model: PreTrainedModel,
    record: dict[str, Any],
    streams: dict[str, Tensor],
    held_out: Tensor,
    checkpoint: Path,
) -> None:
    """Train for ``args.minutes``; the log goes to ``record["log"]``, checkpoints to ``checkpoint``."""
    routing = Routing(model)
    generator = torch.Generator().manual_seed(args.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    lengths = (args.length // 2, args.length)
    feeds = {(s, n): windows(stream, n, generator) for s, stream in streams.items() for n in lengths}
    start = saved = time.monotonic()
    sums, since = torch.zeros(2), 0
    step = 0
    while (progress := (time.monotonic() - start) / (args.minutes * 60)) < 1:
        lr = learning_rate(progress, step, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        length = lengths[progress > 0.8]
        from_docs = torch.rand(args.step_tokens // length, generator=generator) < args.docs_share
        batch = torch.stack([next(feeds["docs" if d else "code", length]) for d in from_docs.tolist()])
        loss = next_token_loss(model, batch)
        balance = routing.balance_loss()
        (loss + args.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        step, since = step + 1, since + 1
        sums += torch.stack([loss.detach(), balance.detach()])
        if step % 20 == 0:
            row = {
                "step": step,
                "tokens": step * args.step_tokens,
                "minutes": (time.monotonic() - start) / 60,
                "loss": sums[0].item() / since,
                "balance": sums[1].item() / since,
                "lr": lr,
            }
            sums, since = torch.zeros(2), 0
            if step % 200 == 0:
                row["held_out_loss"] = held_out_loss(model, routing, held_out, args.length)
            record["log"].append(row)
            print(json.dumps({k: round(v, 5) for k, v in row.items()}), flush=True)
        record |= {"steps": step, "minutes": (time.monotonic() - start) / 60, "trained_tokens": step * args.step_tokens}
        if time.monotonic() - saved > 600:
            saved = time.monotonic()
            save_checkpoint(model, record, checkpoint)
    record["final_held_out_loss_fp32"] = held_out_loss(model, routing, held_out, args.length)
    save_checkpoint(model, record, checkpoint)


def documentation_version(docs: Path) -> str:
    """The version that the built documentation states beside its sources."""
    match = re.search(r"VERSION: '([^']+)'", (docs.parent / "_static/documentation_options.js").read_text())
    return match[1] if match else "unknown"


def licence_text(docs: Path) -> str:
    """The PSF licence agreement, from the documentation's licence chapter."""
    chapter = (docs / "license.rst.txt").read_text()
    match = re.search(r"PSF LICENSE AGREEMENT FOR PYTHON.*?(?=\nBEOPEN)", chapter, flags=re.S)
    if match is None:
        raise ValueError(f"no PSF licence agreement in the licence chapter below {docs}")
    text = match[0].replace("|release|", documentation_version(docs)).replace(".. parsed-literal::\n\n", "")
    return text.strip() + "\n"


def save_checkpoint(model: PreTrainedModel, record: dict[str, Any], path: Path) -> None:
    """Weights and record in one file, replaced atomically."""
    torch.save({"model": model.state_dict(), "record": json.dumps(record)}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def main() -> None:
    args = parse_args()
    keep_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint = args.work / "checkpoint.pt"

    documents = read_documents(args.docs, args.stdlib)
    trained = [d for d in documents if not d.held_out]
    held_out_docs = [d for d in documents if d.source == "docs" and d.held_out]
    config = CONFIGS[args.architecture](args.vocab)
    config._experts_implementation = register_fast_experts()
    model = AutoModelForCausalLM.from_config(config).train()
    if args.export_only:
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        record = json.loads(state["record"])
        tokenizer = wrapped(Tokenizer.from_file(str(args.work / "tokenizer.json")))
        if record["manifest"] != manifest(documents):
            raise ValueError("the checkpoint was trained on other texts than --docs and --stdlib hold")
    else:
        bpe = train_tokenizer((d.text for d in trained), args.vocab)
        bpe.save(str(args.work / "tokenizer.json"))
        tokenizer = wrapped(bpe)
        streams = {s: encode_stream(tokenizer, [d for d in trained if d.source == s]) for s in ("docs", "code")}
        record = {
            "manifest": manifest(documents),
            "tokens": {s: len(stream) for s, stream in streams.items()},
            "options": {k: v for k, v in vars(args).items() if isinstance(v, int | float)},
            "machine": {
                "cpu": cpu_model(),
                "threads": args.threads,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "log": [],
        }
        print(json.dumps(record, indent=1), flush=True)
        train(args, model, record, streams, encode_stream(tokenizer, held_out_docs), checkpoint)
    record["held_out_one_in"] = HELD_OUT_ONE_IN
    record["versions"] = {
        "documentation": documentation_version(args.docs),
        "standard library": platform.python_version(),
    }
    export(model, tokenizer, args.out)
    for path, text in (
        (args.heldout, held_out_text(held_out_docs)),
        (args.out / "LICENSE-PSF.txt", licence_text(args.docs)),
        (args.record, json.dumps(record, indent=1) + "\n"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
