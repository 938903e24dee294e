"""Every family, bit for bit: the patched model's logits are the unpatched model's, at every step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import FAMILIES

import promoe_triton
from promoe_triton.patch._families import describe

TOKENS = 7
NEW = 4
REFUSED = {
    "switch_transformers": ("SwitchTransformersExperts", "separate modules"),
    "nllb-moe": ("NllbMoeExperts", "separate modules"),
    "doge": ("DogeCDMoE", "rows of embeddings"),
    "vitpose": ("VitPoseNaiveMoe", "by data set"),
}
PATCHABLE = [name for name in FAMILIES if name not in REFUSED]
# One of each way in which experts are kept.
HALVES = ("mixtral", "gpt_oss", "dbrx", "nemotron_h", "llama4")
# Where transformers itself cannot run the model, there is nothing to be equal to.
STOCK_FAILS = {
    ("qwen3_omni_moe_talker", "bf16"): "its router's product mixes fp32 and bf16",
    ("qwen3_omni_moe_talker", "checkpoint"): "part of a composite: its config names no model type",
}
# Experts that no conversion rule yields one at a time: from_pretrained loads the model and spools them.
LOADED_WHOLE = {
    "ernie4_5_vl_moe": "text and vision experts share one numbering in the checkpoint",
    "diffusion_gemma": "encoder and decoder share weights that the checkpoint holds once",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [(name, dtype) for name in PATCHABLE for dtype in ("fp32", "bf16") if (name, dtype) not in STOCK_FAILS]
CASES += [(name, "fp16") for name in HALVES]


def outputs(family: Any, model: Any) -> list[Tensor]:
    """The logits of a prefill and of every decode step, or what the model gives where it does not generate."""
    inputs = family.inputs(model, TOKENS)
    torch.manual_seed(1)  # diffusion_gemma draws noise in its forward
    with torch.no_grad():
        if family.generates:
            done = model.generate(
                **inputs, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            return [done.sequences, *done.logits]
        out = model(**inputs)
        return [out.logits if family.causal else out[0]]


def count(model: Any) -> int:
    return sum(layout.experts for m in model.modules() if (layout := describe(m)) is not None)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_bitwise(name: str, dtype: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    spool = tmp_path / "spool"
    spool.mkdir()
    torch.manual_seed(0)
    model: Any = family.build()
    if dtype != "fp32":
        # Through the loader, which knows what a family keeps in single precision.
        model.save_pretrained(tmp_path / "checkpoint")
        model = type(model).from_pretrained(tmp_path / "checkpoint", dtype=DTYPES[dtype])
    expected = outputs(family, model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    original = type(model)
    total = count(model)
    kinds = len({describe(m).spec(m) for m in model.modules() if describe(m)})  # type: ignore[union-attr]
    for slots in sorted({kinds, min(kinds + 2, total), total // 2, total - 1, total}):
        promoe_triton.patch(model, slots=slots, store="spool", spool_dir=spool)
        for got, want in zip(outputs(family, model), expected, strict=True):
            assert torch.equal(got, want), f"{slots} of {total} slots"
        promoe_triton.unpatch(model)
    assert type(model) is original
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not os.listdir(spool)


@pytest.mark.parametrize("io", ["buffered", "direct"])
@pytest.mark.parametrize("name", [name for name in PATCHABLE if (name, "checkpoint") not in STOCK_FAILS])
def test_from_checkpoint(name: str, io: Any, tmp_path: Path) -> None:
    family = FAMILIES[name]
    torch.manual_seed(0)
    family.build().save_pretrained(tmp_path)
    model: Any = type(family.build()).from_pretrained(tmp_path)
    for module in model.modules():
        if (layout := describe(module)) is not None:
            # The loader leaves weights at any address; ours are aligned, which decides bits in fp32.
            for tensor in layout.names:
                module.get_parameter(tensor).data = module.get_parameter(tensor).data.clone()
    expected = outputs(family, model)
    patched: Any = promoe_triton.from_pretrained(tmp_path, slots=0.5, io=io)
    for got, want in zip(outputs(family, patched), expected, strict=True):
        assert torch.equal(got, want)
    assert promoe_triton.stats(patched).store.startswith("spool" if name in LOADED_WHOLE else "checkpoint")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[name].build()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    kind, reason = REFUSED[name]
    with pytest.raises(promoe_triton.PromoeError, match=f"{kind} cannot be patched: .*{reason}"):
        promoe_triton.patch(model, slots=2)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
