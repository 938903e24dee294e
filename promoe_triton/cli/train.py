"""`promoe-triton train`: fit a learned predictor to a trace."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer

from promoe_triton.cli.generation import TRUST, load_routers
from promoe_triton.cli.output import print_json, print_note, print_table, steps_progress
from promoe_triton.config import LEARNED, format_size
from promoe_triton.predictors.gates import read_gates
from promoe_triton.predictors.learned import save_heads
from promoe_triton.traces import read_trace
from promoe_triton.tracing import experts_of
from promoe_triton.training import Recipe, check_trace, sources, split, train

RECIPE = Recipe()


def train_command(
    traces: Annotated[Path, typer.Argument(metavar="TRACES", help="A folder that `promoe-triton trace` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", dir_okay=False, help="The predictor to write.")],
    model: Annotated[
        str | None, typer.Option(help="The model that was traced.", show_default="the name in the trace")
    ] = None,
    distance: Annotated[int, typer.Option(min=1, help="How many layers ahead.")] = RECIPE.distance,
    network: Annotated[bool, typer.Option("--network", help="The paper's plain network, to compare with.")] = False,
    width: Annotated[int, typer.Option(min=1, help="Hidden units; the paper's network has 1024.")] = RECIPE.width,
    epochs: Annotated[int, typer.Option(min=1, help="At most so many.")] = RECIPE.epochs,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split and of the start.")] = RECIPE.seed,
    trust: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Train a predictor of later layers' experts: a correction to their own gates, from recorded states.

    A tenth of the documents, whole texts if there are several, is held out, and says when to end. Use the file with
    patch(model, predictor=FILE).
    """
    if out.suffix != LEARNED:
        raise ValueError(f"--out: a predictor's file must end in {LEARNED}, got {out}")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {out.parent} to write a predictor to")
    trace = read_trace(traces)
    recipe = Recipe(network=network, distance=distance, width=width, epochs=epochs, seed=seed)
    patched = load_routers(model, trace, trust)
    gates = read_gates(patched, experts_of(patched))
    check_trace(trace, gates)
    began = time.monotonic()
    with steps_progress("Training", len(sources(gates, distance))) as step:
        heads, scores = train(trace, gates, recipe, step)
    report = {
        "trace": dict(trace.about),
        "recipe": asdict(recipe),
        "held_out": sorted(split([document.text for document in trace.read()], recipe)),
        "seconds": round(time.monotonic() - began),
        "scores": [asdict(score) for score in scores],
    }
    save_heads(out, heads, gates, report)
    if as_json:
        print_json(report)
        return
    rows = defaultdict(list)
    for score in scores:
        rows[score.seam, score.ahead].append(score)
    print_table(
        ["predicted from", "layers ahead", "the gate alone", "learned"],
        [
            [seam.lower(), f"{ahead}", f"{mean(s.gate for s in of):.1%}", f"{mean(s.learned for s in of):.1%}"]
            for (seam, ahead), of in sorted(rows.items())
        ],
        title=f"Predicted experts that were then chosen, on held-out documents ({format_size(out.stat().st_size)})",
    )
    print_note(
        "entered: before the first layer's attention; routed: from a router's input; left: of the next token. The same "
        "documents said when to end: promoe-triton evaluate, on others, tells more."
    )
