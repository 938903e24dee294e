"""The packaged demo: a small trained model, made larger on demand, and checked against stock transformers."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""The packaged checkpoint: a trained Qwen3-MoE of 8 layers with 64 experts each, and its tokenizer."""

PREDICTOR = Path(__file__).parent / "predictor.safetensors"
"""What `promoe-triton train` made for this model (bench/model/predictors.py)."""
