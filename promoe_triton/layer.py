"""The ProMoE layer: stands where a block's experts stood, and is called the way they were.

The original module stays what it is (parameters by name, activation, flags); only its class is exchanged for
a subclass of itself and of `ProMoEExperts`, so that everything else about the model is untouched.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from promoe_triton import ops
from promoe_triton.errors import PromoeError
from promoe_triton.runtime import LayerRuntime


class ProMoEExperts(nn.Module):
    """Experts computed from slots. Called as the experts it replaces: hidden [T, D], ids and weights [T, A]."""

    _promoe: LayerRuntime
    _promoe_name: Tensor
    _promoe_graph: Callable[..., Tensor] | None
    _promoe_slots: Tensor
    _ids_by_token = True

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        return self._experts(hidden_states, top_k_index, top_k_weights)

    def _experts(self, x_TD: Tensor, expert_ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self._refuse_training()
        if torch.compiler.is_compiling():
            y_TD: Tensor
            if self._promoe_graph is not None:
                y_TD = self._promoe_graph(self, x_TD, expert_ids_TA, weights_TA, self._promoe_slots)
            else:
                y_TD = ops.experts(x_TD.detach(), expert_ids_TA, weights_TA.detach(), self._promoe_name)
            return y_TD
        if torch.is_grad_enabled():
            self._warn_of_gradients(x_TD)
        return self.compute(x_TD, expert_ids_TA, weights_TA)

    def compute(self, x_TD: Tensor, expert_ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
        """Run the layer outside of autograd, one forward of the model at a time."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.compute(x_TD, expert_ids_TA, weights_TA)
        if torch.is_inference_mode_enabled():
            # What a layer keeps from call to call must not be closed to calls outside of that mode.
            with torch.inference_mode(False):
                return self.compute(x_TD, expert_ids_TA, weights_TA)
        layer = self._promoe
        if x_TD.device != layer.model.device:
            raise PromoeError(
                f"the experts' slots are on {layer.model.device}, but their input is on {x_TD.device}; move it there"
            )
        try:
            layer.model.enter(layer.index)
            layer.bind(self)
            y_TD = layer.run(x_TD, expert_ids_TA, weights_TA, self._ids_by_token)
            layer.model.leave(layer.index, tokens=x_TD.shape[0])
        finally:
            layer.model.release()
        return y_TD

    def _refuse_training(self) -> None:
        if self.training:
            raise PromoeError(
                "a patched model cannot be trained: its experts rest in a store without gradients. Call "
                "promoe_triton.unpatch(model) first, or model.eval() for inference"
            )

    def _warn_of_gradients(self, x_TD: Tensor) -> None:
        if x_TD.requires_grad:
            warnings.warn(
                "a patched layer got an input that requires a gradient; its output is detached, so that none passes "
                "through the experts. Use torch.no_grad() or torch.inference_mode() around the model",
                stacklevel=4,
            )

    def extra_repr(self) -> str:
        layer = self._promoe
        if layer.table is None:
            return f"experts={layer.layout.experts}, all resident"
        return f"experts={layer.layout.experts}, slots={len(layer.table)}, store={layer.model.store.describe()}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move or cast resident weights; refuse what would need the weights that are at rest."""
        self.check_apply(fn)
        if self._promoe.table is None:
            self._promoe.unbind()
            name = self._promoe_name
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self._promoe_name = name  # it is the host that reads it
        return self

    def check_apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise PromoeError where `fn` would move slots, or cast weights that are at rest."""
        layer = self._promoe
        device = layer.model.device
        for name, parameter in self.named_parameters():
            probe = fn(torch.empty(0, dtype=parameter.dtype, device=device))
            if probe.device != device:
                raise PromoeError(
                    f"the slots of the experts are on {device} and cannot be moved to {probe.device}; unpatch first, "
                    "and patch with device=..."
                )
            if layer.table is not None and probe.dtype != parameter.dtype:
                raise PromoeError(
                    f"the experts rest in {layer.model.store.describe()} and cannot be cast to {probe.dtype} ({name} "
                    f"is {parameter.dtype}); unpatch first"
                )

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the true weights, whatever is in slots: they are read back from the store."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        layer = self._promoe
        if layer.table is not None:
            layer.model.check_read_back("the state dict of this layer's experts", layer.nbytes)
            for name, tensor in layer.stack(self).items():
                state[prefix + name] = tensor
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.check_load(state_dict, prefix)
        self._promoe.unbind()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def check_load(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Raise PromoeError where a state dict has weights for experts that are at rest."""
        if self._promoe.table is not None and any(key.startswith(prefix) for key in state_dict):
            raise PromoeError("cannot load weights into experts that rest in a store; unpatch the model first")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # A copy needs a name of its own, or compiled code would run the original.
        self._promoe_name = ops.register(self)


class Llama4Experts(ProMoEExperts):
    """All experts get all tokens, scaled to zero where they were not chosen: [E * T, D] in and out."""

    _ids_by_token = False

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        E = self._promoe.layout.experts
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        T = hidden_states.shape[0] // E
        chosen_ET = hidden_states.view(E, T, -1).ne(0).any(-1).any(-1, keepdim=True).expand(E, T)
        ids = torch.arange(E, device=hidden_states.device).repeat_interleave(T)
        weights = chosen_ET.reshape(-1, 1).to(hidden_states.dtype)
        return self._experts(hidden_states, ids.view(-1, 1), weights)


class DbrxExperts(ProMoEExperts):
    """Tokens come as [B, T, D]."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self._experts(x_TD, top_k_index, top_k_weights).view_as(hidden_states)


class JetMoeExperts(ProMoEExperts):
    """A single product over rows that are already grouped by expert."""

    _ids_by_token = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:
        sizes = torch.tensor(expert_size, device=inputs.device)
        ids = torch.arange(len(expert_size), device=inputs.device).repeat_interleave(sizes)
        return self._experts(inputs, ids.view(-1, 1), inputs.new_ones((len(ids), 1)))


_CALLED_OTHERWISE: dict[str, type[ProMoEExperts]] = {
    "Llama4TextExperts": Llama4Experts,
    "DbrxExperts": DbrxExperts,
    "JetMoeParallelExperts": JetMoeExperts,
}


@functools.cache
def patched_class(original: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of `original` that computes from slots."""
    base = _CALLED_OTHERWISE.get(original.__name__, ProMoEExperts)
    return type(f"ProMoE{original.__name__}", (base, original), {"__module__": __name__})
