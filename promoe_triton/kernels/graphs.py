"""A resident layer in compiled graphs.

torch.compile does not look into folders whose path ends in `triton/backends`: ours of that name is one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from promoe_triton.kernels import ops


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphForm:
    """A resident layer as one operation over its own parameters, by name: nothing of it is the host's business.

    All of it is alike for layers that are, so that one graph serves them.
    """

    up: str
    up_bias: str | None
    down: str
    down_bias: str | None
    gate: str
    numbers: tuple[float, float]
    transposed: tuple[bool, bool]
    identities: int

    def __call__(self, module: Any, x_TD: Tensor, expert_ids_TA: Tensor, weights_TA: Tensor, slots_E: Tensor) -> Tensor:
        """Compute `module` on [T, D] states; slots_E: where each expert lies among the stacked ones."""
        up, down = getattr(module, self.up), getattr(module, self.down)
        up_bias = None if self.up_bias is None else getattr(module, self.up_bias).detach()
        down_bias = None if self.down_bias is None else getattr(module, self.down_bias).detach()
        y_TD: Tensor = ops.layer(
            x_TD.detach().to(up.dtype).contiguous(),
            expert_ids_TA.contiguous(),
            weights_TA.detach().contiguous(),
            up.detach(),
            up_bias,
            down.detach(),
            down_bias,
            slots_E,
            self.gate,
            self.numbers,
            self.transposed,
            self.identities,
        )
        return y_TD.to(x_TD.dtype)
