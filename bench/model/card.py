"""Measure the packaged demo model and write its card.

    python bench/model/card.py

Stock transformers runs the checkpoint in fp32 (its weights are the bf16 ones) over the packaged held-out
text; hooks read the routers.  Writes ``card.json`` to ``bench/results/model``, the card and its figures to
the model's folder.  ``train.json`` there is the record of the training run (see ``train.py``).

Letters: W windows, N tokens of one window, T = W * N tokens, L layers, E experts, A active experts per token,
D hidden size.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
WINDOW = 512
DISTANCES = (0, 1, 2, 3, 4)
CACHE_SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
PROMPTS = ("The following example shows how to", "This module provides", "def main():\n")


class Probe:
    """Hooks keep each layer's residual stream at the MoE input fp32[T, D] and the choices int64[T, A]."""

    def __init__(self, model: Any) -> None:
        self.layers = list(model.model.layers)
        self.residual: list[list[Tensor]] = [[] for _ in self.layers]
        self.chosen: list[list[Tensor]] = [[] for _ in self.layers]
        self.handles = []
        for layer, residual, chosen in zip(self.layers, self.residual, self.chosen, strict=True):
            self.handles += [
                layer.post_attention_layernorm.register_forward_pre_hook(
                    lambda _module, args, kept=residual: kept.append(args[0].flatten(0, -2))
                ),
                layer.mlp.gate.register_forward_hook(lambda _module, _args, out, kept=chosen: kept.append(out[2])),
            ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def run(model: Any, windows_WN: Tensor) -> float:
    """Mean nats per token over windows int64[W, N + 1]."""
    total = 0.0
    for part in torch.split(windows_WN, 8):
        logits = model(input_ids=part[:, :-1], use_cache=False).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / windows_WN[:, 1:].numel()


def shared(first_TA: Tensor, second_TA: Tensor) -> float:
    """Mean share of the first choice's experts that are in the second's."""
    return (first_TA[:, :, None] == second_TA[:, None, :]).any(-1).float().mean().item()


@torch.no_grad()
def lookahead(probe: Probe, chosen_LTA: list[Tensor]) -> dict[str, list[float | None]]:
    """Per distance d, per layer l: share of the later gate's choice on layer l's state that comes true.

    The later gate (layer l + d) sees its own norm of the residual stream at layer l's MoE input.
    """
    accuracy: dict[str, list[float | None]] = {}
    for distance in DISTANCES:
        row: list[float | None] = []
        for index, kept in enumerate(probe.residual):
            if index + distance >= len(probe.layers):
                row.append(None)
                continue
            later = probe.layers[index + distance]
            logits_TE = F.linear(later.post_attention_layernorm(torch.cat(kept)), later.mlp.gate.weight)
            truth_TA = chosen_LTA[index + distance]
            row.append(shared(logits_TE.topk(truth_TA.shape[1]).indices, truth_TA))
        accuracy[str(distance)] = row
    return accuracy


def lru_hits(chosen_LTA: Tensor, experts: int) -> dict[str, list[float]]:
    """Hit ratio per cache share and layer; tokens in decode order, the cache is kept from window to window.

    One token looks up all its experts, then all of them become the most recent (the first choice foremost).
    An expert's place in the recency order is its LRU stack distance, so one pass serves every cache size.
    """
    layers, tokens, active = chosen_LTA.shape
    slots = torch.tensor([round(share * experts) for share in CACHE_SHARES])
    used_LE = torch.arange(-experts, 0).expand(layers, experts).clone()
    hits_LS = torch.zeros(layers, len(slots))
    touched = torch.zeros(layers, experts, dtype=torch.bool)
    for t in range(tokens):
        chosen_LA = chosen_LTA[:, t]
        last_LA = used_LE.gather(1, chosen_LA)
        place_LA = (used_LE[:, None, :] > last_LA[:, :, None]).sum(-1)
        seen_LA = touched.gather(1, chosen_LA)
        hits_LS += ((place_LA[:, :, None] < slots) & seen_LA[:, :, None]).sum(1)
        touched.scatter_(1, chosen_LA, True)
        used_LE.scatter_(1, chosen_LA, (t * active + torch.arange(active - 1, -1, -1)).expand(layers, active))
    ratio_LS = hits_LS / (tokens * active)
    return {str(share): ratio_LS[:, i].tolist() for i, share in enumerate(CACHE_SHARES)}


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt: str, *, greedy: bool) -> str:
    """The prompt and up to 120 further tokens; sampling is seeded, temperature 0.7, top-p 0.9."""
    torch.manual_seed(0)
    how: dict[str, Any] = (
        {"do_sample": False} if greedy else {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
    )
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=120, **how)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def measure(folder: Path, text: str) -> dict[str, Any]:
    """All numbers of the card that come from the checkpoint and the held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text, verbose=False)["input_ids"]
    count = (len(ids) - 1) // WINDOW
    windows_WN = torch.tensor([ids[i * WINDOW : (i + 1) * WINDOW + 1] for i in range(count)])
    text_bytes = len(tokenizer.decode(ids[1 : count * WINDOW + 1]).encode())

    probe = Probe(model)
    nats = run(model, windows_WN)
    probe.remove()
    chosen_LTA = torch.stack([torch.cat(kept) for kept in probe.chosen])
    experts = model.config.num_experts
    load_LE = torch.stack([torch.bincount(c.flatten(), minlength=experts) for c in chosen_LTA])
    inner_LTA = chosen_LTA.view(len(chosen_LTA), count, WINDOW, -1)
    previous = [shared(c[:, 1:].flatten(0, 1), c[:, :-1].flatten(0, 1)) for c in inner_LTA]
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    few_WN = windows_WN[::8]
    expert_size = 3 * model.config.hidden_size * model.config.moe_intermediate_size
    total = sum(p.numel() for p in model.parameters())
    idle = model.config.num_hidden_layers * (experts - model.config.num_experts_per_tok) * expert_size
    return {
        "parameters": total,
        "parameters_active_per_token": total - idle,
        "expert_bytes": 2 * expert_size,
        "file_bytes": {
            p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".json")
        },
        "held_out": {
            "tokens": count * WINDOW,
            "bytes": text_bytes,
            "window": WINDOW,
            "nats_per_token": nats,
            "perplexity": math.exp(nats),
            "bits_per_byte": nats * count * WINDOW / math.log(2) / text_bytes,
            "every_8th_window": {"fp32_nats": run(model, few_WN), "bf16_nats": run(half, few_WN)},
        },
        "load": (load_LE / load_LE.sum(1, keepdim=True)).tolist(),
        "chance": model.config.num_experts_per_tok / experts,
        "lookahead": lookahead(probe, list(chosen_LTA)),
        "previous_token_overlap": previous,
        "lru_hit_ratio": lru_hits(chosen_LTA, experts),
        "samples": [
            {"prompt": p, "mode": mode, "text": sample(half, tokenizer, p, greedy=mode == "greedy")}
            for p in PROMPTS
            for mode in ("greedy", "sampled")
        ],
    }


def draw_loss(log: list[dict[str, float]], path: Path) -> None:
    """Training and held-out loss against the tokens seen."""
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    axes.plot(
        [r["tokens"] / 1e6 for r in log],
        [r["loss"] for r in log],
        lw=0.8,
        alpha=0.7,
        label="training batches (mean of 20 steps, docs and code)",
    )
    held_out = [r for r in log if "held_out_loss" in r]
    axes.plot(
        [r["tokens"] / 1e6 for r in held_out],
        [r["held_out_loss"] for r in held_out],
        "o-",
        ms=3,
        lw=1,
        label="held-out documentation (32 windows)",
    )
    axes.set(xlabel="tokens seen (millions)", ylabel="cross entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_load(load_LE: list[list[float]], path: Path) -> None:
    """Each layer's share of routed rows per expert, sorted, against the balanced share."""
    layers, experts = len(load_LE), len(load_LE[0])
    figure, grid = plt.subplots(
        2, math.ceil(layers / 2), figsize=(9, 4), sharex=True, sharey=True, layout="constrained"
    )
    for index, (axes, load_E) in enumerate(zip(grid.flat, load_LE, strict=False)):
        axes.bar(range(experts), [100 * share for share in sorted(load_E, reverse=True)], width=1.0)
        axes.axhline(100 / experts, color="black", lw=0.8, ls="--")
        axes.set_title(f"layer {index}", fontsize=9)
    figure.supxlabel("experts, most used first", fontsize=9)
    figure.supylabel("share of routed rows (%)", fontsize=9)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right of the first column."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def percent(values: list[float | None]) -> list[str]:
    """Shares as percent, one decimal, then their mean; an absent one as a dash."""
    present = [v for v in values if v is not None]
    mean = sum(present) / len(present)
    return ["-" if v is None else f"{100 * v:.1f}" for v in [*values, mean]]


def card(data: dict[str, Any], record: dict[str, Any], config: dict[str, Any]) -> str:
    """The model card (Markdown)."""
    layers = len(data["load"])
    names = [f"layer {i}" for i in range(layers)]
    held, options, machine = data["held_out"], record["options"], record["machine"]
    load = data["load"]
    speed = record["trained_tokens"] / record["minutes"] / 60
    load_table = table(
        ["layer", "least used (%)", "most used (%)", "experts never used"],
        [
            [str(i), f"{100 * min(r):.2f}", f"{100 * max(r):.2f}", str(sum(s == 0 for s in r))]
            for i, r in enumerate(load)
        ],
    )
    routing_table = table(
        ["share of experts (%)", *names, "mean"],
        [
            *[[f"gate lookahead, distance {d}", *percent(data["lookahead"][str(d)])] for d in DISTANCES[1:]],
            ["previous token's experts", *percent(data["previous_token_overlap"])],
            *[
                [f"LRU hits, {100 * s:g} % of experts cached", *percent(data["lru_hit_ratio"][str(s)])]
                for s in CACHE_SHARES
            ],
        ],
    )
    manifest_table = table(
        ["texts", "files", "bytes", "SHA-256 of the concatenation"],
        [[name, f"{m['files']}", f"{m['bytes']:,}", f"`{m['sha256']}`"] for name, m in record["manifest"].items()],
    )
    files = "\n".join(f"- `{name}`: {size:,} bytes" for name, size in data["file_bytes"].items())
    samples = "\n\n".join(
        f"{s['mode'].capitalize()}, prompt {s['prompt']!r}:\n\n~~~text\n{s['text']}\n~~~" for s in data["samples"]
    )
    return f"""# The demo model

A small mixture-of-experts language model that writes text in the manner of the Python documentation.  It
exists so that `promoe_triton` can be tried, tested and measured with real routing on any machine.  It knows
nothing reliable: do not use what it writes.

Made by `bench/model/train.py`; every number below except the training record was measured from this
checkpoint by `bench/model/card.py` with stock transformers on `promoe_triton/demo/heldout.txt`.

## Architecture

Qwen3-MoE (`Qwen3MoeForCausalLM`): {layers} layers, hidden size {config["hidden_size"]},
{config["num_attention_heads"]} attention heads of {config["head_dim"]} with {config["num_key_value_heads"]}
key-value heads, {len(load[0])} experts per layer of intermediate size {config["moe_intermediate_size"]},
{config["num_experts_per_tok"]} active per token with normalised weights, tied embeddings, byte-level BPE
vocabulary of {config["vocab_size"]} (token 0, `<|endoftext|>`, separates documents and ends generation).
Trained on windows of {options["length"] // 2}, then {options["length"]} tokens.

{data["parameters"]:,} parameters, {data["parameters_active_per_token"]:,} used per token (tied embedding
included). One expert is {data["expert_bytes"]:,} bytes in bf16.

{files}

## Data and licence

The reStructuredText sources of the CPython {record["versions"]["documentation"]} documentation (roles, labels
and index entries simplified, nothing else changed) and the modules of the Python
{record["versions"]["standard library"]} standard library, tests left out.  Both are distributed under the PSF
License Agreement, Copyright © 2001-2023 Python Software Foundation; All Rights Reserved; the agreement is in
`LICENSE-PSF.txt`.  Some standard library modules carry notices of their own, listed in the licence chapter of
the documentation.

{manifest_table}

Whole documents are held out, one in {record["held_out_one_in"]} by the hash of their path.
`promoe_triton/demo/heldout.txt` contains held-out documentation.

## Training

{record["steps"]:,} steps of {options["step_tokens"]:,} tokens ({record["trained_tokens"]:,} tokens, drawn
from texts of {sum(record["tokens"].values()):,}; {100 * options["docs_share"]:g} % of the windows from
documentation) in {record["minutes"]:.1f} minutes ({speed:,.0f} tokens/s) on {machine["threads"]} threads
of an {machine["cpu"]}, fp32; Python {machine["python"]}, torch {machine["torch"]}, transformers
{machine["transformers"]}. AdamW, peak learning rate {options["lr"]:g}, warm-up then cosine,
per-layer load-balancing loss with weight {options["balance"]:g}, seed {options["seed"]}.

![Loss against tokens seen](loss.png)

## Held-out loss

{held["nats_per_token"]:.3f} nats per token, perplexity {held["perplexity"]:.2f} per token,
{held["bits_per_byte"]:.3f} bits per byte ({held["tokens"]:,} tokens, {held["bytes"]:,} bytes, windows of
{held["window"]} without overlap, weights in bf16, computed in fp32). Computed in bf16 instead, every eighth
window: {held["every_8th_window"]["bf16_nats"]:.3f} against {held["every_8th_window"]["fp32_nats"]:.3f}.

## Routing on held-out text

Share of the routed rows per expert (balanced: {100 / len(load[0]):.2f} %):

![Share of routed rows per expert](load.png)

{load_table}

Gate lookahead at distance d: the gate of layer l + d, with its own norm, applied to the residual stream at
layer l's MoE input; the share of its {config["num_experts_per_tok"]} choices that layer l + d then makes. The
column names layer l. (Distance 0 gives the router's own choice: {100 * min(data["lookahead"]["0"]):.2f} %.)
Chance is {100 * data["chance"]:g} %. The LRU cache is partitioned in equal shares per layer; tokens in decode
order, one after another.

{routing_table}

## Samples

Generated in bf16 by stock `generate`; sampled ones with temperature 0.7, top-p 0.9, seed 0.

{samples}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo model and write its card.")
    parser.add_argument("--model", type=Path, default=ROOT / "promoe_triton/demo/model")
    parser.add_argument("--heldout", type=Path, default=ROOT / "promoe_triton/demo/heldout.txt")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/model")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record = json.loads((args.results / "train.json").read_text())
    data = measure(args.model, args.heldout.read_text())
    (args.results / "card.json").write_text(json.dumps(data, indent=1) + "\n")
    draw_loss(record["log"], args.model / "loss.png")
    draw_load(data["load"], args.model / "load.png")
    config = json.loads((args.model / "config.json").read_text())
    (args.model / "README.md").write_text(card(data, record, config))


if __name__ == "__main__":
    main()
