"""The command line as a person uses it: every command on tiny random checkpoints, and what goes wrong."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from typer.testing import CliRunner

from promoe_triton.cli import app
from promoe_triton.cli.generation import Sampling, parse_slots
from promoe_triton.cli.output import readable_logging
from promoe_triton.config import Config
from promoe_triton.demo import MODEL, PREDICTOR, cache, comparison, inflate
from promoe_triton.errors import PromoeError

ROOT = Path(__file__).parent.parent
LAYERS, EXPERTS, HIDDEN, WIDTH = 2, 8, 32, 24
EXPERT_BYTES = 3 * HIDDEN * WIDTH * 2
PROMPT = "the cat sat"
SMALL: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "bos_token_id": None,
    "initializer_range": 0.3,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([PROMPT, "a dog ran to the cat"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=WIDTH,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        **SMALL,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tokenizer = tiny_tokenizer()
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **SMALL)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def call(*args: str | Path, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def call_json(*args: str | Path, stdin: str | None = None) -> dict[str, Any]:
    """Return the one JSON object on stdout: anything else there fails."""
    result = call(*args, "--json", stdin=stdin)
    assert result.exit_code == 0, result.stderr

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    answer: dict[str, Any] = json.loads(result.stdout, parse_constant=refuse)
    return answer


def stock_ids(folder: Path, prompt_ids: list[int], new: int, **options: Any) -> list[int]:
    stock = AutoModelForCausalLM.from_pretrained(folder, **options)
    prompt = torch.tensor([prompt_ids])
    ids: list[int] = stock.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new
    )[0].tolist()
    return ids[len(prompt_ids) :]


# generate


def test_generate_gives_the_stock_tokens_from_every_source(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    options = ("generate", model, "--slots", "0.5", "--max-new-tokens", "9")
    answers = [
        call_json(*options, "--prompt", PROMPT),
        call_json(*options, "--file", file),
        call_json(*options, stdin=PROMPT + "\n"),
    ]
    expected = stock_ids(model, answers[0]["prompt_ids"], 9)
    assert [answer["ids"] for answer in answers] == [expected] * 3
    assert answers[0]["stats"]["slots"] == LAYERS * EXPERTS // 2
    assert answers[0]["stats"]["misses"] > 0


def test_generate_streams_text_to_stdout_and_statistics_to_stderr(model: Path) -> None:
    options = ("generate", model, "--prompt", PROMPT, "--slots", "4", "--max-new-tokens", "9")
    result = call(*options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == call_json(*options)["text"] + "\n"
    for label in ("slots", "hits", "misses", "bytes read", "time to first token", "time per output token"):
        assert label in result.stderr


def test_generate_writes_a_timeline(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    prompt = "a dog ran to the cat, " * 3  # it needs more experts than there are slots: some are waited for
    options = ("generate", model, "--prompt", prompt, "--slots", "0.5", "--max-new-tokens", "24")
    answer = call_json(*options, "--timeline", file, "--predictor", "gate", "--bandwidth", "10MB/s")
    assert answer["ids"] == call_json(*options)["ids"]
    events = json.loads(file.read_text())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"compute", "copy 0"} <= {*lanes.values()}
    seen = {(lanes[event["tid"]].split()[0], event["cat"]) for event in events if "cat" in event}
    assert {("compute", "compute"), ("compute", "stall"), ("compute", "predict"), ("copy", "urgent")} <= seen
    ahead = answer["stats"]["ahead"]
    assert ahead["on_time"] + ahead["late"] > 0  # which of the two it is depends on how busy the machine is
    shown = sum(event["args"]["bytes"] for event in events if event.get("cat") == "speculation")
    assert shown >= ahead["bytes_copied"]  # a chunk may land between the end of the run and that of the recording
    assert (("copy", "speculation") in seen) >= (ahead["on_time"] > 0)
    assert len(answer["stats"]["copied_ahead"]) == LAYERS


def test_generate_one_token_has_no_time_per_token(model: Path) -> None:
    answer = call_json("generate", model, "--prompt", PROMPT, "--max-new-tokens", "1")
    assert answer["stats"]["tpot_seconds"] is None
    assert answer["stats"]["ttft_seconds"] > 0


def test_generate_samples_by_seed(model: Path) -> None:
    options = ("generate", model, "--prompt", PROMPT, "--max-new-tokens", "20", "--temperature", "1.5")
    first, again, other = (call_json(*options, "--seed", seed)["ids"] for seed in ("1", "1", "2"))
    assert first == again != other
    greedy = call_json(*options[:-1], "0")
    assert greedy["greedy"]
    assert greedy["ids"] == stock_ids(model, greedy["prompt_ids"], 20)


def test_generate_applies_the_chat_template_only_when_asked(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    options = ("generate", folder, "--prompt", PROMPT, "--max-new-tokens", "2")
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(call_json(*options)["prompt_ids"]) == PROMPT
    assert tokenizer.decode(call_json(*options, "--chat")["prompt_ids"]) == f"[{PROMPT}]"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--prompt", ""), 2, "the prompt is empty (--prompt)"),
        (("--prompt", " \n"), 2, "the prompt is empty"),
        ((), 2, "the prompt is empty (stdin)"),  # nothing on stdin
        (("--prompt", "a", "--file", __file__), 2, "not from both"),
        (("--file", "no such file"), 2, "does not exist"),
        (("--prompt", "a", "--slots", "0"), 2, "at least 1"),
        (("--prompt", "a", "--slots", "1.5"), 2, "must be in (0, 1]"),
        (("--prompt", "a", "--slots", "many"), 2, "a size is a number with a unit"),
        (("--prompt", "a", "--slots", "1B"), 2, "hold no expert"),
        (("--prompt", "a", "--slots", "nan"), 2, "must be in (0, 1]"),
        (("--prompt", "a", "--max-new-tokens", "0"), 2, "max-new-tokens"),
        (("--prompt", "a", "--temperature", "-1"), 2, "temperature must be 0"),
        (("--prompt", "a", "--temperature", "nan"), 2, "temperature must be 0"),
        (("--prompt", "a", "--temperature", "inf"), 2, "temperature must be 0"),
        (("--prompt", "a", "--temperature", "1e-300"), 2, "temperature must be 0"),  # scores would be infinite
        (("--prompt", "a", "--seed", "-1"), 2, "seed must be in"),
        (("--prompt", "a", "--seed", str(2**64)), 2, "seed must be in"),
        (("--prompt", "a", "--top-p", "nan"), 2, "top-p must be"),
        (("--prompt", "a", "--top-p", "0"), 2, "top-p must be"),
        (("--prompt", "a", "--top-k", "0"), 2, "top-k must be"),
        (("--prompt", "a", "--io", "fast"), 2, "io must be one of"),
        (("--prompt", "a", "--policy", "fifo"), 2, "policy must be one of"),
        (("--prompt", "a", "--predictor", "tarot"), 2, "predictor must be one of"),
        (("--prompt", "a", "--bandwidth", "fast"), 2, "a size is a number with a unit"),
        (("--prompt", "a", "--timeline", "no/such/folder"), 2, "there is no folder"),
        (("--prompt", "a", "--dtype", "int8"), 2, "dtype must be one of"),
        (("--prompt", "a", "--chat"), 2, "no chat template"),
        (("--frobnicate",), 2, "No such option"),
    ],
)
def test_generate_refuses(model: Path, options: tuple[str, ...], code: int, words: str) -> None:
    result = call("generate", model, *options, stdin="")
    assert result.exit_code == code
    assert result.stdout == ""
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", [("generate", "--prompt", "a"), ("inspect",)], ids=["generate", "inspect"])
def test_models_that_cannot_be_run(command: tuple[str, ...], dense: Path, tmp_path: Path) -> None:
    for name, words in (
        (dense, "has no MoE experts"),
        (tmp_path / "nowhere", "there is no"),
        (tmp_path, str(tmp_path)),  # a folder without a checkpoint
        ("owner/name", "owner/name"),  # a hub id that is not in the cache
    ):
        result = call(*command, name)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert words in result.stderr
        assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == [
            result.stderr.splitlines()[-1]
        ]


def test_interrupt_ends_with_130(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("promoe_triton.cli.generate.run", interrupt)
    result = call("generate", model, "--prompt", PROMPT)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "error: interrupted"


def test_interrupt_during_imports(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    done = subprocess.run(
        [sys.executable, "-c", "from promoe_triton_command import main; main()", "--version"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


@pytest.mark.parametrize("command", ["generate", "demo"])
def test_prompts_that_are_not_utf_8(command: str, model: Path) -> None:
    prompt = os.fsdecode(b"caf\xe9")
    options = ["demo", prompt] if command == "demo" else ["generate", model, "--prompt", prompt]
    result = call(*options)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "is not UTF-8 text, from character 3 on" in result.stderr


def test_a_prompt_longer_than_the_model_is_made_for(model: Path) -> None:
    fits, exceeds = (call("generate", model, "-p", "z" * n, "--max-new-tokens", 1) for n in (128, 129))
    assert fits.exit_code == exceeds.exit_code == 0
    assert "warning" not in fits.stderr
    assert "warning: the prompt has 129 tokens, but the model is made for 128 at most" in exceeds.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("argument", "passed"),
    [
        pytest.param(["PROMPT="], ["--", ""], id="empty"),
        pytest.param(['PROMPT=a "b" $c'], ["--", 'a "b" $c'], id="quotes"),
        pytest.param([], [], id="absent"),
    ],
)
@pytest.mark.parametrize("verb", ["demo", "demo-large"])
def test_make_passes_the_prompt_on(verb: str, argument: list[str], passed: list[str], tmp_path: Path) -> None:
    """An empty one too, which the command refuses."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "promoe-triton").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    for file in (programs / "promoe-triton", programs / "python"):
        file.touch()
        file.chmod(0o755)
    (tmp_path / ".installed").touch()
    # Without what this run itself was given, as by make test ARGS="-k make".
    surroundings = {name: value for name, value in os.environ.items() if name not in ("ARGS", "MAKEFLAGS")}
    done = subprocess.run(
        ["make", "--no-print-directory", verb, f"VENV={tmp_path}", *argument],
        cwd=ROOT,
        env=surroundings | {"PROMPT": "$P$G", "DEMO_PROMPT": "from elsewhere"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    first = ["demo"] if verb == "demo" else ["demo", "--large"]
    assert done.stdout.splitlines() == [*first, *passed], done.stderr


@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
def test_inspect_may_fetch_the_configuration_of_a_hub_id(
    offline: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the configuration, and not where transformers is told to stay offline."""
    asked: list[dict[str, Any]] = []

    def fetch(name: str, **options: Any) -> Any:
        asked.append(options)
        if offline:
            raise OSError("couldn't find it in the cached files")
        return Qwen3MoeConfig.from_pretrained(model)

    monkeypatch.setattr("promoe_triton.loading.AutoConfig.from_pretrained", fetch)
    result = call("inspect", "some-one/tiny-moe")
    assert asked == [{"trust_remote_code": False}]
    assert result.exit_code == int(offline)
    assert ("no checkpoint here" in result.stdout) is not offline


def test_warnings_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("promoe_triton.somewhere")
    before = logging.getLogger("promoe_triton").level, list(logging.getLogger("promoe_triton").handlers)
    with readable_logging(verbose=False):
        logger.warning("%d [experts] are gone", 3)
        logger.info("nobody asked")
    assert capsys.readouterr().err == "warning: 3 [experts] are gone\n"
    assert before == (logging.getLogger("promoe_triton").level, logging.getLogger("promoe_triton").handlers)


def test_entry_point() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from promoe_triton.cli import main; main()", "--version"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("promoe-triton ")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("text", "slots"),
    [("64", 64), ("0.25", 0.25), ("25%", 0.25), ("1.0", 1.0), ("12GiB", "12GiB"), (None, None)],
)
def test_parse_slots(text: str | None, slots: object) -> None:
    parsed = parse_slots(text)
    assert parsed == slots
    assert type(parsed) is type(slots)


def test_sampling_names_every_option() -> None:
    assert Sampling().options() == {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    assert Sampling(top_k=5).options() == {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 5}


# inspect


def test_inspect_counts(model: Path) -> None:
    answer = call_json("inspect", model)
    assert answer["layers"] == LAYERS
    assert answer["experts"] == [EXPERTS] * LAYERS
    assert answer["expert_bytes"] == [EXPERT_BYTES] * LAYERS
    assert answer["top_k"] == 2
    assert answer["all_expert_bytes"] == LAYERS * EXPERTS * EXPERT_BYTES
    whole = AutoModelForCausalLM.from_pretrained(model)
    assert answer["dense_bytes"] + answer["all_expert_bytes"] == sum(p.nbytes for p in whole.parameters())
    assert [choice["slots"] for choice in answer["choices"]] == [2, 4, 8, 12, 16]
    assert answer["store"].startswith("checkpoint")
    assert all(choice["slot_bytes"] >= choice["slots"] * EXPERT_BYTES for choice in answer["choices"])


def test_inspect_needs_no_weights(model: Path, tmp_path: Path) -> None:
    shutil.copy(model / "config.json", tmp_path)
    with_weights = call_json("inspect", model)
    for name in (tmp_path, tmp_path / "config.json"):
        answer = call_json("inspect", name)
        assert answer["all_expert_bytes"] == with_weights["all_expert_bytes"]
        assert answer["store"].startswith("no ")
        assert call_json("inspect", name, "--dtype", "float32")["all_expert_bytes"] == 2 * answer["all_expert_bytes"]


def test_inspect_is_readable(model: Path) -> None:
    result = call("inspect", model)
    assert result.exit_code == 0
    for words in ("MoE layers", "8 per layer, 16 in all", "What slots buy", "12.5%", "100%"):
        assert words in result.stdout


def test_inspect_says_what_a_token_reads_and_how_long_that_takes(model: Path) -> None:
    answer = call_json("inspect", model, "--bandwidth", "1MB/s")
    assert answer["bandwidth"] == 1e6
    every = LAYERS * 2 * EXPERT_BYTES  # two experts per token
    assert [choice["token_bytes"] for choice in answer["choices"]] == [
        round((1 - ratio) * every) for ratio in (0.269, 0.426, 0.684, 0.878, 1.0)
    ]
    shown = call("inspect", model, "--bandwidth", "1MB/s").stdout
    assert re.search(r"5\.8\d ms", shown), "half of the experts in slots"
    assert "takes" not in call("inspect", model).stdout


def test_inspect_measures_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promoe_triton.cli.needs.MEASURING_SECONDS", 0.05)
    assert call_json("inspect", MODEL, "--measure")["bandwidth"] > 1e6


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--bandwidth", "fast"), 2, "a size is a number with a unit"),
        (("--bandwidth", "0B/s"), 2, "bandwidth must be positive"),
        (("--bandwidth", "1GB/s", "--measure"), 2, "not both"),
        (("--measure",), 1, "has no file of 8.39 MB or more"),
    ],
)
def test_inspect_refuses(model: Path, options: tuple[str, ...], code: int, words: str) -> None:
    result = call("inspect", model, *options)
    assert result.exit_code == code
    assert words in " ".join(result.stderr.replace("│", " ").split())


# demo


def test_demo_equals_stock_transformers_in_a_second_process(model: Path) -> None:
    answer = call_json("demo", PROMPT, "--model", model, "--max-new-tokens", "9")
    assert answer["stats"]["slots"] == LAYERS * EXPERTS // 4
    assert answer["stock"]["same_tokens"]
    assert answer["stock"]["ids"] == answer["ids"] == stock_ids(model, answer["prompt_ids"], 9)


def test_packaged_demo_has_the_packaged_predictor(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Config] = []

    def run(model: Path, prompt: str, config: Config, *others: Any, **options: Any) -> None:
        found.append(config)
        raise PromoeError("enough")

    monkeypatch.setattr("promoe_triton.cli.demo._run", run)
    assert call("demo").exit_code == 1
    assert found[0].predictor == str(PREDICTOR)
    assert PREDICTOR.is_file()


def test_packaged_demo_writes_the_text_of_stock_transformers() -> None:
    answer = call_json("demo", "--max-new-tokens", "16")
    assert answer["model"] == str(MODEL)
    assert (answer["stats"]["experts"], answer["stats"]["slots"]) == (8 * 64, 8 * 64 // 4)
    assert answer["stats"]["misses"] > 0
    assert len(answer["ids"]) == 16
    assert answer["stock"]["same_tokens"]
    assert " " in answer["text"]


def test_demo_large_gives_the_same_tokens_and_writes_once(model: Path, tmp_path: Path) -> None:
    options = ("demo", PROMPT, "--large", "--model", model, "--expert-mb", "0.1", "--dir", tmp_path)
    first = call(*options, "--max-new-tokens", "9")
    assert first.exit_code == 0, first.stderr
    assert first.stdout.startswith(PROMPT)
    assert "same tokens: all 9" in " ".join(first.stdout.split())
    assert "Writing 1." in first.stderr
    (written,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    before = {path: path.stat().st_mtime_ns for path in written.iterdir()}
    again = call(*options, "--temperature", "1")
    assert again.exit_code == 0
    assert "not compared" in again.stdout
    assert "Writing" not in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in written.iterdir()}


def test_demo_fails_when_tokens_differ(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = call_json("generate", model, "--prompt", PROMPT, "--max-new-tokens", "4")
    wrong = [*ids["ids"][:2], ids["ids"][2] + 1, ids["ids"][3]]
    stock = comparison.StockRun(
        prompt_ids=tuple(ids["prompt_ids"]), ids=tuple(wrong), torch="2.13", transformers="5.23"
    )
    monkeypatch.setattr("promoe_triton.cli.demo.stock_run", lambda *args: stock)
    for options in ((), ("--json",)):
        result = call("demo", PROMPT, "--model", model, "--max-new-tokens", "4", *options)
        assert result.exit_code == 1
        assert f"new token 3 of 4 is {ids['ids'][2]}, stock transformers has {wrong[2]}" in result.stderr
    assert json.loads(result.stdout)["stock"]["same_tokens"] is False


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("",), 2, "the prompt is empty"),
        (("a", "--expert-mb", "3"), 2, "add --large"),
        (("a", "--large", "--expert-mb", "3", "--gigabytes", "1"), 2, "give one positive size"),
        (("a", "--large", "--gigabytes", "-1"), 2, "give one positive size"),
        (("a", "--large", "--gigabytes", "nan"), 2, "give one positive size"),
        (("a", "--large", "--times-ram", "inf"), 2, "give one positive size"),
        (("a", "--large", "--expert-mb", "0.001"), 2, "already; ask for more"),
        (("a", "--large", "--gigabytes", "1e9"), 1, "of disk"),
        (("a", "--large", "--gigabytes", "1e300"), 1, "of disk"),
        (("a", "--large", "--times-ram", "1e300"), 1, "of disk"),
        (("a", "--large", "--expert-mb", "1e300"), 1, "of disk"),
        (("a", "--model", "nowhere"), 1, "the demo model is missing"),
        (("a", "--slots", "0"), 2, "at least 1"),
    ],
)
def test_demo_refuses(model: Path, options: tuple[str, ...], code: int, words: str, tmp_path: Path) -> None:
    where = ("--dir", str(tmp_path)) if "--large" in options else ()
    result = call("demo", "--model", model, *where, *options)
    assert result.exit_code == code
    assert words in result.stderr
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_stock_process_knows_nothing_of_this_package(model: Path) -> None:
    request = {"model": str(model), "prompt": PROMPT, "max_new_tokens": 3, "threads": 1}
    command = [sys.executable, "-P", str(comparison.SCRIPT)]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=120)
    answer = json.loads(done.stdout)
    assert answer["imported"] == []
    assert answer["ids"] == stock_ids(model, answer["prompt_ids"], 3)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("import sys; sys.exit('no luck today')", "no luck today"),
        ("raise SystemExit(3)", "ended with code 3: no message"),
        ('print(\'{"imported": ["promoe_triton.layer"]}\')', "imported promoe_triton.layer"),
    ],
    ids=["says why", "says nothing", "ran the wrong code"],
)
def test_stock_process_that_fails(script: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    file.write_text(script)
    with pytest.raises(PromoeError, match=words):
        comparison.stock_run(tmp_path, PROMPT, 1, script=file)


# inflate


def test_inflate_keeps_the_function(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflate, "SHARD_BYTES", 200_000)
    written: list[int] = []
    plan = inflate.inflate(model, tmp_path / "big", expert_bytes=50_000, on_progress=written.append)
    assert plan.width % inflate.MULTIPLE == 0
    assert plan.expert_bytes >= 50_000
    assert sum(written) == plan.total_bytes
    shards = sorted((tmp_path / "big").glob("*.safetensors"))
    assert len(shards) > 2
    assert max(shard.stat().st_size for shard in shards) < 200_000 + plan.expert_bytes + 10_000

    small, big = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, tmp_path / "big"))
    assert big.config.moe_intermediate_size == plan.width
    assert set(big.state_dict()) == set(small.state_dict())
    prompt = [5, 6, 7, 100]
    assert stock_ids(tmp_path / "big", prompt, 30) == stock_ids(model, prompt, 30)
    hidden, width = big.model.layers[1].mlp.experts.down_proj[3].shape
    assert (hidden, width) == (HIDDEN, plan.width)
    assert torch.all(big.model.layers[1].mlp.experts.down_proj[:, :, WIDTH:] == 0)
    gate_up = big.model.layers[1].mlp.experts.gate_up_proj
    assert torch.all(gate_up[:, WIDTH : plan.width].float().std(-1) > 0.05)


def test_inflate_names_tensors_as_transformers_does(model: Path, tmp_path: Path) -> None:
    inflate.inflate(model, tmp_path / "big", expert_bytes=50_000)
    AutoModelForCausalLM.from_pretrained(tmp_path / "big").save_pretrained(tmp_path / "saved")
    ours, theirs = (inflate.plan_inflation(tmp_path / name, 10**6).tensors for name in ("big", "saved"))
    assert {n: (r.shape, r.dtype) for n, r in ours.items()} == {n: (r.shape, r.dtype) for n, r in theirs.items()}


def test_inflate_by_seed(model: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        inflate.inflate(model, tmp_path / name, expert_bytes=20_000, seed=seed)
    a, b, c = ((tmp_path / n / "model-00001-of-00001.safetensors").read_bytes() for n in "abc")
    assert a == b != c


def test_inflate_refuses_what_it_cannot_do(model: Path, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(PromoeError, match="expected a qwen3_moe checkpoint"):
        inflate.inflate(dense, tmp_path / "big", expert_bytes=50_000)
    with pytest.raises(PromoeError, match="of disk, but"):
        inflate.inflate(model, tmp_path / "big", expert_bytes=10**15)
    assert not (tmp_path / "big").exists()


def test_cache_leaves_nothing_half_written(model: Path, tmp_path: Path) -> None:
    def interrupt(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.inflated(model, tmp_path, 50_000, on_progress=interrupt)
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_cache_writes_a_damaged_checkpoint_again(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = cache.inflated(model, tmp_path, 50_000)
    shard = next(target.glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert cache.inflated(model, tmp_path, 50_000) == target
    assert shard.read_bytes() == whole
    assert "truncated" in caplog.text


def test_cache_refuses_a_second_writer(model: Path, tmp_path: Path) -> None:
    def second(nbytes: int) -> None:
        with pytest.raises(PromoeError, match="another process is writing"):
            cache.inflated(model, tmp_path, 50_000)

    cache.inflated(model, tmp_path, 50_000, on_begin=second)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "promoe-triton"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "promoe-triton"


def test_expert_bytes_for_a_total(model: Path) -> None:
    total = 10**8
    plan = inflate.plan_inflation(model, inflate.expert_bytes_for(model, total))
    assert total <= plan.expert_bytes * plan.experts < 1.1 * total
