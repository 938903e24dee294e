"""Where a layer's router, norm and decoder layer are: found by what modules have, from the experts' path.

Nothing looks at a model type; the two families whose routers give no ids are listed by the router's class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ROUTERS = ("gate", "router")
"""Names of the router beside the experts."""

BEFORE = (
    "pre_feedforward_layernorm",
    "pre_mlp_layernorm",
    "pre_ff_layernorm",
    "ffn_norm",
    "norm_attn_norm.norm_2",
    "norm2",
)
"""Paths, from the decoder layer, that can only mean the norm before the experts."""

NORMS = (
    *BEFORE,
    "post_attention_layernorm",
    "post_attention_layernorm.0",
    "norm",
    "input_layernorm",
)
"""Paths of the norm before the experts, from the decoder layer; the first that is there counts."""

STREAMS = ("mlp_hyper_connection",)
"""Modules that make the router's input out of several residual streams, in the place of a norm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one experts module stands; all paths are the model's.

    path: the experts. block: the module that holds them. layer: the decoder layer, "" where there is none.
    stack: the experts' path with a star for the decoder layer's number: the same for the layers of one stack.
    router, norm: None where there is none. bare: the router is given the residual stream without a norm.
    """

    path: str
    block: str
    layer: str
    stack: str
    router: str | None
    norm: str | None
    bare: bool


def find_place(model: nn.Module, path: str) -> Place:
    """Return where the experts at `path` stand. Raises AttributeError where the model has no such module."""
    model.get_submodule(path)
    names = path.split(".")
    numbers = [i for i, name in enumerate(names) if name.isdigit()]
    end = numbers[-1] + 1 if numbers else 0
    layer = ".".join(names[:end])
    block = path.rpartition(".")[0]
    # A norm after the experts and none that must be the one before: the layer norms what it adds to the stream.
    before = any(_has(model, f"{layer}.{name}") for name in BEFORE)
    bare = not before and _has(model, f"{layer}.post_feedforward_layernorm")
    router = next((f"{block}.{name}".lstrip(".") for name in ROUTERS if _has(model, f"{block}.{name}")), None)
    return Place(
        path=path,
        block=block,
        layer=layer,
        stack=".".join("*" if end and i == end - 1 else name for i, name in enumerate(names)),
        router=router,
        norm=None if bare or not layer else _norm(model, layer),
        bare=bare,
    )


def _norm(model: nn.Module, layer: str) -> str | None:
    if any(_has(model, f"{layer}.{name}") for name in STREAMS):
        return None
    for name in NORMS:
        if _has(model, f"{layer}.{name}") and not isinstance(model.get_submodule(f"{layer}.{name}"), nn.ModuleList):
            return f"{layer}.{name}"
    return None


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path.lstrip("."))
    except AttributeError:
        return False
    return True


def run_router(router: nn.Module, block: nn.Module, state_TD: Tensor) -> Tensor:
    """Return the experts that a router chooses, int64[T, A].

    What the router takes beside the state is looked for under the same name in its block. Raises ValueError,
    with the reason, where the router cannot be called so or gives no choice per token.
    """
    call: Callable[..., Any] = router
    name = type(router).__name__
    wanted = list(inspect.signature(router.forward).parameters.values())[1:]
    extra = []
    for parameter in wanted:
        if hasattr(block, parameter.name):
            value = getattr(block, parameter.name)
            extra.append(value.to(state_TD.device) if isinstance(value, Tensor) else value)
        elif parameter.default is inspect.Parameter.empty:
            raise ValueError(f"{name} also needs {parameter.name}")
    try:
        out = call(state_TD, *extra)
    except (RuntimeError, TypeError, ValueError, IndexError):
        # Some want the tokens of a batch.
        try:
            out = call(state_TD[None], *extra)
        except (RuntimeError, TypeError, ValueError, IndexError) as failure:
            raise ValueError(f"{name} cannot be run on its own: {failure}") from failure
    ids = _WITHOUT_IDS[name](router, block, out) if name in _WITHOUT_IDS else _ids(out)
    if ids is None or ids.dim() < 2 or ids.numel() % len(state_TD):
        raise ValueError(f"{name} gives no experts per token")
    return ids.reshape(len(state_TD), -1)


def _ids(out: Any) -> Tensor | None:
    tensors: Sequence[Any] = out if isinstance(out, tuple | list) else (out,)
    found = [t for t in tensors if isinstance(t, Tensor) and t.dtype == torch.int64]
    return found[0] if found else None


def _llama4_ids(router: Any, block: Any, out: Any) -> Tensor:
    scores_TE: Tensor = out[0]
    return scores_TE.topk(router.top_k, -1).indices


def _dbrx_ids(router: Any, block: Any, out: Any) -> Tensor:
    ids_TA: Tensor = block.route_tokens_to_experts(out)[1]
    return ids_TA


_WITHOUT_IDS: dict[str, Callable[[Any, Any, Any], Tensor]] = {
    "Llama4Router": _llama4_ids,
    "DbrxRouter": _dbrx_ids,
}
