"""Every kind of decoding gives what the model gave before it was patched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import FAMILIES

import promoe_triton

PADDED = torch.tensor([[0, 0, 5, 9, 2], [7, 3, 1, 8, 4], [0, 0, 0, 0, 6]])
REPEATED = torch.tensor([[5, 9, 2, 5, 9, 2, 5, 9]])


def build(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return FAMILIES["mixtral"].build()


def patched(model: Any) -> Any:
    """A model of 12 experts with 5 slots."""
    return promoe_triton.patch(model, slots=5, store="spool")


def unpatched(model: Any) -> Any:
    return model


def generate(model: Any, **options: Any) -> Tensor:
    torch.manual_seed(1)
    prompt = options.pop("prompt", PADDED)
    settings = {"max_new_tokens": 7, "pad_token_id": 0, "do_sample": False} | options
    result: Tensor = model.generate(prompt, attention_mask=(prompt != 0).long(), **settings)
    return result


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="greedy-batch"),
        pytest.param({"do_sample": True, "top_k": 20, "temperature": 1.3}, id="sampled"),
        pytest.param({"do_sample": True, "num_return_sequences": 3}, id="several-of-each"),
        pytest.param({"num_beams": 3}, id="beams"),  # T differs from the batch, and states change places
        pytest.param({"num_beams": 3, "do_sample": True}, id="sampled-beams"),
        pytest.param({"use_cache": False}, id="no-cache"),  # every step is a longer prompt
        pytest.param({"repetition_penalty": 1.5}, id="penalty"),
        pytest.param({"prompt": REPEATED, "prompt_lookup_num_tokens": 3}, id="prompt-lookup"),  # T is 1 to 4
        pytest.param({"cache_implementation": "static"}, id="static-cache"),
        pytest.param({"prompt": REPEATED, "prefill_chunk_size": 3}, id="prompt-in-pieces"),
    ],
)
def test_the_tokens_of_the_model_itself(options: dict[str, Any]) -> None:
    want = generate(build(), **options)
    model = patched(build())
    assert torch.equal(generate(model, **options), want)
    assert promoe_triton.stats(model).misses > 0


@pytest.mark.filterwarnings("ignore")  # transformers' own, of options that it passes to itself
@pytest.mark.parametrize("target", [patched, unpatched])
@pytest.mark.parametrize("assistant", [patched, unpatched])
def test_assisted(target: Callable[[Any], Any], assistant: Callable[[Any], Any]) -> None:
    """Two models take turns, each with its own slots and its own lock."""
    want = generate(build(), prompt=REPEATED)
    got = generate(target(build()), prompt=REPEATED, assistant_model=assistant(build(seed=1)))
    assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(1, 0), (0, 3)], ids=["no-tokens", "no-texts"])
@pytest.mark.parametrize("name", ["inputs", "input_ids", None])
def test_an_empty_prompt(shape: tuple[int, int], name: str | None) -> None:
    model, want = patched(build()), generate(build())
    empty = torch.empty(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"the prompt is empty \(shape \[.*give generate at least one token"):
        model.generate(**{name: empty}, max_new_tokens=3) if name else model.generate(empty, max_new_tokens=3)
    assert torch.equal(generate(model), want)


def test_other_errors_of_generate_stay_what_they_are() -> None:
    model = patched(build())
    with pytest.raises((RuntimeError, IndexError), match="index"):
        model.generate(torch.tensor([[10**6]]), max_new_tokens=3)
