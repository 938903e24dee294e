"""The layer as one opaque operation, so that torch.compile can go on around it.

A layer looks at the host and starts copies: the compiler must neither look inside, nor drop, merge or reorder
it, nor put it into a captured graph. The layer is named by a one-element tensor (a Python number would make
the compiler specialise for every layer), and this tensor counts as written to, never the slots (whatever is
written to may be cloned).
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_next_name = itertools.count(1)


def register(layer: nn.Module) -> Tensor:
    """Give a layer a name that `experts` finds it by, for as long as the layer lives."""
    name = next(_next_name)
    _layers[name] = layer
    return torch.tensor([name])


@torch.library.custom_op("promoe_triton::experts", mutates_args={"name"}, tags=(torch.Tag.cudagraph_unsafe,))
def experts(x_TD: Tensor, expert_ids_TA: Tensor, weights_TA: Tensor, name: Tensor) -> Tensor:
    """Run the layer called `name` on [T, D] hidden states, [T, A] expert ids and weights; return [T, D]."""
    layer = _layers[int(name.item())]
    result: Tensor = layer.compute(x_TD, expert_ids_TA, weights_TA)
    return result


@experts.register_fake
def _(x_TD: Tensor, expert_ids_TA: Tensor, weights_TA: Tensor, name: Tensor) -> Tensor:
    return torch.empty_like(x_TD)
