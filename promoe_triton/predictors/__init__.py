"""Predictors: which experts later layers will ask for. All behind `promoe_triton.protocols.Predictor`.

Nothing here copies, waits for or evicts an expert; predictions are hints that can cost time but no correctness.
"""

from promoe_triton.predictors.bounds import (
    NoPredictor,
    OraclePredictor,
    RandomPredictor,
    Recording,
    RoutingRecorder,
)
from promoe_triton.predictors.gate import GatePredictor
from promoe_triton.predictors.gates import Gate, Gates, TokenRoutes, read_gates
from promoe_triton.predictors.reach import Reach, RoutedLayers, find_layers
from promoe_triton.predictors.tables import HistoryPredictor, TokenPredictor
from promoe_triton.predictors.taps import Taps

__all__ = [
    "Gate",
    "GatePredictor",
    "Gates",
    "HistoryPredictor",
    "NoPredictor",
    "OraclePredictor",
    "RandomPredictor",
    "Reach",
    "Recording",
    "RoutedLayers",
    "RoutingRecorder",
    "Taps",
    "TokenPredictor",
    "TokenRoutes",
    "find_layers",
    "read_gates",
]
