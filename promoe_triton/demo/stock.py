"""Greedy tokens of stock transformers: a script that runs in a process of its own and never imports this package.

    python -P stock.py < request.json

The request is ``{"model": folder, "prompt": text, "max_new_tokens": n, "threads": n}``. Prints one JSON object:
``prompt_ids`` and ``ids`` (the new tokens), the ``versions`` of torch and transformers, and ``imported``, the
modules of promoe_triton in this process (there must be none).
"""

from __future__ import annotations

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    model = AutoModelForCausalLM.from_pretrained(request["model"]).eval()
    inputs = tokenizer(request["prompt"], return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=request["max_new_tokens"])
    prompt_ids = inputs["input_ids"][0].tolist()
    answer = {
        "prompt_ids": prompt_ids,
        "ids": output[0].tolist()[len(prompt_ids) :],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "imported": sorted(name for name in sys.modules if name.split(".")[0] == "promoe_triton"),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
