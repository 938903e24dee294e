"""What ours is compared with, over the same weights as stacked tensors: transformers' own three ways, vLLM, Liger.

Everything is imported when it is asked for: what is not importable is absent, and the rest is measured without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import grid
import torch
from stage import Stage
from torch import Tensor, nn

from promoe_triton.kernels.samples import Routed
from promoe_triton.kernels.shapes import LayerShape

Forward = Callable[[Routed], Tensor]

UNCAPTURED = (grid.EAGER, grid.BACKEND, "liger")
"""They wait for the GPU to know the routing, or go through Python that is what is measured: no graphs."""


class Absent(Exception):
    """A rival cannot be imported here, or does not do this shape."""


MODULES = {
    "Mixtral": ("mixtral", "Mixtral", {"E": "num_local_experts", "F": "intermediate_size"}),
    "gpt-oss": ("gpt_oss", "GptOss", {"E": "num_local_experts", "F": "intermediate_size"}),
    "other": ("qwen3_moe", "Qwen3Moe", {"E": "num_experts", "F": "moe_intermediate_size"}),
}
"""Module and prefix of the classes in transformers, and what the configuration calls E and F."""


def module_of(shape: LayerShape, implementation: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return transformers' experts module over these weights, of which it keeps no copy."""
    family = "gpt-oss" if shape.transposed else shape.name if shape.name in MODULES else "other"
    name, prefix, words = MODULES[family]
    package = f"transformers.models.{name}"
    config = getattr(importlib.import_module(f"{package}.configuration_{name}"), f"{prefix}Config")(
        hidden_size=shape.D, hidden_act="silu", **{words["E"]: shape.E, words["F"]: shape.F}
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module: nn.Module = getattr(importlib.import_module(f"{package}.modeling_{name}"), f"{prefix}Experts")(config)
    for parameter, tensor in tensors.items():
        setattr(module, parameter, nn.Parameter(tensor, requires_grad=False))
    return module.eval()


def forwards(variant: str, stage: Stage) -> list[Forward]:
    """Return a rival's layer over each of the stage's sets of experts. Raises Absent where there is none."""
    if variant == grid.BACKEND:
        return [backend(stage, i) for i in range(len(stage.sets))]
    if variant in ("vllm", "liger"):
        return [FUSED[variant](stage.shape, dense) for dense in stage.dense]
    name = variant.removeprefix("hf ").removesuffix(", compiled")
    modules: list[Any] = [module_of(stage.shape, name, dense) for dense in stage.dense]
    if variant.endswith(", compiled"):
        torch.compiler.reset()
        modules = [torch.compile(module, dynamic=False) for module in modules]
    return [lambda call, module=module: module(call.x_TD, call.ids_TA, call.weights_TA) for module in modules]


def check_halves(shape: LayerShape) -> None:
    if shape.transposed or shape.biased or shape.gate.interleaved:
        raise Absent("takes no transposed, interleaved or biased experts")


def vllm(shape: LayerShape, dense: Mapping[str, Tensor]) -> Forward:
    """Return the layer over vLLM's Triton kernels."""
    check_halves(shape)
    fused: Any = imported("vllm.model_executor.layers.fused_moe", "fused_experts")
    up, down = dense["gate_up_proj"], dense["down_proj"]
    return lambda call: fused(call.x_TD, up, down, call.weights_TA.float(), call.ids_TA.to(torch.int32))


def liger(shape: LayerShape, dense: Mapping[str, Tensor]) -> Forward:
    check_halves(shape)
    function: Any = imported("liger_kernel.ops", "LigerFusedMoEFunction")
    up, down = dense["gate_up_proj"], dense["down_proj"]
    return lambda call: function.apply(call.x_TD, up, down, call.ids_TA.to(torch.int32), call.weights_TA)


FUSED: dict[str, Callable[[LayerShape, Mapping[str, Tensor]], Forward]] = {"vllm": vllm, "liger": liger}


def imported(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    # A package that is there and breaks while it is imported, in whatever way, is as good as absent.
    except Exception as error:
        raise Absent(f"cannot import {name} from {module}: {' '.join(str(error).split())[:120]}") from error


def backend(stage: Stage, i: int) -> Forward:
    """Return our layer as the package runs it, through its backend in Python: what it takes in eager mode."""
    triton_backend: Any = imported("promoe_triton.backends.triton", "TritonBackend")
    describe: Any = imported("promoe_triton.patch._families", "describe")
    experts = stage.sets[i]
    module = module_of(stage.shape, "grouped_mm", {n: p.data[:0] for n, p in experts.pools.items()})
    whole = module_of(stage.shape, "grouped_mm", {n: p.data.to("meta") for n, p in experts.pools.items()})
    layout = describe(whole)
    layer = triton_backend(stage.table).layer(module, layout, layout.spec(whole))
    for e, slot in enumerate(experts.pools["down_proj"].slot_of_E.tolist()):
        layer.place(e, {name: pool.data[slot] for name, pool in experts.pools.items()})

    def forward(call: Routed) -> Tensor:
        state = layer.begin(call.x_TD, call.ids_TA, call.weights_TA)
        layer.up(state, None)
        layer.activate(state)
        layer.down(state, None)
        result: Tensor = layer.combine(state)
        return result

    return forward


def gathered_bytes(variant: str, stage: Stage, T: int) -> int:
    """Return what a rival copies before it computes: batched_mm gathers the weights of every routed pair."""
    if grid.BATCHED not in variant:
        return 0
    return T * stage.shape.A * stage.shape.expert_bytes(stage.dtype)
