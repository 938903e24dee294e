"""Predictors by name, for a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from promoe_triton.config import LEARNED
from promoe_triton.errors import PromoeError
from promoe_triton.predictors.bounds import RandomPredictor
from promoe_triton.predictors.gate import GatePredictor
from promoe_triton.predictors.gates import read_gates
from promoe_triton.predictors.learned import load_heads
from promoe_triton.predictors.reach import Reach, RoutedLayers, find_layers
from promoe_triton.predictors.tables import HistoryPredictor, TokenPredictor
from promoe_triton.protocols import Predictor

logger = logging.getLogger(__name__)


def make_predictor(name: str, model: nn.Module, experts: Mapping[str, int], reach: Reach) -> Predictor | None:
    """Return the predictor of that name, or from that file; None for ``"none"``.

    experts: how many experts each experts module has, by its path, in the model's order. Raises PromoeError where
    the model cannot have this predictor; ``"auto"`` then takes what it can have.
    """
    if name == "none":
        return None
    try:
        layers = find_layers(model, experts)
    except ValueError as reason:
        if name == "auto":
            return None
        raise PromoeError(f"this model cannot have the predictor {name!r}: {reason}") from reason
    match name:
        case "random":
            return RandomPredictor(layers, reach)
        case "history":
            return HistoryPredictor(layers, reach)
        case "token":
            return _token(model, layers, reach)
    gates = read_gates(model, experts)
    for path, why in gates.refused.items():
        logger.info("no gate prediction for %s: %s", path, why)
    if any(gate is not None for gate in gates.layers):
        learned = load_heads(Path(name), gates) if name.endswith(LEARNED) else None
        return GatePredictor(gates, reach, learned)
    if name == "auto":
        return HistoryPredictor(layers, reach)
    whys = "; ".join(sorted({*gates.refused.values()}))
    raise PromoeError(f"this model cannot have the predictor {name!r}: {whys}")


def _token(model: nn.Module, layers: RoutedLayers, reach: Reach) -> TokenPredictor:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    vocabulary = getattr(embedding, "num_embeddings", None)
    if vocabulary is None:
        raise PromoeError("this model cannot have the predictor 'token': it has no embedding of tokens")
    return TokenPredictor(layers, reach, vocabulary)
