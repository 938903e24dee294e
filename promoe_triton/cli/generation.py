"""Options, prompts and the run that `demo` and `generate` share."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, TextStreamer

import promoe_triton
from promoe_triton.config import Slots, format_size
from promoe_triton.counters import Stats
from promoe_triton.errors import PromoeError
from promoe_triton.loading import refuse_untrusted
from promoe_triton.traces import Trace

logger = logging.getLogger(__name__)

DTYPES = ("auto", "bfloat16", "float16", "float32")

COLDEST = 1e-6
"""The lowest temperature: scores divided by much less are infinite, and no token is likelier than another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen: greedily, unless one of the first three is set."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and self.temperature and not COLDEST <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be 0 (greedy) or from {COLDEST:g} to any finite number, got {self.temperature:g}"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top-p must be in (0, 1], got {self.top_p:g}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k must be at least 1 token, got {self.top_k}")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in [0, 2^64), got {self.seed}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or (self.temperature, self.top_p, self.top_k) == (None, None, None)

    def options(self) -> dict[str, Any]:
        """Return transformers' own generate options."""
        if self.greedy:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {
            "do_sample": True,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": 0 if self.top_k is None else self.top_k,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What a run gave: token ids of the prompt and of what follows, its text, and statistics.

    filling: bytes read before the first prompt, to fill the slots.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str
    stats: Stats
    filling: int

    def rows(self) -> list[tuple[str, str]]:
        """Return label and value pairs, for a table a person reads."""
        read = (
            f"{format_size(self.stats.bytes_read - self.filling)}, after {format_size(self.filling)} to fill the slots"
        )
        rows = {**dict(self.stats.rows()), "bytes read": read}
        return [("tokens", f"{len(self.ids)} after a prompt of {len(self.prompt_ids)}"), *rows.items()]

    def as_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "prompt_ids": self.prompt_ids,
            "ids": self.ids,
            "stats": {**self.stats.as_dict(), "filling_bytes_read": self.filling},
        }


class Stream(TextStreamer):  # type: ignore[misc]
    """The new text on stdout, word by word."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text, end="\n" if stream_end else "", flush=True)


def parse_slots(text: str | None) -> Slots:
    """Return what a person wrote for slots: ``64`` a count, ``0.25`` or ``25%`` a share, ``12GiB`` a size."""
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return text


def check_dtype(name: str) -> None:
    """Raise ValueError unless `name` is a dtype that weights can be loaded in."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """Return the prompt, from stdin where neither a text nor a file is given. Raises ValueError if it is empty."""
    if prompt is not None and file is not None:
        raise ValueError("the prompt comes from --prompt or from --file, not from both")
    if prompt is None:
        where = f"the file {file}" if file else "stdin"
        if file is None and sys.stdin.isatty():
            print("Type the prompt, then press Ctrl-D on an empty line.", file=sys.stderr)
        try:
            prompt = file.read_text(encoding="utf-8") if file else sys.stdin.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8 text: {error}") from error
        prompt = prompt.removesuffix("\n")
    else:
        where = "--prompt"
    check_text(prompt, where)
    if not prompt.strip():
        raise ValueError(f"the prompt is empty ({where}): give some text with --prompt, --file or on stdin")
    return prompt


def check_text(prompt: str, where: str) -> None:
    """Raise ValueError where a prompt was not UTF-8: Python stands surrogates for what it cannot decode."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is not UTF-8 text, from character {error.start} on") from error


def check_exists(name: str) -> None:
    """Raise PromoeError for a name that can only be a path, and leads nowhere."""
    is_path = name.startswith(("/", ".", "~")) or name.endswith(("/", ".json")) or name.count("/") > 1
    if is_path and not Path(name).exists():
        raise PromoeError(f"there is no {name}: expected a checkpoint folder or a hub id")


TRUST = "Run the model's own code, if it brings any: read it before."
"""What --trust-remote-code does. It is always given to transformers, which asks on stdin where it is left open."""


def load_routers(name: str | None, trace: Trace, trust: bool) -> Any:
    """Load the model that was traced for its routers and norms: as few slots as there can be, nothing read into them.

    name: None takes the one in the trace.
    """
    return promoe_triton.from_pretrained(
        name or trace.about["model"],
        slots=len(trace.layers),
        device="cpu",
        warm=False,
        predictor="none",
        trust_remote_code=trust,
    )


def load_tokenizer(name: str, trust: bool = False) -> Any:
    """Return the model's tokenizer. Raises PromoeError where the folder is missing or has none.

    trust: whether code that comes with the model may run.
    """
    check_exists(name)
    try:
        # One clear failure for what cannot be had or may not run, instead of one after the other for each file.
        AutoConfig.from_pretrained(name, trust_remote_code=trust)
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        refuse_untrusted(name, error)
        raise PromoeError(f"configuration or tokenizer of {name} cannot be loaded: {error}") from error


def encode(tokenizer: Any, prompt: str, *, chat: bool) -> Tensor:
    """Return the prompt's tokens, int64 [1, T]; `chat` puts it into the model's chat template as a user's message."""
    if not chat:
        ids: Tensor = tokenizer(prompt, return_tensors="pt")["input_ids"]
    elif tokenizer.chat_template is None:
        raise ValueError("this model has no chat template; leave out --chat")
    else:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    if ids.shape[1] == 0:
        raise ValueError("the prompt has no tokens: give some text")
    return ids.long()


def _warn_of_length(model: Any, tokens: int) -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and tokens > longest:
        logger.warning(
            "the prompt has %d tokens, but the model is made for %d at most: expect no sense of what follows",
            tokens,
            longest,
        )


def run(
    model: Any, tokenizer: Any, prompt: Tensor, *, max_new_tokens: int, sampling: Sampling, stream: bool
) -> Generated:
    """Generate with a patched model, printing the text as it comes if `stream`."""
    _warn_of_length(model, prompt.shape[1])
    filling = promoe_triton.stats(model).bytes_read
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    prompt = prompt.to(model.device)
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        streamer=Stream(tokenizer) if stream else None,
        **sampling.options(),
    )
    ids = output[0].tolist()[prompt.shape[1] :]
    return Generated(
        prompt_ids=prompt[0].tolist(),
        ids=ids,
        text=tokenizer.decode(ids, skip_special_tokens=True),
        stats=promoe_triton.stats(model),
        filling=filling,
    )
