"""A model whose code comes with its checkpoint, as `trust_remote_code` lets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_cli import call, call_json, stock_ids, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig

import promoe_triton

CONFIGURATION = """
from transformers import Qwen3MoeConfig


class OwnConfig(Qwen3MoeConfig):
    model_type = "own_moe"
"""

MODELING = """
from transformers import Qwen3MoeForCausalLM

from .configuration_own import OwnConfig


class OwnForCausalLM(Qwen3MoeForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **options):
        out = super().forward(*args, **options)
        out.logits = out.logits * 2
        return out
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Where transformers keeps the code of models that it runs.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    place = tmp_path / "own"
    place.mkdir()
    (place / "configuration_own.py").write_text(CONFIGURATION)
    (place / "modeling_own.py").write_text(MODELING)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        initializer_range=0.3,
        dtype="bfloat16",
    ).to_dict()
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    own = config | {"model_type": "own_moe", "architectures": ["OwnForCausalLM"], "auto_map": code}
    (place / "config.json").write_text(json.dumps(own))
    torch.manual_seed(0)
    configuration = AutoConfig.from_pretrained(place, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(configuration, trust_remote_code=True)
    # Weights only: saving the configuration would leave out where the code is.
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_file(state, place / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.mark.parametrize("slots", [3, 16])
@torch.no_grad()
def test_a_model_with_its_own_code_runs_from_slots(folder: Path, slots: int) -> None:
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    stock = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(stock).__name__ == "OwnForCausalLM"
    model = promoe_triton.from_pretrained(str(folder), slots=slots, trust_remote_code=True)
    assert promoe_triton.stats(model).store.startswith("checkpoint")
    assert torch.equal(model(prompt).logits, stock(prompt).logits)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(prompt, **options), stock.generate(prompt, **options))
    promoe_triton.unpatch(model)
    assert torch.equal(model(prompt).logits, stock(prompt).logits)


def test_it_has_to_be_trusted(folder: Path) -> None:
    with pytest.raises(promoe_triton.PromoeError, match=r"brings code of its own.*trust_remote_code=True"):
        promoe_triton.from_pretrained(str(folder), slots=3, trust_remote_code=False)


def test_the_command_runs_it_where_it_is_trusted(folder: Path) -> None:
    options = ("generate", folder, "--prompt", "a cat", "--slots", "3", "--max-new-tokens", "6", "--trust-remote-code")
    answer = call_json(*options)
    assert answer["ids"] == stock_ids(folder, answer["prompt_ids"], 6, trust_remote_code=True)
    assert call_json("inspect", folder, "--trust-remote-code")["architecture"] == "OwnForCausalLM"


@pytest.mark.parametrize("command", [("generate", "--prompt", "a"), ("inspect",)], ids=["generate", "inspect"])
def test_the_command_refuses_it_else_and_asks_nobody(command: tuple[str, ...], folder: Path) -> None:
    result = call(*command, folder, stdin="y\n" * 9)  # what transformers would take for consent
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(f"error: {folder} brings code of its own")
    assert "--trust-remote-code" in result.stderr
