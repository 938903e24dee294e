"""What says that a model is quantised: its configuration, or the quantizer that transformers leaves on it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from promoe_triton.errors import PromoeError


def refuse_quantised(configuration: Any, quantizer: Any = None) -> None:
    """Raise PromoeError, with the method, for a configuration that names one, or a model that has a quantizer.

    A model that transformers made plain again while it loaded it has neither.
    """
    quantisation = _quantisation(configuration)
    if quantisation is None and quantizer is not None:
        quantisation = quantizer.quantization_config
    if quantisation is not None:
        raise PromoeError(
            f"the model is quantised by {_method(quantisation)}, which is not supported yet; use a checkpoint of plain "
            "bfloat16, float16 or float32 weights, without a quantization_config"
        )


def _quantisation(configuration: Any) -> Any:
    """Return the first quantization_config of a configuration and those inside it (text_config...)."""
    if not isinstance(configuration, PreTrainedConfig):
        return None
    values = vars(configuration)
    if values.get("quantization_config") is not None:
        return values["quantization_config"]
    return next((found for value in values.values() if (found := _quantisation(value)) is not None), None)


def _method(quantisation: Any) -> str:
    named = quantisation if isinstance(quantisation, dict) else vars(quantisation)
    method = named.get("quant_method", "an unnamed method")
    return str(getattr(method, "value", method))
