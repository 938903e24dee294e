"""What a prediction costs: one token's state to the ranked experts of the layers in reach, on this CPU.

At the packaged model's size and at Qwen3-30B's (hidden size 2048, 128 experts, 8 of them chosen; random weights): the
gates alone, and corrected by what was learned. Bytes and operations of one prediction stand beside its time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import record
import torch
from models import MODEL, Shape
from timing import take_turns
from transformers import AutoModelForCausalLM

from promoe_triton.config import Config
from promoe_triton.demo import PREDICTOR
from promoe_triton.predictors import GatePredictor, Gates, Reach, read_gates
from promoe_triton.predictors.gates import Gate
from promoe_triton.predictors.learned import Head, Heads, load_heads
from promoe_triton.protocols import Observation, Seam
from promoe_triton.tracing import experts_of
from promoe_triton.training import sources

DISTANCE = Config().distance
WIDTH = 256
LAYERS = 6
TARGETS = {"packaged model": 50.0, "hidden size 2048, 128 experts": 150.0}


def packaged() -> tuple[Gates, Heads]:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    gates = read_gates(model, experts_of(model))
    return gates, load_heads(PREDICTOR, gates)


def large() -> tuple[Gates, Heads]:
    shape = Shape(experts=128, active=8, width=8, hidden=2048, layers=LAYERS)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape.config()).to(torch.bfloat16)
    gates = read_gates(model, experts_of(model))
    heads = {}
    for source, targets in sources(gates, DISTANCE).items():
        gate = gates.layers[source[0]]
        assert isinstance(gate, Gate)
        G, D = gate.weight_GD.shape
        head = Head(
            in_DR=torch.randn(D, WIDTH) * D**-0.5,
            in_R=torch.zeros(WIDTH),
            out_RHG=torch.randn(WIDTH, len(targets), G),
        )
        heads[source] = head.like(gate.weight_GD)
    return gates, heads


def observations(gates: Gates) -> list[Observation]:
    """Return what routers in the middle of the model were given, as their norms give it."""
    return routed(gates, range(1, len(gates.layers) - DISTANCE))


def of_a_token(gates: Gates) -> list[Observation]:
    """Return all that a predictor is shown of a token: before the first layer, of every router, and after the last."""
    D, last = gates.layers[0].weight_GD.shape[1], len(gates.layers) - 1  # type: ignore[union-attr]
    state_1D = torch.randn(1, D, dtype=gates.layers[0].weight_GD.dtype)  # type: ignore[union-attr]
    entered = Observation(layer=0, seam=Seam.ENTERED, state_TD=state_1D)
    left = Observation(layer=last, seam=Seam.LEFT, state_TD=state_1D)
    return [entered, *routed(gates, range(last)), left]


def routed(gates: Gates, layers: Iterable[int]) -> list[Observation]:
    found = []
    for layer in layers:
        gate = gates.layers[layer]
        assert isinstance(gate, Gate)
        D = gate.weight_GD.shape[1]
        state_1D = gate.norm.standardise(torch.randn(1, D)) * gate.norm.gain_D + gate.norm.shift_D
        found.append(Observation(layer=layer, state_TD=state_1D.to(gate.weight_GD.dtype)))
    return found


def seconds_each(predictor: GatePredictor, seen: Sequence[Observation], rounds: int) -> float:
    began = time.perf_counter()
    for _ in range(rounds):
        for one in seen:
            predictor.predict(one)
    return (time.perf_counter() - began) / rounds / len(seen)


def main() -> None:
    args = record.arguments(__doc__ or "").parse_args()
    record.confine()
    results = record.results(args, "predict")
    repeats, rounds = (3, 20) if args.quick else (20, 200)
    subjects: dict[str, Callable[[], tuple[Gates, Heads]]] = dict(zip(TARGETS, (packaged, large), strict=True))
    for case, made in subjects.items():
        if results.has(case):
            continue
        gates, heads = made()
        seen = observations(gates)
        predictors = {
            "gate": GatePredictor(gates, Reach(distance=DISTANCE)),
            "learned": GatePredictor(gates, Reach(distance=DISTANCE), heads),
        }
        token = of_a_token(gates)
        turns = {name: partial(seconds_each, one, seen, rounds) for name, one in predictors.items()}
        turns |= {
            f"{name}, all of a token": partial(seconds_each, one, token, rounds) for name, one in predictors.items()
        }
        for turn in turns.values():
            turn()
        results.begin()
        taken = take_turns(turns, repeats)
        gate = gates.layers[0]
        assert isinstance(gate, Gate)
        G, D = gate.weight_GD.shape
        rows = []
        for name, values in taken.items():
            if name not in predictors:
                # As many as there are layers beside the first observation: per layer, all that it costs.
                micros = [value * 1e6 * len(token) / len(gates.layers) for value in values]
                rows.append(record.row(case, name, "per layer", "us", micros, target=TARGETS[case], better="lower"))
                continue
            weights = DISTANCE * G * D + (WIDTH * (D + DISTANCE * G) if name == "learned" else 0)
            (run,) = predictors[name]._plan(seen[0])
            nbytes = sum(matrix.nbytes for matrix in (run.weight_DG, *(run.inner or ())))
            read = f"{weights:,} weights, {nbytes / 1e6:.2f} MB read, {2 * weights / 1e6:.2f} MFLOP"
            note = f"{read}, {DISTANCE} layers ahead"
            micros = [value * 1e6 for value in values]
            rows.append(
                record.row(case, name, "prediction", "us", micros, target=TARGETS[case], better="lower", note=note)
            )
            print(f"  {name}: fastest {min(micros):.0f}, median {statistics.median(micros):.0f} us")
        results.write(rows)


if __name__ == "__main__":
    main()
