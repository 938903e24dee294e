"""`promoe-triton simulate`: how fast a model would be on hardware that need not be there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from promoe_triton.cli.evaluate import NAMED, predictors_for
from promoe_triton.cli.generation import TRUST
from promoe_triton.cli.output import print_json, print_note, print_table, steps_progress, working, write_csv
from promoe_triton.config import LEARNED, format_size
from promoe_triton.evaluation.goodpred import routed
from promoe_triton.evaluation.replay import replay
from promoe_triton.simulation.description import hardware_names, read_hardware, read_software
from promoe_triton.simulation.routing import Routed, Statistics
from promoe_triton.simulation.shapes import MODELS, model_shape
from promoe_triton.simulation.sweep import (
    PREDICTORS,
    Choice,
    Scene,
    check_fits,
    combinations,
    memory_needed,
    simulate,
    synthetic_texts,
    traced_texts,
)
from promoe_triton.techniques import ABLATION
from promoe_triton.traces import Trace, read_trace

SWEPT = "Several values, with commas between them, give a table of all combinations."


def simulate_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint folder, a config.json, a hub id, or a packaged name.")
    ],
    hardware: Annotated[str, typer.Option(help="A packaged machine, or a JSON file.")] = "rtx4090",
    software: Annotated[
        str, typer.Option(help="What computes: kernels, or loop (transformers' eager code).")
    ] = "kernels",
    slots: Annotated[str, typer.Option(help=f"Shares, counts or sizes of slots. {SWEPT}")] = "0.25,0.5,0.75",
    batch: Annotated[str, typer.Option(help="Texts side by side.")] = "1",
    prompt: Annotated[str, typer.Option(help="Tokens of a prompt.")] = "128",
    tokens: Annotated[int, typer.Option(help="Tokens decoded after each prompt.")] = 64,
    bits: Annotated[str, typer.Option(help="Bits per weight of a routed expert.")] = "16",
    predictor: Annotated[
        str,
        typer.Option(
            help=f"Of {', '.join(PREDICTORS)}; with --trace also {', '.join(NAMED)}, "
            "and files of `promoe-triton train`."
        ),
    ] = "stated",
    always: Annotated[
        bool, typer.Option("--always-predict", help="Predict in every decode pass, also where that is slower.")
    ] = False,
    chunking: Annotated[str, typer.Option(help="As in Config: adaptive, fixed, tensor, expert.")] = "adaptive",
    policy: Annotated[str, typer.Option(help="auto, lru, lfru, predicted or static.")] = "auto",
    ablation: Annotated[str, typer.Option(help=f"Steps: {', '.join(ABLATION)}.")] = "lru,all",
    distance: Annotated[str, typer.Option(help="Layers ahead that are predicted.")] = "2",
    popularity: Annotated[float, typer.Option(help="Share of choices that fall to a quarter of the experts.")] = 0.45,
    reuse: Annotated[float, typer.Option(help="Share of experts that a token has from the one before it.")] = 0.35,
    accuracy: Annotated[str, typer.Option(help="Share of right predictions at distance 1, 2, ...")] = "0.85,0.8,0.75",
    seed: Annotated[int, typer.Option(help="Of the routing that is made up.")] = 0,
    trace: Annotated[
        Path | None, typer.Option(help="A folder of `promoe-triton trace`: its routing, not made-up one.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write a CSV file as well.")] = None,
    trust: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Simulate a model on described hardware: TTFT, TPOT, stalls and bytes, without weights."""
    machine = read_hardware(hardware)
    with working(f"Looking at {model}"):
        packaged = MODELS / f"{model}.json"
        shape = model_shape(str(packaged) if packaged.exists() else model, trust=trust)
    choices = list(
        combinations(
            slots=[_slots(one) for one in _cells(slots)],
            batch=_numbers("batch", batch),
            prompt=_numbers("prompt", prompt),
            bits=_floats("bits", bits),
            predictor=_cells(predictor),
            chunking=_cells(chunking),
            policy=_cells(policy),
            distance=_numbers("distance", distance),
            ablation=_cells(ablation),
        )
    )
    for choice in choices:
        choice.config()
        _check_predictor(choice.predictor, trace)
    statistics = Statistics(
        popularity=popularity, reuse=reuse, accuracy=tuple(_floats("accuracy", accuracy)), seed=seed
    )
    most = max(choice.prompt for choice in choices)
    count = 2 * max(choice.batch for choice in choices)
    named: dict[str, list[Routed]] = {}
    if trace is None:
        with working("Making up how tokens are routed"):
            texts = synthetic_texts(shape, statistics, count, most + tokens)
    else:
        with working(f"Reading {trace}"):
            recorded = read_trace(trace)
            texts = traced_texts(recorded, shape, statistics, most + tokens)
        if real := {choice.predictor for choice in choices} - {*PREDICTORS}:
            furthest = max(choice.distance for choice in choices)
            with working(f"Showing {trace} to predictors"):
                named = _named(recorded, model, real, furthest, most + tokens, count, trust)
    scene = Scene(shape=shape, hardware=machine, software=read_software(software), texts=texts, named=named)
    shown = {choice: scene.first(2 * choice.batch, choice.prompt + tokens) for choice in choices}
    needed = {choice: memory_needed(of, choice) for choice, of in shown.items()}
    fitting = [choice for choice in choices if needed[choice] <= machine.memory_bytes]
    if not fitting:
        check_fits(shown[choices[0]], choices[0])
    rows: list[dict[str, Any]] = []
    with steps_progress("Simulating", len(fitting)) as done:
        for choice in fitting:
            outcome = simulate(shown[choice], choice, always_predict=always)
            rows.append(asdict(choice) | {"memory_bytes": needed[choice]} | outcome.as_dict())
            done(f"slots {choice.slots}, {choice.ablation}")
    _say_hidden(rows)
    if out is not None:
        write_csv(out, rows[0], (row.values() for row in rows))
    if as_json:
        about = {"model": shape.name, "hardware": machine.name, "trace": str(trace) if trace else None}
        print_json(about | {"statistics": asdict(statistics), "runs": rows})
        return
    _show(rows, f"{shape.name} on {machine.name}")
    if left_out := len(choices) - len(fitting):
        print_note(
            f"{left_out} of {len(choices)} combinations are left out: slots, all other weights and the cache take more "
            f"than the {format_size(int(machine.memory_bytes))} there are."
        )


def _check_predictor(name: str, trace: Path | None) -> None:
    if name in PREDICTORS:
        return
    if name not in NAMED and not (name.endswith(LEARNED) and Path(name).is_file()):
        raise ValueError(f"--predictor takes {', '.join((*PREDICTORS, *NAMED))}, or a predictor's file, got {name!r}")
    if trace is None:
        raise ValueError(f"--predictor {name} needs --trace: it looks at a model's states")


def _named(
    trace: Trace, model: str, names: Collection[str], distance: int, tokens: int, count: int, trust: bool
) -> dict[str, list[Routed]]:
    """Return by predictor what it names for the first `count` texts that are long enough."""
    trace.check_states()
    layers, make = predictors_for(trace, model, distance, trust)
    active = layers.active
    long = (document for document in trace.read() if document.tokens >= tokens)
    documents = list(islice(long, count))
    found = {}
    for name in names:
        predictor = make(name)
        replays = [replay(document, layers, predictor, max(active)) for document in documents]
        found[name] = [routed(one, active, distance) for one in replays]
    return found


def _cells(text: str) -> list[str]:
    cells = [cell.strip() for cell in text.split(",") if cell.strip()]
    if not cells:
        raise ValueError(f"expected values with commas between them, got {text!r}")
    return cells


def _numbers(name: str, text: str) -> list[int]:
    try:
        found = [int(one) for one in _cells(text)]
    except ValueError:
        raise ValueError(f"--{name} takes whole numbers, got {text!r}") from None
    if min(found) < 1:
        raise ValueError(f"--{name} must be at least 1, got {text!r}")
    return found


def _floats(name: str, text: str) -> list[float]:
    try:
        return [float(one) for one in _cells(text)]
    except ValueError:
        raise ValueError(f"--{name} takes numbers, got {text!r}") from None


def _slots(text: str) -> int | float | str:
    """Read a count, a share or a size: a number without a point is a count."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _say_hidden(rows: list[dict[str, Any]]) -> None:
    """Add the share of the waiting that was hidden, where the same was run as a plain LRU cache."""
    alike = [
        name for name in Choice.__dataclass_fields__ if name not in ("ablation", "predictor", "distance", "chunking")
    ]
    reactive = {tuple(row[n] for n in alike): row for row in rows if row["ablation"] == "lru"}
    for row in rows:
        base = reactive.get(tuple(row[n] for n in alike))
        limit = max(row["computing_seconds"], row["moving_seconds"])
        hideable = base["seconds"] - limit if base else 0.0
        row["hidden"] = (base["seconds"] - row["seconds"]) / hideable if base and hideable > 0 else float("nan")


def _show(rows: list[dict[str, Any]], title: str) -> None:
    rows = [row | {"predictor": Path(row["predictor"]).stem} for row in rows]
    fields = Choice.__dataclass_fields__
    swept = [name for name in fields if name == "slots" or len({row[name] for row in rows}) > 1]
    header = [*swept, "TTFT ms", "TPOT ms", "tokens/s", "stalled", "hits", "GB", "wasted", "GOODPRED", "hidden"]
    print_table(
        header,
        [
            [
                *(f"{row[name]}" for name in swept),
                f"{row['ttft_seconds'] * 1e3:.0f}",
                f"{row['tpot_seconds'] * 1e3:.1f}",
                f"{row['tps']:.1f}",
                f"{row['stall_seconds'] / row['seconds']:.0%}",
                f"{row['hit_ratio']:.0%}",
                f"{row['bytes_moved'] / 1e9:.3g}",
                f"{row['bytes_wasted'] / max(row['bytes_moved'], 1):.0%}",
                *("-" if row[name] != row[name] else f"{row[name]:.2f}" for name in ("goodpred", "hidden")),
            ]
            for row in rows
        ],
        title=title,
    )
    print_note(
        "Times are means after a first text that fills the cache; routing is made up (--popularity, --reuse) or "
        "recorded (--trace), predictions are as good as --accuracy says, or those of a predictor. hidden: of what a "
        "plain LRU cache waits. "
        f"Machines: {', '.join(hardware_names())}."
    )
