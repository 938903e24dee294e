"""`promoe-triton inspect`: what a model's experts take, and what a number of slots buys. Loads no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from promoe_triton.cli.generation import check_dtype
from promoe_triton.cli.needs import Needs, model_needs
from promoe_triton.cli.output import print_json, print_pairs, print_table, working
from promoe_triton.config import format_size


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder, a config.json, or a hub id.")],
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, bfloat16, float16 or float32.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show a model's experts, their sizes, and the memory that slots take. Works without any weights."""
    check_dtype(dtype)
    with working(f"Looking at {model}"):
        needs = model_needs(model, dtype)
    if as_json:
        print_json(needs.as_dict())
        return
    print_pairs(_rows(needs), title=f"{needs.architecture} ({Path(model).name or model})")
    print_table(
        ["slots", "experts in memory", "memory of slots", "memory in all", "fits in what is free"],
        [
            [
                f"{choice.share:.1%}".replace(".0%", "%"),
                f"{choice.slots}",
                format_size(choice.slot_bytes),
                format_size(choice.memory_bytes),
                "yes" if choice.fits else "no",
            ]
            for choice in needs.choices
        ],
        title="What slots buy",
    )


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
