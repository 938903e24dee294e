"""`promoe-triton inspect`: what a model's experts take, and what a number of slots buys. Loads no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from promoe_triton.cli.generation import TRUST, check_dtype
from promoe_triton.cli.needs import Needs, measure_bandwidth, model_needs
from promoe_triton.cli.output import print_json, print_note, print_pairs, print_table, working
from promoe_triton.config import Config, format_size


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder, a config.json, or a hub id.")],
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, bfloat16, float16 or float32.")] = "auto",
    bandwidth: Annotated[
        str | None, typer.Option(help="Say how long a token's reads take at this many bytes per second (1.5GB/s).")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="The same at what this checkpoint's disk gives, measured for two seconds.")
    ] = False,
    trust: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show a model's experts, their sizes, and the memory that slots take. Works without any weights."""
    check_dtype(dtype)
    if bandwidth and measure:
        raise ValueError("the bandwidth is given with --bandwidth or measured with --measure, not both")
    limit = Config(bandwidth=bandwidth).limit
    with working(f"Looking at {model}"):
        needs = model_needs(model, dtype, trust)
        rate = measure_bandwidth(model) if measure else limit
    if as_json:
        print_json({**needs.as_dict(), "bandwidth": rate})
        return
    print_pairs(_rows(needs), title=f"{needs.architecture} ({Path(model).name or model})")
    print_table(
        ["slots", "experts", "memory of slots", "in all", "fits", "read per token", *(["takes"] if rate else [])],
        [
            [
                f"{choice.share:.1%}".replace(".0%", "%"),
                f"{choice.slots}",
                format_size(choice.slot_bytes),
                format_size(choice.memory_bytes),
                "yes" if choice.fits else "no",
                "?" if choice.token_bytes is None else format_size(choice.token_bytes),
                *([_duration(choice.token_bytes, rate)] if rate else []),
            ]
            for choice in needs.choices
        ],
        title="What slots buy",
    )
    note = "Reads per token: while decoding, at the hit ratios of LRU on the demo model. fits: in what is free now."
    if rate:
        note += f" takes: that at {format_size(rate)}/s; computing comes on top, as far as it is not hidden."
    print_note(note)


def _duration(nbytes: int | None, rate: float) -> str:
    return "?" if nbytes is None else f"{nbytes / rate * 1e3:.3g} ms"


def _rows(needs: Needs) -> list[tuple[str, str]]:
    each = sorted(set(needs.expert_bytes))
    return [
        ("MoE layers", f"{needs.layers}"),
        ("experts", f"{_span(needs.experts)} per layer, {sum(needs.experts)} in all"),
        ("experts per token", "not named by the configuration" if needs.top_k is None else f"{needs.top_k}"),
        ("weights", needs.dtype),
        ("one expert", " to ".join(dict.fromkeys(format_size(n) for n in (each[0], each[-1])))),
        ("all experts", format_size(needs.all_expert_bytes)),
        ("dense part", format_size(needs.dense_bytes)),
        ("longest context", f"{format_size(needs.context_bytes)} for its KV cache and activations"),
        ("free memory", format_size(needs.free_bytes)),
        ("experts rest in", needs.store),
    ]


def _span(numbers: tuple[int, ...]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"
