"""`promoe-triton generate`: continue a prompt with any Mixture-of-Experts model."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

import promoe_triton
from promoe_triton.cli.generation import (
    TRUST,
    Sampling,
    check_dtype,
    encode,
    load_tokenizer,
    parse_slots,
    read_prompt,
    run,
)
from promoe_triton.cli.output import print_json, print_pairs
from promoe_triton.config import PREDICTORS, Config
from promoe_triton.policies import POLICIES


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder or a hub id.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text to continue.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", exists=True, dir_okay=False, help="A file with the text to continue."),
    ] = None,
    slots: Annotated[
        str | None,
        typer.Option(
            help="Experts in memory: a count (64), a share (0.25, 25%) or a size (12GiB).",
            show_default="what fits",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the slots are: auto (a GPU if there is one), cuda, cpu.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="Sample at this temperature; 0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens with this sum.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many of the likeliest tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.", show_default="another each time")] = None,
    io: Annotated[str, typer.Option(help="How experts are read: auto, buffered or direct.")] = "auto",
    policy: Annotated[str, typer.Option(help=f"Which expert leaves: auto, {', '.join(POLICIES)}.")] = "auto",
    predictor: Annotated[
        str, typer.Option(help=f"What says which experts to copy ahead: {', '.join(PREDICTORS)}, or a file.")
    ] = "auto",
    bandwidth: Annotated[
        str | None, typer.Option(help="Read no faster than this (1.5GB/s).", show_default="what the disk gives")
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Write a trace of computing, copying and waiting, for Perfetto or chrome://tracing.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, bfloat16, float16 or float32.")] = "auto",
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    trust: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Continue a prompt (from --prompt, --file or stdin). Greedy unless a sampling option is given.

    The text goes to stdout as it is generated, statistics go to stderr.
    """
    config = Config(
        slots=parse_slots(slots),
        device=device,
        io=io,  # type: ignore[arg-type]  # Config checks it
        policy=policy,
        predictor=predictor,
        bandwidth=bandwidth,
    )
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    check_dtype(dtype)
    if timeline is not None and not timeline.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {timeline.parent} to write a timeline to")
    text = read_prompt(prompt, file)
    tokenizer = load_tokenizer(model, trust)
    ids = encode(tokenizer, text, chat=chat)
    patched = promoe_triton.from_pretrained(model, config, dtype=dtype, trust_remote_code=trust)
    with promoe_triton.record_timeline(patched) if timeline else nullcontext() as spans:
        result = run(patched, tokenizer, ids, max_new_tokens=max_new_tokens, sampling=sampling, stream=not as_json)
    if timeline is not None and spans is not None:
        spans.save(timeline)
    if as_json:
        print_json({"model": model, "prompt": text, "greedy": sampling.greedy, **result.as_dict()})
    else:
        print_pairs(result.rows(), stderr=True)
