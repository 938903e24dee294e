"""How an experts module keeps its weights, described by data: what the stores cut up and the kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from promoe_triton.protocols import ExpertSpec, Part, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayout:
    """The parameters of one experts module.

    experts: E, the experts that own weights.
    up, down: parameter paths of the first and the second product, relative to the module. Every parameter
        stacks its experts along the first dimension: [E, ...], or [E * n, ...] where `rows` says so.
    up_bias, down_bias: parameter paths of the biases [E, N], or None.
    transposed: the weights among them that are kept as [K, N] instead of [N, K].
    activation: path of the activation function, for experts without an `_apply_gate` of their own.
    by_expert: rounding as in a loop over experts (activation per expert, `index_add_` in expert order) instead
        of as in transformers' grouped_mm (activation over all rows, one sum over A).
    single: products, sums and activation in single precision, whatever the weights' dtype (`by_expert` only).
    identities: ids from E up to E + identities pass their token through unchanged.
    """

    experts: int
    up: tuple[str, ...]
    down: tuple[str, ...] = ()
    up_bias: str | None = None
    down_bias: str | None = None
    transposed: tuple[str, ...] = ()
    activation: str = "act_fn"
    by_expert: bool = False
    single: bool = False
    identities: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        biases = tuple(name for name in (self.up_bias, self.down_bias) if name)
        return (*self.up, *self.down, *biases)

    def spec(self, module: nn.Module) -> ExpertSpec:
        """Return what one expert of `module` consists of, from the shapes of its parameters."""

        def tensor(name: str) -> TensorSpec:
            parameter = module.get_parameter(name)
            part = Part.UP if name in self.up or name == self.up_bias else Part.DOWN
            shape = self.expert_shape(parameter)
            return TensorSpec(name=name, part=part, shape=shape, dtype=parameter.dtype)

        return ExpertSpec(tensors=tuple(tensor(name) for name in self.names))

    def stacked(self, parameter: Tensor) -> int:
        """Return how many experts a parameter stacks: E, or more where identities have unused rows."""
        return parameter.shape[0] if self.identities else self.experts

    def expert_shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Return the shape of one expert's share of a parameter stacked as [E, ...] or [E * n, ...]."""
        rows = parameter.shape[0] // self.stacked(parameter)
        tail = tuple(parameter.shape[1:])
        return tail if rows == 1 else (rows, *tail)

    def cut(self, parameter: Tensor, expert: int) -> Tensor:
        """Return one expert's share of a stacked parameter, a view."""
        shape = self.expert_shape(parameter)
        if len(shape) < parameter.dim():
            return parameter[expert]
        return parameter[expert * shape[0] : (expert + 1) * shape[0]]


def is_meta(module: nn.Module, layout: ExpertLayout) -> bool:
    return any(module.get_parameter(name).device == torch.device("meta") for name in layout.names)
