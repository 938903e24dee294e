"""Recording a trace (see `traces`): a model reads text, and hooks note what its MoE layers see and choose.

The model may be patched, with any number of slots, or not. Nothing of it changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from promoe_triton.errors import PromoeError
from promoe_triton.layer import ProMoEExperts
from promoe_triton.patch._families import describe
from promoe_triton.predictors.gates import read_gates
from promoe_triton.predictors.learned import fingerprint
from promoe_triton.predictors.reach import find_layers
from promoe_triton.predictors.taps import Taps
from promoe_triton.protocols import Observation, Seam
from promoe_triton.traces import TracedLayer


def experts_of(model: nn.Module) -> dict[str, int]:
    """Return E of every experts module by path, of a model that is patched or not, in its order."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, ProMoEExperts):
            found[path] = module._promoe.layout.experts
        elif (layout := describe(module)) is not None:
            found[path] = layout.experts
    if not found:
        raise PromoeError(f"{type(model).__name__} has no MoE experts: there is nothing to trace")
    return found


class Tracer:
    """Records documents while it is open: `with Tracer(model) as tracer: tracer.document(...)`.

    states: whether hidden states are recorded too, as a learned predictor needs them.
    Raises PromoeError for a model whose experts are not given ids and weights by token.
    """

    def __init__(self, model: Any, states: bool = True) -> None:
        self._model, self._states = model, states
        self._experts = experts_of(model)
        try:
            self._active = find_layers(model, self._experts).active
        except ValueError as reason:
            raise PromoeError(f"this model cannot be traced: {reason}") from reason
        self._seen: dict[str, list[Tensor]] = {}
        self._handles: list[Any] = []
        self._taps: Taps | None = None

    @property
    def gates(self) -> str:
        """Return what tells this model's routers from those of another."""
        return fingerprint(read_gates(self._model, self._experts))

    @property
    def layers(self) -> list[TracedLayer]:
        """Return the model's MoE layers."""
        hidden = self._model.config.get_text_config().hidden_size
        return [
            TracedLayer(path=path, experts=E, active=A, hidden=hidden)
            for (path, E), A in zip(self._experts.items(), self._active, strict=True)
        ]

    def __enter__(self) -> Tracer:
        self._taps = Taps(self._model, list(self._experts), self._passed)
        for layer, path in enumerate(self._experts):
            hook = self._routed(layer, path)
            self._handles.append(self._model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._taps is not None
        self._taps.remove()
        while self._handles:
            self._handles.pop().remove()

    @torch.no_grad()
    def document(self, token_ids: Sequence[int], prompt: int, piece: int) -> dict[str, Tensor]:
        """Let the model read a document; return what was seen, as a trace keeps it.

        prompt: the first so many tokens are one pass, the prefill. piece: tokens of each later pass; 1 is what
        decoding does, more give the same numbers but for rounding.
        """
        self._seen = {}
        cache = DynamicCache(config=self._model.config)
        begin = 0
        while begin < len(token_ids):
            end = min(begin + (piece if begin else max(prompt, 1)), len(token_ids))
            ids = torch.tensor([token_ids[begin:end]], device=self._model.device)
            self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            begin = end
        T = len(token_ids)
        seen = {name: torch.cat(parts) for name, parts in self._seen.items()}
        for name in [name for name, tensor in seen.items() if len(tensor) != T]:
            if name.startswith(("ids", "weights")):
                raise PromoeError(f"{len(seen[name])} routings were seen for {T} tokens ({name}): not by token")
            del seen[name]
        position = torch.arange(T, dtype=torch.int32)
        return {
            "token_ids": torch.tensor(token_ids, dtype=torch.int32),
            "position": position,
            "is_prefill": position < prompt,
            **seen,
        }

    def _note(self, name: str, tensor: Tensor) -> None:
        self._seen.setdefault(name, []).append(tensor.detach().cpu().clone())

    def _passed(self, seen: Observation) -> None:
        if self._states and seen.state_TD is not None:
            self._note("left" if seen.seam is Seam.LEFT else f"entered.{seen.layer}", seen.state_TD)

    def _routed(self, layer: int, path: str) -> Any:
        A = self._active[layer]

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            if len(given) < 3 or not all(isinstance(t, Tensor) and t.dim() == 2 for t in given[:3]):
                raise PromoeError(f"{path} ({type(module).__name__}) is not given ids by token: it cannot be traced")
            x_TD, ids_TA, weights_TA = given[:3]
            if ids_TA.is_floating_point() or ids_TA.shape != (len(x_TD), A):
                raise PromoeError(f"{path} ({type(module).__name__}) is not given ids by token: it cannot be traced")
            self._note(f"ids.{layer}", ids_TA.to(torch.int16))
            self._note(f"weights.{layer}", weights_TA.float())
            assert self._taps is not None
            seen = self._taps.routed(layer, ids_TA, x_TD)
            if self._states and seen is not None and seen.state_TD is not None:
                self._note(f"state.{layer}", seen.state_TD)

        return note
