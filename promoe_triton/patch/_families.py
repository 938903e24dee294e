"""Which experts modules there are and how each keeps its weights: data, found by what a module has.

Nearly all families mark their experts class with the same flags, and one description covers them. The few
others are listed by the name of their experts class. Nothing looks at a model type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from promoe_triton.errors import PromoeError
from promoe_triton.layout import ExpertLayout

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What every marked experts module has. Releases before 5.20 know no norm after an expert and no expert parallelism."""

REFUSED = {
    "SwitchTransformersExperts": "its experts are separate modules (ModuleDict), not stacked weights",
    "NllbMoeExperts": "its experts are separate modules (ModuleDict), not stacked weights",
    "DogeCDMoE": "its experts are rows of embeddings, thousands of a few kilobytes each",
    "VitPoseNaiveMoe": "its experts are chosen by data set, not by token",
}


def describe(module: nn.Module) -> ExpertLayout | None:
    """Return how an experts module keeps its weights; None where the module is none.

    Raises PromoeError, with the reason, for experts that cannot be run from slots.
    """
    name = type(module).__name__
    if name in REFUSED:
        raise PromoeError(f"{name} cannot be patched: {REFUSED[name]}")
    if name in _UNMARKED:
        layout = _UNMARKED[name](module)
    elif all(hasattr(module, flag) for flag in FLAGS) and hasattr(module, "num_experts"):
        layout = _marked(module)
    else:
        return None
    for parameter in layout.names:
        dtype = module.get_parameter(parameter).dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise PromoeError(
                f"{name}.{parameter} has dtype {dtype}, but experts must be float32, bfloat16 or float16 (quantised "
                "ones are not supported yet); load the model with dtype='bfloat16'"
            )
    return layout


def _marked(module: Any) -> ExpertLayout:
    if getattr(module, "_is_expert_parallel", False):
        raise PromoeError(
            f"{type(module).__name__} runs expert parallel; that cannot be combined with slots yet. Load the "
            "model without a distributed config"
        )
    up = "gate_up_proj" if module.has_gate else "up_proj"
    by_loop = module.config._experts_implementation == "eager" and type(module).__name__ in _LOOPS_IN_SINGLE
    return ExpertLayout(
        by_expert=by_loop,
        single=by_loop,
        experts=module.num_experts,
        up=(up,),
        down=("down_proj",),
        up_bias=f"{up}_bias" if module.has_bias else None,
        down_bias="down_proj_bias" if module.has_bias else None,
        transposed=(up, "down_proj") if module.is_transposed else (),
    )


def _step3p7(module: Any) -> ExpertLayout:
    return ExpertLayout(experts=module.num_experts, up=("gate_up_proj",), down=("down_proj",), by_expert=True)


def _longcat_flash(module: Any) -> ExpertLayout:
    # Ids from num_routed_experts on are identities; gate_up_proj has unused rows for them.
    return ExpertLayout(
        experts=module.num_routed_experts,
        up=("gate_up_proj",),
        down=("down_proj",),
        by_expert=True,
        identities=module.zero_expert_num,
    )


def _llama4(module: Any) -> ExpertLayout:
    return ExpertLayout(
        experts=module.num_experts,
        up=("gate_up_proj",),
        down=("down_proj",),
        transposed=("gate_up_proj", "down_proj"),
        by_expert=True,
    )


def _dbrx(module: Any) -> ExpertLayout:
    return ExpertLayout(
        experts=module.num_experts,
        up=("mlp.w1", "mlp.v1"),
        down=("mlp.w2",),
        transposed=("mlp.w2",),
        activation="mlp.activation_fn",
        by_expert=True,
    )


def _jetmoe(module: Any) -> ExpertLayout:
    return ExpertLayout(experts=module.num_experts, up=("weight",), by_expert=True)


# Families that transformers runs as a loop over experts by default, in single precision.
_LOOPS_IN_SINGLE = ("OpenAIPrivacyFilterExperts",)

_UNMARKED: dict[str, Callable[[Any], ExpertLayout]] = {
    "Step3p7Experts": _step3p7,
    "LongcatFlashExperts": _longcat_flash,
    "Llama4TextExperts": _llama4,
    "DbrxExperts": _dbrx,
    "JetMoeParallelExperts": _jetmoe,
}
