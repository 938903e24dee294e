"""`promoe-triton trace`: record what a model's MoE layers see and choose on text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import typer

import promoe_triton
from promoe_triton._version import __version__
from promoe_triton.cli.generation import TRUST, check_dtype, load_tokenizer, parse_slots
from promoe_triton.cli.output import print_json, print_pairs, steps_progress
from promoe_triton.config import format_size
from promoe_triton.traces import TraceWriter, read_trace
from promoe_triton.tracing import Tracer


def trace(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder or a hub id.")],
    text: Annotated[list[Path], typer.Option("--text", "-t", help="A text file; may be repeated.")],
    out: Annotated[Path, typer.Option("--out", "-o", file_okay=False, help="The folder to write to, or to go on in.")],
    length: Annotated[int, typer.Option(min=2, help="Longer texts are cut into documents of so many tokens.")] = 512,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each document that count as its prompt.")] = 32,
    piece: Annotated[int, typer.Option(min=1, help="Tokens per pass after that; 1: exactly as decoding does.")] = 256,
    documents: Annotated[int | None, typer.Option(min=1, help="At most so many.", show_default="all")] = None,
    states: Annotated[bool, typer.Option(help="Record hidden states too, as training needs them.")] = True,
    slots: Annotated[str | None, typer.Option(help="Experts in memory.", show_default="what fits")] = None,
    device: Annotated[str, typer.Option(help="Where the slots are: auto, cuda, cpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, bfloat16, float16 or float32.")] = "auto",
    trust: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Record the routing of a model on text: for each token and MoE layer its experts, and what their router saw.

    Interrupted and run again, it goes on after the last complete shard.
    """
    check_dtype(dtype)
    slots_wanted = parse_slots(slots)
    texts = [{"name": file.name, "sha256": _digest(file)} for file in text]
    cut = islice(_documents(load_tokenizer(model, trust), text, length), documents)
    first = next(cut, None)
    if first is None:
        raise ValueError("the texts hold no document of two tokens or more")
    patched = promoe_triton.from_pretrained(
        model, slots=slots_wanted, device=device, dtype=dtype, trust_remote_code=trust
    )
    tracer = Tracer(patched, states)
    about = {
        "model": model,
        "revision": getattr(patched.config, "_commit_hash", None),
        "architecture": type(patched).__name__,
        "dtype": str(patched.dtype).removeprefix("torch."),
        "gates": tracer.gates,
        "texts": texts,
        "recording": {"length": length, "prompt": prompt, "piece": piece, "states": states},
        "versions": {"promoe_triton": __version__, **{name: version(name) for name in ("torch", "transformers")}},
    }
    with tracer, steps_progress("Recording", documents) as step:
        writer = TraceWriter(out, about, tracer.layers, _shard_tokens(tracer, patched, states))
        for number, (ids, of) in enumerate(chain([first], cut)):
            if number >= writer.documents:
                writer.add(tracer.document(ids, prompt, piece), of)
            step(f"{len(ids)} tokens")
        writer.flush()
    done = read_trace(out)
    size = sum((out / shard.file).stat().st_size for shard in done.shards)
    if as_json:
        print_json({**about, "documents": done.documents, "tokens": done.tokens, "bytes": size})
        return
    rows = [
        ("documents", f"{done.documents}, with {done.tokens} tokens"),
        ("MoE layers", f"{len(done.layers)}"),
        ("on disk", f"{format_size(size)} in {len(done.shards)} shards in {out}"),
    ]
    print_pairs(rows, title=f"Trace of {model}")


SHARD_BYTES = 256 * 2**20
"""About how large a shard becomes; as much is in memory while it is recorded, twice while it is written."""


def _shard_tokens(tracer: Tracer, model: Any, states: bool) -> int:
    per_token = 0
    for layer in tracer.layers:
        per_token += layer.active * 6 + (2 * layer.hidden * model.dtype.itemsize if states else 0)
    return max(SHARD_BYTES // per_token, 1)


BLOCK = 2**20
"""About so many characters of a text are in memory as tokens at a time."""


def _digest(file: Path) -> str:
    """Return the hash of a file. Raises ValueError where it is no text, to its end."""
    for _ in _blocks(file):
        pass
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _blocks(file: Path) -> Iterator[str]:
    """Yield a text in blocks that end with a line. Raises ValueError where it is none."""
    try:
        with file.open(encoding="utf-8") as opened:
            for part in iter(partial(opened.read, BLOCK), ""):
                yield part + opened.readline()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def _documents(tokenizer: Any, texts: Sequence[Path], length: int) -> Iterator[tuple[list[int], int]]:
    """Yield documents of at most so many tokens, and of which text each is; a rest of a single token is left out."""
    for number, file in enumerate(texts):
        ids: list[int] = []
        for place, part in enumerate(_blocks(file)):
            ids += tokenizer(part, verbose=False, add_special_tokens=not place)["input_ids"]
            whole = (len(ids) - 1) // length * length
            for begin in range(0, whole, length):
                yield ids[begin : begin + length], number
            del ids[:whole]
        if len(ids) > 1:
            yield ids, number
