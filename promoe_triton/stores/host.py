"""Experts at rest in the model's own parameters: no second copy, nothing to move."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from promoe_triton.layout import ExpertLayout
from promoe_triton.protocols import ExpertKey, ExpertSpec, ExpertTensors


class HostStore:
    """The stacked parameters of the experts modules, as loaded."""

    def __init__(self, modules: Sequence[nn.Module], layouts: Sequence[ExpertLayout]) -> None:
        self._modules = tuple(modules)
        self._layouts = tuple(layouts)

    @property
    def specs(self) -> Sequence[ExpertSpec]:
        pairs = zip(self._modules, self._layouts, strict=True)
        return [layout.spec(module) for module, layout in pairs]

    def load(self, key: ExpertKey) -> ExpertTensors:
        module, layout = self._modules[key.layer], self._layouts[key.layer]
        return {name: layout.cut(module.get_parameter(name).detach(), key.expert) for name in layout.names}

    def describe(self) -> str:
        return "the model's own parameters (everything resident)"
