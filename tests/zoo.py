"""Tiny random models of the MoE families of transformers, for tests only.

Every family is small enough for one CPU core: two to four layers of width 48, six experts, two of them per
token where the family leaves a choice. No two widths of an expert are equal, so that a weight taken for its
transpose is noticed.
`FAMILIES[name].build()` draws all weights from torch's global generator: seed that first.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

HIDDEN = 48
INTERMEDIATE = 40
EXPERTS = 6
TOP_K = 2
VOCAB = 101

Inputs = Callable[[PreTrainedModel, int], dict[str, Tensor]]
Settings = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model type, or one variant of it, and how to run it."""

    name: str
    build: Callable[[], PreTrainedModel]
    inputs: Inputs
    generates: bool
    causal: bool
    note: str = ""


FAMILIES: dict[str, Family] = {}
NOT_BUILT: dict[str, str] = {
    "inkling_mm_model": "its vision tower needs scipy; the text model is built as inkling_text"
}

# Applied to every config that has a field of that name; a family's own settings win.
_TINY: Settings = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 56,
    "moe_intermediate_size": INTERMEDIATE,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "share_expert_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "top_k_experts": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "swiglu_limit": 0.5,  # low enough to clamp something
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "depth": 1,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": HIDDEN,
    "text_hidden_size": HIDDEN,
    "vision_hidden_size": HIDDEN,
    "projector_hidden_size": HIDDEN,
    "num_position_embeddings": 16,
    "max_position_embeddings": 128,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _config(config_class: Any, settings: Settings) -> PreTrainedConfig:
    """A config of that class, sub-configs given as dictionaries shrunk in the same way."""
    if config_class is AutoConfig:
        config_class = CONFIG_MAPPING[settings["model_type"]]
    fields = {field.name for field in dataclasses.fields(config_class)}
    merged = {key: value for key, value in _TINY.items() if key in fields}
    for key, value in settings.items():
        if isinstance(value, dict) and key in config_class.sub_configs:
            merged[key] = _config(config_class.sub_configs[key], value)
        elif key != "model_type":
            merged[key] = value
    return cast(PreTrainedConfig, config_class(**merged))


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Make routing and logits depend on the token, and overwrite what was left as it was allocated."""
    by_id = 0
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() >= 2 and "A_log" not in name
        blank = "norm" not in name and not parameter.any()
        if name.endswith("bias"):
            parameter.normal_(0.0, 0.05)
        elif matrix or blank:
            width = parameter.shape[-1] if parameter.dim() == 2 else HIDDEN
            parameter.normal_(0.0, width**-0.5)
        if "router_mlp" in name and matrix:  # of zaya; behind two gelus all tokens would choose one expert
            parameter.sub_(parameter.mean(-1, keepdim=True))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.05)
        elif name.endswith("balancing_biases"):  # of zaya, whose last class skips the experts: now and then
            buffer.zero_()[-1] = 0.02
        elif name.endswith("tid2eid"):  # deepseek_v4: a token's experts by its id, others in each layer
            ids = torch.arange(buffer.shape[0])[:, None] + torch.arange(buffer.shape[1])
            buffer.copy_((ids + by_id) % EXPERTS)
            by_id += 1


def _ids(model: PreTrainedModel, tokens: int) -> dict[str, Tensor]:
    """One prompt, without the lowest ids (padding, start, end) and the highest (images and the like)."""
    generator = torch.Generator().manual_seed(tokens)
    return {"input_ids": torch.randint(3, 90, (1, tokens), generator=generator).to(model.device)}


def _encoder_decoder(model: PreTrainedModel, tokens: int) -> dict[str, Tensor]:
    ids = _ids(model, tokens)["input_ids"]
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}


def _text_and_image_tokens(model: PreTrainedModel, tokens: int) -> dict[str, Tensor]:
    """Every other token is marked as an image's, which sends it to other experts."""
    kinds = torch.arange(tokens, device=model.device)[None] % 2
    return {**_ids(model, tokens), "moe_mm_token_type_ids": kinds.int()}


def _embeddings(model: PreTrainedModel, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return {"inputs_embeds": torch.randn(1, tokens, HIDDEN, generator=generator).to(model.device)}


def _poses(model: PreTrainedModel, tokens: int) -> dict[str, Tensor]:
    """As many images as tokens were asked for, each for the next expert in turn."""
    generator = torch.Generator().manual_seed(tokens)
    images = torch.randn(tokens, 3, 64, 48, generator=generator)
    return {
        "pixel_values": images.to(model.device),
        "dataset_index": torch.arange(tokens, device=model.device) % EXPERTS,
    }


def _patches(model: PreTrainedModel, tokens: int) -> dict[str, Tensor]:
    """One image of four patches, merged to one token, for each token asked for."""
    generator = torch.Generator().manual_seed(tokens)
    patches = torch.randn(4 * tokens, 3 * 4 * 4, generator=generator)
    return {
        "pixel_values": patches.to(model.device),
        "grid_thw": torch.tensor([[1, 2, 2 * tokens]], device=model.device),
    }


def _add(
    name: str,
    model_class: str,
    settings: Settings | None = None,
    *,
    config_class: str | None = None,
    inputs: Inputs = _ids,
    generates: bool = True,
    causal: bool = True,
    note: str = "",
) -> None:
    if model_class not in _CLASSES:
        NOT_BUILT[name] = f"this transformers has no {model_class}"
        return

    def build() -> PreTrainedModel:
        cls: Any = getattr(transformers, model_class)
        config_of = getattr(transformers, config_class) if config_class else cls.config_class
        model: Any = cls(_config(config_of, copy.deepcopy(settings or {})))
        randomise(model)
        if generates:
            model.generation_config.eos_token_id = None  # always as many new tokens as were asked for
        return cast(PreTrainedModel, model.float().eval())

    FAMILIES[name] = Family(name=name, build=build, inputs=inputs, generates=generates, causal=causal, note=note)


def moe_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules by their path, told by what they have and not by their class."""
    return {name: module for name, module in model.named_modules() if _has_experts(module)}


def build(name: str) -> Any:
    """Build a model of a family, the same every time; skip where an older transformers has other experts for it."""
    torch.manual_seed(0)
    model = FAMILIES[name].build()
    if not moe_experts(model) and TorchVersion(transformers.__version__) < "5.23":
        pytest.skip(f"transformers {transformers.__version__} has other experts for {name}")
    return model


def skip_without_static_cache(model: Any, inputs: dict[str, Any]) -> None:
    """Skip where transformers itself cannot generate with a static cache: 5.17's Llama 4."""
    try:
        model.generate(**inputs, max_new_tokens=2, do_sample=False, cache_implementation="static", disable_compile=True)
    except TypeError as error:
        pytest.skip(f"transformers {transformers.__version__}: {error}")


def _has_experts(module: nn.Module) -> bool:
    if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):  # set by transformers' decorator
        return True
    if not (hasattr(module, "num_experts") or hasattr(module, "num_routed_experts")):
        return False
    stacked = any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    children = isinstance(module, nn.ModuleDict | nn.ModuleList)  # switch, nllb, vitpose: one module an expert
    dbrx = hasattr(getattr(module, "mlp", None), "w1")
    doge = hasattr(module, "up_embed")
    return stacked or children or dbrx or doge


_CLASSES = frozenset(dir(transformers))

_DENSE_FIRST: Settings = {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}
_GROUPS: Settings = {"n_group": 2, "topk_group": 1}
_LINEAR_LINEAR_FULL: Settings = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
_SLIDING_FULL: Settings = {"layer_types": ["sliding_attention", "full_attention"]}
# A key head for every query head: multi-head latent attention, and projections fused in a checkpoint.
_ALL_HEADS: Settings = {"num_key_value_heads": 4}
# Families whose experts are as wide as their `intermediate_size`.
_EXPERTS_WIDTH: Settings = {"intermediate_size": INTERMEDIATE}
_INKLING: Settings = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 16,
    "d_rel": 4,
    "rel_extent": 16,
    "unpadded_vocab_size": 97,
}
_QWEN4_EXP: Settings = {
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_NEMOTRON_H: Settings = {
    "layers_block_type": ["mamba", "moe", "attention", "moe"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 8,
    "chunk_size": 8,
}
_DOTS3_NOTE: Settings = {
    **_ALL_HEADS,
    **_DENSE_FIRST,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 24,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 12,
}
_DOTS3_NOTE_VISION: Settings = {
    "num_hidden_layers": 3,
    "pyramid_num_routed": [-1, 5, 6],
    "adapter_in_dim": HIDDEN,
    "adapter_out_dim": HIDDEN,
}
_OCR_VISION: Settings = {
    "sam_config": {
        "image_size": 64,
        "output_channels": 8,
        "downsample_channels": [12, HIDDEN],
        "mlp_dim": 40,
        "window_size": 2,
        "global_attn_indexes": (1,),
    },
    "encoder_config": {},
}
_OMNI_AUDIO: Settings = {
    "d_model": HIDDEN,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "output_dim": HIDDEN,
    "downsample_hidden_size": 8,
}


def _mrope(*sections: int) -> Settings:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}}


_add("mixtral", "MixtralForCausalLM", _EXPERTS_WIDTH)
_add("qwen2_moe", "Qwen2MoeForCausalLM")
_add("qwen3_moe", "Qwen3MoeForCausalLM", {"norm_topk_prob": True, "head_dim": 16})
_add(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    _ALL_HEADS
    | _GROUPS
    | {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 1.5,
    },
)
_add(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    _ALL_HEADS | _GROUPS | {"num_hidden_layers": 3, "first_k_dense_replace": 1},
)
_add(
    "gpt_oss",
    "GptOssForCausalLM",
    _EXPERTS_WIDTH | _SLIDING_FULL,
    note="weights interleaved and transposed, biases",
)
_add("olmoe", "OlmoeForCausalLM", _EXPERTS_WIDTH)
_add("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", _LINEAR_LINEAR_FULL, config_class="Qwen3_5MoeTextConfig")
_add(
    "qwen3_5_moe",
    "Qwen3_5MoeForConditionalGeneration",
    {"text_config": _LINEAR_LINEAR_FULL, "vision_config": {}},
)
_add("qwen3_next", "Qwen3NextForCausalLM", _LINEAR_LINEAR_FULL)
_add("phimoe", "PhimoeForCausalLM", _EXPERTS_WIDTH)
_add("granitemoe", "GraniteMoeForCausalLM", _EXPERTS_WIDTH)
_add(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    _GROUPS | {"num_hidden_layers": 3, "first_k_dense_replace": 1, "use_qk_norm": True, "head_dim": 16},
)
_add(
    "llama4_text",
    "Llama4ForCausalLM",
    _EXPERTS_WIDTH | {"intermediate_size_mlp": 56, "moe_layers": [0, 1], "attention_chunk_size": 16},
    config_class="Llama4TextConfig",
    note="every expert sees every token, scaled by its score; zero where it was not chosen",
)
_add(
    "llama4",
    "Llama4ForConditionalGeneration",
    {
        "text_config": _EXPERTS_WIDTH | {"intermediate_size_mlp": 56, "num_experts_per_tok": 1},
        "vision_config": {
            "image_size": 16,
            "vision_output_dim": HIDDEN,
            "projector_input_dim": HIDDEN,
            "projector_output_dim": HIDDEN,
        },
    },
    note="one expert per token, as in the published models",
)
_add("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", {"num_hidden_layers": 3})
_add("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", _EXPERTS_WIDTH)
_add(
    "minimax",
    "MiniMaxForCausalLM",
    _EXPERTS_WIDTH | {"block_size": 4, "layer_types": ["linear_attention", "full_attention"]},
)
_add(
    "aria_text",
    "AriaTextForCausalLM",
    _EXPERTS_WIDTH,
    config_class="AriaTextConfig",
    note="weights transposed",
)
_add(
    "aria",
    "AriaForConditionalGeneration",
    {"text_config": _EXPERTS_WIDTH, "vision_config": {"model_type": "idefics3_vision", "image_size": 16}},
)
_add("nemotron_h", "NemotronHForCausalLM", _NEMOTRON_H, note="no gate: up, squared relu, down")
_add(
    "nemotron_h/latent",
    "NemotronHForCausalLM",
    _NEMOTRON_H | {"moe_latent_size": 32, "n_group": 2},
    note="experts narrower than the model",
)
_add(
    "gemma4_text",
    "Gemma4ForCausalLM",
    _SLIDING_FULL | {"enable_moe_block": True, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
    config_class="Gemma4TextConfig",
)
_add(
    "gemma4",
    "Gemma4ForConditionalGeneration",
    {
        "text_config": _SLIDING_FULL | {"enable_moe_block": True, "hidden_size_per_layer_input": 0},
        "vision_config": {"position_embedding_size": 64},
    },
)
_add(
    "deepseek_v4",
    "DeepseekV4ForCausalLM",
    {
        "num_hidden_layers": 3,
        "o_groups": 2,
        "o_lora_rank": 8,
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
    },
    note="the first layer's experts follow from the token's id; gate and up are clamped",
)
_add("deepseek_v32", "DeepseekV32ForCausalLM", _ALL_HEADS | _DENSE_FIRST | _GROUPS)
_add("mistral4", "Mistral4ForCausalLM", _ALL_HEADS | _GROUPS)
_add("minimax_m2", "MiniMaxM2ForCausalLM", _EXPERTS_WIDTH)
_add(
    "minimax_m3_vl_text",
    "MiniMaxM3VLForCausalLM",
    _DENSE_FIRST | _EXPERTS_WIDTH | {"dense_intermediate_size": 56, "rotary_dim": 8},
    config_class="MiniMaxM3VLTextConfig",
)
_add(
    "minimax_m3_vl",
    "MiniMaxM3SparseForConditionalGeneration",
    {
        "text_config": _DENSE_FIRST | _EXPERTS_WIDTH | {"dense_intermediate_size": 56, "rotary_dim": 8},
        "vision_config": {"image_size": 16},
    },
)
_add("hy_v3", "HYV3ForCausalLM", _DENSE_FIRST)
_add("hy_v4", "HYV4ForCausalLM", _DENSE_FIRST)
_add("kimi_linear", "KimiLinearForCausalLM", _ALL_HEADS | _DENSE_FIRST | _LINEAR_LINEAR_FULL)
_add(
    "kimi_k25",
    "Kimi_K25ForConditionalGeneration",
    {
        "text_config": _ALL_HEADS | _GROUPS | {"model_type": "deepseek_v3"},
        "vision_config": {"pos_emb_height": 4, "pos_emb_width": 4},
        "projection_hidden_size": HIDDEN,
    },
    note="experts of deepseek_v3",
)
_add("dots1", "Dots1ForCausalLM", {"n_shared_experts": 1})
_add("dots3_note_text", "Dots3NoteForCausalLM", _DOTS3_NOTE, config_class="Dots3NoteTextConfig")
_add(
    "dots3_note",
    "Dots3NoteForConditionalGeneration",
    {
        "text_config": _DOTS3_NOTE,
        "vision_config": _DOTS3_NOTE_VISION,
        "audio_config": {
            "adapter_input_size": HIDDEN,
            "adapter_out_dim": HIDDEN,
            "downsample_hidden_size": 8,
        },
    },
    note="text alone does not reach the experts of the vision tower",
)
_add(
    "dots3_note_vision_encoder",
    "Dots3NoteVisionModel",
    _DOTS3_NOTE_VISION,
    inputs=_patches,
    generates=False,
    causal=False,
    note="another number of experts in each layer",
)
_add("axk1", "AXK1ForCausalLM", _ALL_HEADS | _DENSE_FIRST | _GROUPS)
_add("axk2", "AXK2ForCausalLM", _ALL_HEADS | _DENSE_FIRST)
_add(
    "jamba",
    "JambaForCausalLM",
    _EXPERTS_WIDTH
    | {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
    },
)
_add(
    "afmoe",
    "AfmoeForCausalLM",
    {
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "num_shared_experts": 1,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
)
_add("granitemoeshared", "GraniteMoeSharedForCausalLM", _EXPERTS_WIDTH)
_add("granitemoe_swa", "GraniteMoeSWAForCausalLM", _EXPERTS_WIDTH)
_add(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    _EXPERTS_WIDTH
    | {
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
)
_add("beam", "BeamForCausalLM", _DENSE_FIRST | _GROUPS)
_add(
    "inkling_text",
    "InklingForCausalLM",
    _INKLING | _DENSE_FIRST | {"logits_mup_width_multiplier": 1.0},
    config_class="InklingTextConfig",
)
_add(
    "inkling2_text",
    "Inkling2ForCausalLM",
    _INKLING | {"mlp_gate_softcap": 1.0, "mlp_up_softcap": 1.0},
    config_class="Inkling2TextConfig",
)
_add(
    "inkling2",
    "Inkling2ForConditionalGeneration",
    {"text_config": _INKLING, "vision_config": {"posemb_grid_size": 4, "projection_hidden_dim": HIDDEN}},
)
_add("cohere2_moe", "Cohere2MoeForCausalLM", _EXPERTS_WIDTH | {"num_shared_experts": 1, "logit_scale": 1.0})
_add("flint", "FlintForCausalLM", {"num_hidden_layers": 3, "mlp_only_layers": [0]})
_add(
    "zaya",
    "ZayaForCausalLM",
    {"num_experts_per_tok": 1, "router_hidden_size": 16},
    note="one expert per token; one that skips its experts has expert 0 with weight 0; loading a checkpoint "
    "sets the skipping class back to never",
)
_add("mellum", "MellumForCausalLM", _DENSE_FIRST)
_add("flex_olmo", "FlexOlmoForCausalLM", _EXPERTS_WIDTH)
_add(
    "openai_privacy_filter",
    "OpenAIPrivacyFilterForTokenClassification",
    _EXPERTS_WIDTH,
    generates=False,
    note="classifies tokens; weights transposed and concatenated, biases",
)
_add("laguna", "LagunaForCausalLM", _DENSE_FIRST)
_add("bailing_hybrid", "BailingHybridForCausalLM", _ALL_HEADS | _DENSE_FIRST | _GROUPS | _LINEAR_LINEAR_FULL)
_add(
    "qwen4_exp_text",
    "Qwen4ExpForCausalLM",
    _QWEN4_EXP
    | {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "linear_attention", "indexed_attention"],
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 50,
        "heads_per_ngram": 2,
        "make_ngram_vocab_size_divisible_by": 2,
        "split_ngram_parts": 2,
    },
    config_class="Qwen4ExpTextConfig",
)
_add(
    "qwen4_exp",
    "Qwen4ExpForConditionalGeneration",
    {
        "text_config": _QWEN4_EXP | {"layer_types": ["linear_attention", "indexed_attention"]},
        "vision_config": {},
    },
)
_add("glm4_moe_lite", "Glm4MoeLiteForCausalLM", _ALL_HEADS | _DENSE_FIRST | _GROUPS)
_add("glm_moe_dsa", "GlmMoeDsaForCausalLM", _ALL_HEADS | _DENSE_FIRST | _GROUPS)
_add(
    "glm4v_moe",
    "Glm4vMoeForConditionalGeneration",
    {
        "text_config": _GROUPS | _mrope(1, 1, 1) | {"num_hidden_layers": 3, "first_k_dense_replace": 1},
        "vision_config": {"image_size": 16},
    },
)
_add(
    "glm5_next",
    "Glm5NextForConditionalGeneration",
    {
        "text_config": _ALL_HEADS
        | _DENSE_FIRST
        | {
            "qk_rope_head_dim": 0,
            "index_kpool": 2,
            "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        },
        "vision_config": {"image_size": 16, "projection_intermediate_size": 40},
    },
)
_add("kolibri1", "Kolibri1ForCausalLM")
_add("solar_open", "SolarOpenForCausalLM", _GROUPS)
_add("exaone_moe", "ExaoneMoeForCausalLM", _DENSE_FIRST | {"sliding_window_pattern": 2})
_add("lfm2_moe", "Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention"]})
_add("mimo_v2_flash", "MiMoV2FlashForCausalLM", _DENSE_FIRST)
_add(
    "mistral_large4",
    "MistralLarge4ForConditionalGeneration",
    {"text_config": _ALL_HEADS | _DENSE_FIRST, "vision_config": {"model_type": "pixtral"}},
)
_add(
    "muse_spark",
    "MuseSparkForConditionalGeneration",
    {
        "text_config": _DENSE_FIRST | {"moe_hidden_size": 32, "output_multiplier": 1.0},
        "vision_config": {},
        "audio_config": {
            "num_hidden_layers": 2,
            "patch_sizes": (4, 4),
            "hidden_sizes": (16, 16),
            "depths": (1, 1),
        },
    },
    note="experts narrower than the model, a norm after each of them",
)
_add(
    "qwen3_vl_moe",
    "Qwen3VLMoeForConditionalGeneration",
    {"text_config": {}, "vision_config": {"deepstack_visual_indexes": (0,)}},
)
_add(
    "qwen3_omni_moe_thinker",
    "Qwen3OmniMoeThinkerForConditionalGeneration",
    {
        "text_config": {},
        "vision_config": {"deepstack_visual_indexes": (0,)},
        "audio_config": _OMNI_AUDIO,
        "vision_start_token_id": 98,
    },
)
_add(
    "qwen3_omni_moe_talker",
    "Qwen3OmniMoeTalkerForConditionalGeneration",
    {
        "text_config": {"shared_expert_intermediate_size": 32},
        "code_predictor_config": {"layer_types": ["full_attention", "full_attention"]},
        "thinker_hidden_size": HIDDEN,
        "spatial_merge_size": 2,
    },
    inputs=_embeddings,
    generates=False,
    note="takes embeddings alone",
)
_add(
    "ernie4_5_vl_moe",
    "Ernie4_5_VLMoeForConditionalGeneration",
    {
        "text_config": _DENSE_FIRST | _mrope(2, 2, 2) | {"moe_intermediate_size": [INTERMEDIATE, 32]},
        "vision_config": {},
    },
    inputs=_text_and_image_tokens,
    note="two sets of experts in each layer, one for text and a narrower one for images",
)
_add(
    "unlimited_ocr",
    "UnlimitedOcrForConditionalGeneration",
    {"text_config": _DENSE_FIRST, "vision_config": _OCR_VISION},
)
_add(
    "deepseek_ocr2",
    "DeepseekOcr2ForConditionalGeneration",
    {"text_config": _DENSE_FIRST, "vision_config": _OCR_VISION},
)
_add(
    "diffusion_gemma",
    "DiffusionGemmaForBlockDiffusion",
    {
        "text_config": _SLIDING_FULL,
        "vision_config": {"model_type": "gemma4_vision", "position_embedding_size": 64},
        "canvas_length": 8,
    },
    generates=False,
    note="logits of a canvas drawn at random; generate returns an object",
)
_add(
    "nemotron_h_omni",
    "NemotronH_Omni_Reasoning_V3",
    {
        "text_config": _NEMOTRON_H | {"model_type": "nemotron_h"},
        "vision_config": {"model_type": "radio", "video_temporal_patch_size": 2, "max_img_size": 32},
    },
    note="experts of nemotron_h",
)
_add(
    "nemo_speechlm",
    "Nemotron3_5TranscribeForConditionalGeneration",
    {
        "text_config": _NEMOTRON_H | {"model_type": "nemotron_h"},
        "audio_config": {
            "asr_config": _ALL_HEADS,
            "diarization_config": {
                "model_type": "nemotron3_diarization",
                "audio_config": _ALL_HEADS,
                "head_config": {"audio_hidden_size": HIDDEN},
            },
        },
        "word_timestamp_config": _ALL_HEADS | {"blank_token_id": 100},
    },
    note="experts of nemotron_h",
)
_add(
    "dbrx",
    "DbrxForCausalLM",
    {
        "d_model": HIDDEN,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": HIDDEN,
            "ffn_hidden_size": INTERMEDIATE,
            "moe_num_experts": EXPERTS,
            "moe_top_k": TOP_K,
        },
    },
    note="experts stacked along the rows of three two-dimensional weights",
)
_add(
    "jetmoe",
    "JetMoeForCausalLM",
    _EXPERTS_WIDTH | {"kv_channels": 16},
    note="experts' two projections are modules of their own; attention has experts too",
)
_add(
    "longcat_flash",
    "LongcatFlashForCausalLM",
    _ALL_HEADS
    | {
        "head_dim": 8,
        "num_layers": 2,
        "ffn_hidden_size": 56,
        "expert_ffn_hidden_size": INTERMEDIATE,
        "zero_expert_num": 3,
    },
    note="the last three experts return what they get",
)
_add(
    "step3p7",
    "Step3p7ForConditionalGeneration",
    {"text_config": _DENSE_FIRST | {"swiglu_limits": [0.0, 0.4, 0.0]}, "vision_config": {"image_size": 16}},
    note="the first MoE layer clamps gate and up, the second does not",
)
_add(
    "switch_transformers",
    "SwitchTransformersForConditionalGeneration",
    {
        "d_model": HIDDEN,
        "d_kv": 12,
        "d_ff": INTERMEDIATE,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 2,
    },
    inputs=_encoder_decoder,
    note="one expert per token, none for a token that finds its expert full",
)
_add(
    "nllb-moe",
    "NllbMoeForConditionalGeneration",
    {
        "d_model": HIDDEN,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": INTERMEDIATE,
        "decoder_ffn_dim": INTERMEDIATE,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
    },
    inputs=_encoder_decoder,
    note="reads its mask as indices, so that experts 0 and 1 do all the work",
)
_add(
    "doge",
    "DogeForCausalLM",
    {"is_moe": True, "num_experts": 16, "keep_window_size": 128},
    note="an expert is one row of two embeddings; its number must be a square",
)
_add(
    "vitpose",
    "VitPoseForPoseEstimation",
    {
        "backbone_config": {
            "model_type": "vitpose_backbone",
            "image_size": (64, 48),
            "patch_size": (16, 16),
            "part_features": 16,
            "mlp_ratio": 2,
        }
    },
    inputs=_poses,
    generates=False,
    causal=False,
    note="images; the caller names the expert of each",
)
