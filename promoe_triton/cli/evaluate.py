"""`promoe-triton evaluate`: how good predictors and replacement policies are on recorded text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from promoe_triton.cli.generation import TRUST, load_routers
from promoe_triton.cli.output import print_json, print_note, print_table, steps_progress, write_csv
from promoe_triton.config import LEARNED
from promoe_triton.evaluation import goodpred
from promoe_triton.evaluation.comparing import GATE, NONE, Question, compare, steps
from promoe_triton.evaluation.measures import ALL, Row
from promoe_triton.predictors.choice import make_predictor
from promoe_triton.predictors.gates import read_gates
from promoe_triton.predictors.learned import fingerprint
from promoe_triton.predictors.reach import Reach, RoutedLayers, find_layers
from promoe_triton.protocols import Predictor
from promoe_triton.traces import Trace, read_trace
from promoe_triton.tracing import experts_of

NAMED = ("random", "token", "history", "gate")


def evaluate(
    traces: Annotated[
        list[Path], typer.Argument(metavar="TRACE...", help="Folders of `promoe-triton trace`, with hidden states.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", dir_okay=False, help="The CSV to write.")],
    predictor: Annotated[
        list[Path] | None, typer.Option("--predictor", "-p", help="A file of `promoe-triton train`; may be repeated.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model that was traced.", show_default="the name in the first trace")
    ] = None,
    slots: Annotated[str, typer.Option(help="Shares of the experts in slots.")] = "0.125,0.25,0.375,0.5,0.75",
    distance: Annotated[int, typer.Option(min=1, help="How many layers ahead.")] = 4,
    link: Annotated[float, typer.Option(help="Experts that the link brings while one layer computes.")] = 3.0,
    documents: Annotated[int | None, typer.Option(min=3, help="Of each trace.", show_default="all")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw a figure as well (.png; needs matplotlib).")] = None,
    trust: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all rows as JSON instead of tables.")] = False,
) -> None:
    """Compare predictors on text that they were not trained on, and replacement policies with Belady's optimum.

    Each predictor is shown the trace as a decoding model shows it; a quarter of the documents warms tables and caches.
    """
    files = {file.stem: file for file in predictor or ()}
    if len(files) < len(predictor or ()) or files.keys() & {*NAMED}:
        raise ValueError("the files of --predictor need names of their own")
    for file in files.values():
        if file.suffix != LEARNED or not file.is_file():
            raise ValueError(f"--predictor: there is no predictor {file}")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {out.parent} to write to")
    if not link > 0:
        raise ValueError(f"--link must be positive, got {link}")
    opened = {trace.folder.resolve().name: trace for trace in map(read_trace, traces)}
    if len(opened) < len(traces):
        raise ValueError("the traces need folders with names of their own")
    first = next(iter(opened.values()))
    for trace in opened.values():
        trace.check_states()
        trace.check_model(first.about.get("gates"))
    question = _question(first, model, files, _shares(slots), distance, link, trust)
    rows: list[Row] = []
    with steps_progress("Evaluating", len(opened) * steps(question)) as step:
        for name, trace in opened.items():
            rows += compare(trace, name, question, documents, step)
    names = [field.name for field in fields(Row)]
    write_csv(out, names, (_cells(row, names) for row in rows))
    if figure is not None:
        from promoe_triton.evaluation.drawing import draw

        draw(rows, figure)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    for name in opened:
        _show(name, [row for row in rows if row.text == name], question)


def _question(
    trace: Trace,
    model: str | None,
    files: dict[str, Path],
    slots: Sequence[float],
    distance: int,
    link: float,
    trust: bool,
) -> Question:
    layers, make = predictors_for(trace, model, distance, trust)
    names = dict(zip(NAMED, NAMED, strict=True)) | {name: str(file) for name, file in files.items()}
    return Question(
        layers=layers,
        predictors={name: partial(make, what) for name, what in names.items()},
        trusted=next(iter(files), GATE),
        slots=slots,
        distance=distance,
        link=link,
    )


def predictors_for(
    trace: Trace, model: str | None, distance: int, trust: bool
) -> tuple[RoutedLayers, Callable[[str], Predictor]]:
    """Return the layers of the model that was traced, and what makes predictors for it, by name or file.

    model: its name (None: the one in the trace). Raises PromoeError where it is not the one that was traced.
    """
    patched = load_routers(model, trace, trust)
    experts = experts_of(patched)
    trace.check_model(fingerprint(read_gates(patched, experts)))
    layers = find_layers(patched, experts)
    reach = Reach(distance=distance, width=min(2 * max(layers.active), min(layers.experts)))

    def make(what: str) -> Predictor:
        made = make_predictor(what, patched, experts, reach)
        assert made is not None
        return made

    return layers, make


def _shares(text: str) -> list[float]:
    try:
        shares = [float(cell) for cell in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"--slots takes shares in (0, 1] with commas between them, got {text!r}")
    return shares


def _cells(row: Row, names: Sequence[str]) -> list[object]:
    return [f"{value:.5g}" if isinstance(value := getattr(row, name), float) else value for name in names]


def _show(name: str, rows: Sequence[Row], question: Question) -> None:
    A = max(question.layers.active)

    def value(**wanted: Any) -> str:
        found = [row.value for row in rows if all(getattr(row, key) == what for key, what in wanted.items())]
        return f"{found[-1]:.1%}" if found else "-"

    distances = range(1, question.distance + 1)
    places = [("entered", 0), *(("routed", d) for d in distances), ("left", 1)]
    predictors = [predictor for predictor in question.every if predictor != NONE]
    heads = [f"{seam} {ahead}" for seam, ahead in places]
    print_table(
        ["predictor", *heads],
        [
            [p, *(value(metric="accuracy", predictor=p, source=s, ahead=a, k=A, layer=ALL) for s, a in places)]
            for p in predictors
        ],
        title=f"{name}: share of the {A} experts named first that were chosen",
    )
    share = min(question.slots, key=lambda one: abs(one - 0.5))
    common = {"policy": "lru", "slots": share}
    misses = {"metric": "recall on misses", "layer": ALL, **common}
    print_table(
        ["predictor", *heads, *(f"GOODPRED {d}" for d in distances)],
        [
            [
                p,
                *(value(predictor=p, source=s, ahead=a, k=A, **misses) for s, a in places),
                *(value(metric="GOODPRED", predictor=p, ahead=d) for d in distances),
            ]
            for p in predictors
        ],
        title=f"{name}: share of the experts missed by an LRU cache of {share:.1%} that were named",
    )
    print_table(
        ["policy", *(f"{one:.1%}" for one in question.slots)],
        [
            [policy, *(value(metric="hit ratio", policy=policy, slots=one, layer=ALL) for one in question.slots)]
            for policy in question.policies
        ],
        title=f"{name}: hit ratio by share of the experts in slots, nothing copied ahead",
    )
    told = any(row.metric == "GOODPRED" for row in rows)
    print_note(
        "entered: before attention; routed: from a router's input; left: of the next token. The number: layers ahead. "
        + (
            f"GOODPRED: at one distance alone, half of the experts in slots, the link "
            f"brings {question.link:g} experts while a layer computes."
            if told
            else f"No GOODPRED: that takes two documents of more than {goodpred.PROMPT} tokens, beside those that fill "
            "the tables; record longer ones (promoe-triton trace --length)."
        )
    )
