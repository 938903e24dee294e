"""How many operations transformers' eager code starts for one token: counted, not timed.

A tiny model is run for one decode step, and every operation that is no view is counted. Differences between models of
other depths and with other numbers of active experts give the share of a layer, of an expert and of the rest.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen2MoeConfig


class Started(TorchDispatchMode):
    """Counts operations, by name; views and allocations start nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views and not str(func).startswith(("aten.empty", "aten.detach", "aten._local_scalar")):
            self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def operations(layers: int, active: int) -> Counter[str]:
    """Return the operations of one decode step."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=active,
        decoder_sparse_step=1,
    )
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    with Started() as started:
        model(torch.tensor([[4]]), past_key_values=cache, use_cache=True)
    return started.names


def main() -> None:
    shallow, deep, wide = operations(2, 2), operations(4, 2), operations(2, 6)
    expert = (wide.total() - shallow.total()) / (2 * 4)
    layer = (deep.total() - shallow.total()) / 2 - 2 * expert
    print(f"an expert: {expert:g}   a layer without experts: {layer:g}")
    print(f"once per pass: {shallow.total() - 2 * layer - 4 * expert:g}")
    for name in sorted(wide):
        if each := (wide[name] - shallow[name]) / 8:
            print(f"  an expert: {each:g} {name}")


if __name__ == "__main__":
    main()
