"""`promoe-triton demo`: the packaged model from disk through a few slots, checked against stock transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from transformers.utils import logging as transformers_logging

import promoe_triton
from promoe_triton.cli.generation import Generated, Sampling, check_text, encode, load_tokenizer, parse_slots, run
from promoe_triton.cli.output import bytes_progress, print_json, print_pairs, working
from promoe_triton.config import Config, format_size
from promoe_triton.demo import MODEL, PREDICTOR
from promoe_triton.demo.cache import cache_folder, inflated, machine_memory
from promoe_triton.demo.comparison import StockRun, stock_run
from promoe_triton.demo.inflate import expert_bytes_for
from promoe_triton.errors import PromoeError

PROMPT = "The following example shows how to"
EXPERT_MB = 9.4
LARGEST = 1e18
"""Bytes that no disk has: more than that is refused like that, for its size and not for its digits."""


def demo(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")] = PROMPT,
    slots: Annotated[
        str, typer.Option(help="Experts in memory: a count (64), a share (0.25, 25%) or a size (1GiB).")
    ] = "0.25",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    temperature: Annotated[
        float | None, typer.Option(help="Sample at this temperature, without a comparison; 0 is greedy.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    io: Annotated[str, typer.Option(help="How experts are read: auto, buffered or direct.")] = "auto",
    large: Annotated[bool, typer.Option("--large", help="The same model with experts of several megabytes.")] = False,
    expert_mb: Annotated[
        float | None, typer.Option(help="With --large: megabytes of one expert.", show_default=f"{EXPERT_MB}")
    ] = None,
    gigabytes: Annotated[float | None, typer.Option(help="With --large: gigabytes of all experts.")] = None,
    times_ram: Annotated[
        float | None, typer.Option(help="With --large: all experts as a multiple of this machine's RAM, such as 1.25.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="With --large: where to keep the checkpoint.", show_default="the cache folder"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    model: Annotated[
        Path, typer.Option(hidden=True, help="Another checkpoint in the place of the packaged one.")
    ] = MODEL,
) -> None:
    """Run a small trained model from disk through slots for a quarter of its experts.

    Its greedy tokens are compared with those of stock transformers, which runs in a second process.
    """
    predictor = PREDICTOR if model == MODEL else "auto"
    config = Config(slots=parse_slots(slots), device="cpu", io=io, predictor=predictor)  # type: ignore[arg-type]  # Config checks io
    sampling = Sampling(temperature=temperature, seed=seed)
    check_text(prompt, "the prompt")
    if not prompt.strip():
        raise ValueError("the prompt is empty: give some text, or leave the argument out")
    if not (model / "config.json").exists():
        raise PromoeError(f"the demo model is missing: expected a checkpoint in {model}; install the package again")
    sizes = [size for size in (expert_mb, gigabytes, times_ram) if size is not None]
    if (sizes or folder) and not large:
        raise ValueError("--expert-mb, --gigabytes, --times-ram and --dir are options of the large demo: add --large")
    if len(sizes) > 1 or not all(0 < size < math.inf for size in sizes):
        raise ValueError("give one positive size: --expert-mb, --gigabytes or --times-ram")

    runs = model
    if large:
        runs = _inflated(model, folder or cache_folder(), _expert_bytes(model, expert_mb, gigabytes, times_ram))
    result = _run(runs, prompt, config, sampling, max_new_tokens, stream=not as_json)
    stock = None
    if sampling.greedy:
        with working("Checking the tokens against stock transformers in a second process"):
            stock = stock_run(model, prompt, max_new_tokens)
    difference = stock.difference(result.prompt_ids, result.ids) if stock else None
    if as_json:
        print_json({"model": str(runs), "prompt": prompt, **result.as_dict(), "stock": _as_dict(stock, difference)})
    else:
        print_pairs([*result.rows(), ("compared", _verdict(stock, difference, large))])
    if difference:
        raise PromoeError(f"the tokens differ from those of stock transformers: {difference}")


def _expert_bytes(model: Path, expert_mb: float | None, gigabytes: float | None, times_ram: float | None) -> int:
    if times_ram is not None:
        return expert_bytes_for(model, int(min(times_ram * machine_memory(), LARGEST)))
    if gigabytes is not None:
        return expert_bytes_for(model, int(min(gigabytes * 1e9, LARGEST)))
    return int(min((expert_mb or EXPERT_MB) * 1e6, LARGEST))


def _inflated(model: Path, folder: Path, expert_bytes: int) -> Path:
    with bytes_progress() as progress:
        task = progress.add_task("Writing the large model (once)", total=None, visible=False)

        def begin(nbytes: int) -> None:
            progress.console.print(f"Writing {format_size(nbytes)} to {folder}, once.", soft_wrap=True, highlight=False)
            progress.update(task, total=nbytes, visible=True)

        return inflated(
            model, folder, expert_bytes, on_begin=begin, on_progress=lambda nbytes: progress.advance(task, nbytes)
        )


def _run(
    folder: Path, prompt: str, config: Config, sampling: Sampling, max_new_tokens: int, *, stream: bool
) -> Generated:
    # One line says what happens; bars of their own would break it.
    transformers_logging.disable_progress_bar()
    with working("Loading the model and filling its slots"):
        tokenizer = load_tokenizer(str(folder))
        ids = encode(tokenizer, prompt, chat=False)
        model = promoe_triton.from_pretrained(str(folder), config)
    if stream:
        Console().print(Text(prompt, style="bold"), end="", soft_wrap=True)
    return run(model, tokenizer, ids, max_new_tokens=max_new_tokens, sampling=sampling, stream=stream)


def _verdict(stock: StockRun | None, difference: str | None, large: bool) -> str:
    if stock is None:
        return "with nothing: sampled tokens are not compared"
    if difference:
        return f"DIFFERENT TOKENS: {difference}"
    which = "the small model in stock" if large else "stock"
    return (
        f"same tokens: all {len(stock.ids)} equal those of {which} transformers {stock.transformers}, "
        "run in a second process"
    )


def _as_dict(stock: StockRun | None, difference: str | None) -> dict[str, Any] | None:
    if stock is None:
        return None
    versions = {"torch": stock.torch, "transformers": stock.transformers}
    return {"ids": list(stock.ids), "same_tokens": difference is None, "difference": difference, "versions": versions}
