"""Taps: hooks that show a predictor's caller what a model passes by, at the seams where predictions can be made.

They are put on a model's own modules, taken off by `remove`, do nothing while a model is compiled, and a copy of
a tapped model has none that do anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from promoe_triton.predictors.places import Place, find_place
from promoe_triton.protocols import Observation, Seam


class _Hook:
    """A hook that passes (inputs, output) on, and whose copies are deaf."""

    def __init__(self, told: Callable[[Any], None] | None, first_output: bool = False) -> None:
        self._told = told
        self._first_output = first_output

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *output: Any) -> None:
        if self._told is None or torch.compiler.is_compiling():
            return
        given: Sequence[Any] = output if self._first_output else (*args, *kwargs.values())
        first = given[0] if given else None
        self._told(first[0] if isinstance(first, tuple) else first)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None)


class Taps:
    """Observes a model: `routed` when the caller knows a routing, the rest by itself.

    tell: is given what is seen before attention (ENTERED) and after a stack's last layer (LEFT), while the model
        runs. paths: of the experts modules, in the model's order: their places are the layers' numbers.
    first_only: look before attention only where no earlier layer of the stack speaks of this one.
    Where the residual stream is not one state per token (hyper-connections), only token ids are seen before
    attention, and nothing after the last layer; where several experts modules share a decoder layer and its
    tokens, only routings are.
    """

    def __init__(
        self, model: nn.Module, paths: Sequence[str], tell: Callable[[Observation], None], first_only: bool = False
    ) -> None:
        self._tell = tell
        self._token_ids: Tensor | None = None
        # The latest router's input only: a prompt's states for all layers would be as large as its cache.
        self._state: tuple[int, Tensor] | None = None
        self._handles: list[RemovableHandle] = []
        places = [find_place(model, path) for path in paths]
        self._tap_tokens(model)
        firsts = {place.stack: layer for layer, place in reversed(list(enumerate(places)))}.values()
        for layer, place in enumerate(places):
            if place.router is not None:
                self._before(model.get_submodule(place.router), self._keeping(layer))
            looked_at = layer in firsts or not first_only
            if looked_at and place.layer and sum(other.layer == place.layer for other in places) == 1:
                self._before(model.get_submodule(place.layer), self._telling(layer, Seam.ENTERED))
        for layer in _last_of_stacks(places):
            self._tap_end(model, layer, places[layer])

    def routed(self, layer: int, expert_ids_TA: Tensor, hidden_TD: Tensor | None = None) -> Observation | None:
        """Return what is to be told about a routing: of the state its router was given.

        hidden_TD: taken for that state where no hook has seen it (in a compiled model); None: then there is none
        to tell of, and the answer is None.
        """
        state = self._state
        self._state = None
        state_TD = state[1] if state is not None and state[0] == layer else hidden_TD
        if state_TD is None:
            return None
        return self._observation(layer, Seam.ROUTED, state_TD, expert_ids_TA)

    def remove(self) -> None:
        """Take all hooks off. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _tap_tokens(self, model: nn.Module) -> None:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        if isinstance(embedding, nn.Module):
            self._before(embedding, self._keep_tokens)

    def _tap_end(self, model: nn.Module, layer: int, place: Place) -> None:
        parent = model.get_submodule(place.layer.rpartition(".")[0]) if place.layer else None
        if isinstance(parent, nn.ModuleList):
            hook = _Hook(self._telling(layer, Seam.LEFT), first_output=True)
            self._handles.append(parent[-1].register_forward_hook(hook, with_kwargs=True))

    def _before(self, module: nn.Module, told: Callable[[Any], None]) -> None:
        self._handles.append(module.register_forward_pre_hook(_Hook(told), with_kwargs=True))

    def _keep_tokens(self, token_ids: Any) -> None:
        self._token_ids = token_ids.reshape(-1) if isinstance(token_ids, Tensor) else None

    def _keeping(self, layer: int) -> Callable[[Any], None]:
        def keep(state: Any) -> None:
            self._state = (layer, state.detach().reshape(-1, state.shape[-1]))

        return keep

    def _telling(self, layer: int, seam: Seam) -> Callable[[Any], None]:
        def tell(state: Any) -> None:
            if isinstance(state, Tensor) and state.dim() <= 3:
                self._tell(self._observation(layer, seam, state.detach().reshape(-1, state.shape[-1]), None))
            elif seam is Seam.ENTERED and self._token_ids is not None:
                self._tell(Observation(layer=layer, seam=seam, state_TD=None, token_ids_T=self._token_ids))
            if seam is Seam.LEFT:
                self._token_ids = None  # the next pass may be given embeddings instead

        return tell

    def _observation(self, layer: int, seam: Seam, state_TD: Tensor, expert_ids_TA: Tensor | None) -> Observation:
        ids_T = self._token_ids
        if ids_T is not None and len(ids_T) != len(state_TD):
            ids_T = None
        return Observation(layer=layer, seam=seam, state_TD=state_TD, expert_ids_TA=expert_ids_TA, token_ids_T=ids_T)


def _last_of_stacks(places: Sequence[Place]) -> list[int]:
    return sorted({place.stack: layer for layer, place in enumerate(places)}.values())
