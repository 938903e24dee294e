"""Quantised checkpoints are refused by name: their numbers are no weights without the scales beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

import promoe_triton
from promoe_triton import PromoeError
from promoe_triton.cli import app
from promoe_triton.patch._quantised import refuse_quantised

IDS = torch.tensor([[5, 6, 7, 8]])
BLOCK = 128
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint whose linear weights are float8 with one scale per block, as DeepSeek-V3 is published."""
    torch.manual_seed(0)
    configuration = Qwen3MoeConfig(
        vocab_size=100,
        hidden_size=BLOCK,
        moe_intermediate_size=BLOCK,
        num_hidden_layers=2,
        num_experts=8,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    Qwen3MoeForCausalLM(configuration).to(torch.bfloat16).save_pretrained(tmp_path)
    stored: dict[str, torch.Tensor] = {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        stored[name] = weight
        if name.endswith("_proj.weight"):
            scale = weight.float().abs().max() / 448
            stored[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale.expand(
                -(-weight.shape[0] // BLOCK), -(-weight.shape[1] // BLOCK)
            ).clone()
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    configure(tmp_path, quantization_config=FP8)
    return tmp_path


def configure(folder: Path, **changes: Any) -> None:
    """Set entries of a checkpoint's configuration; None takes one out."""
    file = folder / "config.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


@pytest.mark.parametrize("slots", [4, None], ids=["few", "all"])
@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors", "of-tomorrow"])
def test_refused_by_name_before_transformers_asks_for_packages(method: str, slots: int | None, folder: Path) -> None:
    configure(folder, quantization_config=FP8 | {"quant_method": method})
    with pytest.raises(PromoeError, match=f"quantised by {method}, which is not supported yet"):
        promoe_triton.from_pretrained(str(folder), slots=slots)
    for name in (folder, folder / "config.json"):
        result = CliRunner().invoke(app, ["inspect", str(name)])
        assert result.exit_code == 1
        assert f"quantised by {method}" in result.stderr


def test_a_method_named_for_the_text_model_only() -> None:
    outer = Qwen3MoeConfig()
    outer.text_config = Qwen3MoeConfig(quantization_config={"quant_method": "awq"})
    with pytest.raises(PromoeError, match="quantised by awq"):
        refuse_quantised(outer)


@pytest.mark.parametrize("settings", [{}, {"quantization_config": None}], ids=["absent", "null"])
def test_plain_configurations_pass(settings: dict[str, Any]) -> None:
    refuse_quantised(Qwen3MoeConfig(**settings))


def test_patch_refuses_a_configuration_that_names_a_method(folder: Path) -> None:
    configure(folder, quantization_config=None)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig.from_pretrained(folder)).eval()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(PromoeError, match="quantised by gptq"):
        promoe_triton.patch(model, slots=4)


@pytest.mark.parametrize("slots", [4, None], ids=["few", "all"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8], ids=str)
def test_experts_that_are_no_plain_weights(dtype: torch.dtype, slots: int | None, folder: Path) -> None:
    """The configuration does not say it; the files do."""
    configure(folder, quantization_config=None)
    file, name = folder / "model.safetensors", "model.layers.1.mlp.experts.3.down_proj.weight"
    stored = {key: t.to(torch.bfloat16) for key, t in load_file(file).items() if not key.endswith("_scale_inv")}
    stored[name] = stored[name].to(dtype)
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(PromoeError, match=rf"{name} in the checkpoint has dtype {dtype}, but experts must be"):
        promoe_triton.from_pretrained(str(folder), slots=slots)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scale", [None, 1.0], ids=["scaled", "scale-of-one"])
def test_a_model_made_plain_while_loaded_rests_in_a_spool(scale: float | None, folder: Path, tmp_path: Path) -> None:
    """The weights that transformers dequantises on a CPU are plain, and are not those of the files.

    Not even where every scale is one, and the numbers are the same.
    """
    if scale is not None:
        file = folder / "model.safetensors"
        stored = load_file(file)
        ones = {key: torch.full_like(t, scale) for key, t in stored.items() if key.endswith("_scale_inv")}
        save_file(stored | ones, file, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        want = model(IDS).logits
        promoe_triton.patch(model, slots=4, spool_dir=tmp_path)
        assert promoe_triton.stats(model).store.startswith("spool")
        assert torch.equal(model(IDS).logits, want)
        promoe_triton.unpatch(model)
    with pytest.raises(PromoeError, match=r"dtype torch\.float8_e4m3fn"):
        promoe_triton.patch(model, slots=4, store="checkpoint")
