"""Tuning: what is tried, which wins, what is kept; on made-up times, and once end to end in the interpreter."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from promoe_triton import PromoeError
from promoe_triton.cli import app
from promoe_triton.cli.tune import Tuning, parse_shape, shapes_of_model
from promoe_triton.kernels import measuring
from promoe_triton.kernels.measuring import Kept, Measurer
from promoe_triton.kernels.shapes import MAIN, SHAPES, TINY
from promoe_triton.kernels.tiles import TABLE, Tile, table_for
from promoe_triton.kernels.tuning import (
    CANDIDATES,
    FORMS,
    TOKENS,
    Choice,
    Entry,
    Measurement,
    Place,
    Problem,
    Product,
    Search,
    candidates,
    choose,
    dumped,
    merged,
    places,
    present_entry,
    problems,
)

BF16 = torch.bfloat16
TARGETS = json.loads(TABLE.read_text())["targets"]
GROUPED = Place(form="grouped", block=16)


def entry(columns: int = 64, gated: int = 32, depth: int = 64, warps: int = 4, stages: int = 3) -> Entry:
    return Entry(columns=columns, gated_columns=gated, depth=depth, warps=warps, stages=stages)


def taken(seconds: float) -> Measurement:
    return Measurement(p20=seconds, p50=seconds, p80=seconds * 1.02, error=1e-3)


PROBLEMS = [Problem(shape=MAIN[0], T=8), Problem(shape=MAIN[3], T=8)]


class Fake:
    """Times by tile, warps and problem; counts what it was asked for."""

    def __init__(self, slow: dict[int, float]) -> None:
        self.slow, self.asked = slow, list[tuple[Product, Tile]]()

    def __call__(self, product: Product, tile: Tile) -> Measurement:
        self.asked.append((product, tile))
        return taken(1e-5 * self.slow.get(tile.columns, 1.0))


@pytest.mark.parametrize("target", [*TARGETS, "interpreter"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_there_are_candidates_for_every_entry_of_every_target(target: str, dtype: torch.dtype) -> None:
    found = places(target, dtype)
    assert {place.form for place in found} == set(FORMS)
    assert all(candidates(place, target, dtype) for place in found)
    if target in TARGETS:
        blocks = TARGETS[target]["32" if dtype == torch.float32 else "16"]["grouped"]
        assert [place.block for place in found if place.block] == [int(block) for block in blocks]
    everything = candidates(found[0], target, dtype)
    assert everything == sorted(everything, key=lambda e: e.simplicity)


def test_every_entry_answers_some_call_of_the_benchmark() -> None:
    table = table_for("sm_90")
    answered = {place: problems(place, table, MAIN, TOKENS, BF16) for place in places("sm_90", BF16)}
    assert all(answered.values())
    assert sum(map(len, answered.values())) == len(MAIN) * len(TOKENS)


def test_the_smallest_geometric_mean_wins_not_the_sum() -> None:
    # The second is twice as slow on the long problem and four times as fast on the short one.
    first, second = entry(64), entry(128)
    winner, ratio = choose({first: [4e-6, 1e-3], second: [1e-6, 2e-3]})
    assert winner == second
    assert ratio == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(("ratio", "simple"), [(1.009, True), (1.02, False)])
def test_of_equals_the_simpler_wins(ratio: float, simple: bool) -> None:
    plain, deep = entry(stages=2), entry(stages=5)
    assert (choose({deep: [1.0, 1.0], plain: [ratio, ratio]})[0] == plain) is simple


def test_each_product_is_measured_once_for_the_entries_that_share_it() -> None:
    measure = Fake({})
    search = Search(GROUPED, PROBLEMS, [entry(c, g) for c in (64, 128) for g in (32, 64)], BF16)
    steps = list(search.run(measure))
    # Two columns of one part and two of the other, for two problems each, instead of four entries of two parts.
    assert len(steps) == len(search) == len(measure.asked) == 8
    choice = search.choice()
    assert choice is not None
    assert choice.entry == entry(64, 32)
    assert choice.compared == choice.entries == 4


def test_what_is_far_too_slow_once_is_not_tried_again() -> None:
    measure = Fake({256: 9.0})
    search = Search(GROUPED, PROBLEMS, [entry(64), entry(256)], BF16)
    assert [found for *_, found in search.run(measure)].count(None) == 1
    assert sum(tile.columns == 256 for _, tile in measure.asked) == 1
    choice = search.choice()
    assert choice is not None
    assert (choice.entry, choice.compared, choice.entries) == (entry(64), 1, 2)


def test_what_is_wrong_never_wins() -> None:
    def measure(product: Product, tile: Tile) -> Measurement:
        return Measurement(error=0.3, reason="wrong") if tile.columns == 128 else taken(1.0)

    search = Search(GROUPED, PROBLEMS, [entry(64), entry(128)], BF16)
    list(search.run(measure))
    choice = search.choice()
    assert choice is not None
    assert choice.entry == entry(64)


def test_nothing_right_is_no_choice() -> None:
    search = Search(GROUPED, PROBLEMS, [entry(64)], BF16)
    list(search.run(lambda product, tile: Measurement(reason="failed")))
    assert search.choice() is None


def test_the_present_entry_comes_first_and_is_compared_with() -> None:
    present = entry(256, 32, stages=5)
    measure = Fake({256: 1.9})
    search = Search(GROUPED, PROBLEMS, [entry(64)], BF16, present)
    list(search.run(measure))
    assert measure.asked[0][1].stages == 5
    choice = search.choice()
    assert choice is not None
    assert choice.gain == pytest.approx((1.0 + 1.9) / 2)


def test_merging_replaces_one_entry_and_says_what_it_rests_on() -> None:
    before = json.loads(TABLE.read_text())
    choice = Choice(entry=entry(32, 16), ratio=1.0, spread=0.02, compared=3, entries=4, gain=1.25)
    after = merged(before, "sm_90", BF16, {GROUPED: choice}, {"device": "a card", "date": "today"})
    assert after["targets"]["sm_90"]["16"]["grouped"]["16"] == asdict(choice.entry)
    assert after["measured"]["sm_90"]["16 grouped 16"]["device"] == "a card"
    for target in TARGETS:
        for size in ("16", "32"):
            for form in FORMS:
                if (target, size, form) != ("sm_90", "16", "grouped"):
                    assert after["targets"][target][size][form] == before["targets"][target][size][form]
    assert json.loads(dumped(after)) == after
    assert before == json.loads(TABLE.read_text())


def test_the_shipped_table_is_written_as_it_is_read() -> None:
    text = dumped(json.loads(TABLE.read_text()))
    assert json.loads(text) == json.loads(TABLE.read_text())
    assert '"rows": {"columns": ' in text
    assert max(map(len, text.splitlines()[2:])) < 140


class Clock:
    """A clock that goes on by a second whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def cpu() -> torch.device:
    if not measuring.IS_INTERPRETED:
        pytest.skip("rehearses in Triton's interpreter")
    return torch.device("cpu")


def test_when_the_time_is_up_what_was_measured_is_chosen_from(cpu: torch.device, tmp_path: Path) -> None:
    measurer = Measurer(cpu, BF16, TINY, Kept(tmp_path / "kept"))
    measurer._measure = lambda product, tile: taken(1.0)  # type: ignore[method-assign]
    tables = json.loads(TABLE.read_text())
    until = Tuning(target="sm_90", dtype=BF16, measurer=measurer, base=tables, until=40.0, clock=Clock())
    written: list[dict[str, Any]] = []
    chosen = until.run(FORMS, TINY, [1, 8], written.append)
    assert set(chosen) == {Place(form="rows")}
    assert chosen[Place(form="rows")].compared < chosen[Place(form="rows")].entries
    assert until.left == 3
    assert len(written) == 1


def test_measurements_are_kept_and_a_cut_off_line_is_measured_again(cpu: torch.device, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    product, tile = (
        Product(problem=Problem(shape=TINY[0], T=1), part="up"),
        Tile(rows=1, columns=32, depth=64, warps=4, stages=1),
    )
    first = Measurer(cpu, BF16, TINY, Kept(path))
    found = first(product, tile)
    assert (found.reason, first.measured) == ("", 1)
    second = Measurer(cpu, BF16, TINY, Kept(path))
    assert (second(product, tile), second.measured) == (found, 0)
    assert second.key(product, tile)["source"]
    path.write_text(path.read_text()[:-20])
    assert len(Kept(path)) == 0


def test_a_kernel_that_computes_something_else_does_not_count(
    cpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(measuring.TOLERANCES, BF16, 1e-9)
    measurer = Measurer(cpu, BF16, TINY, Kept(tmp_path / "kept"))
    tile = Tile(rows=1, columns=32, depth=64, warps=4, stages=1)
    found = measurer(Product(problem=Problem(shape=TINY[0], T=1), part="up"), tile)
    assert found.reason.startswith("wrong")
    assert found.p50 == math.inf


def call(*args: str | Path) -> Any:
    return CliRunner().invoke(app, ["tune", *map(str, args)])


def test_rehearsal(cpu: torch.device, tmp_path: Path) -> None:
    out = tmp_path / "tiles.json"
    args = ("--out", out, "--shape", "tiny", "--shape", "tiny gpt-oss", "--tokens", "1", "--tokens", "8")
    result = call(*args)
    assert result.exit_code == 0, result.stderr
    tables = json.loads(out.read_text())
    assert {name: tables["targets"][name] for name in TARGETS} == TARGETS  # no GPU's entries come from a CPU
    assert set(tables["measured"]["interpreter"]) == {"16 rows", "16 rows_transposed", "16 grouped 16"}
    table = table_for("interpreter", out)
    for place in places("interpreter", BF16):
        assert present_entry(table, place, BF16) is not None
    kept = out.with_name("tiles.json.measurements.jsonl").read_text()
    assert call(*args).exit_code == 0
    assert out.with_name("tiles.json.measurements.jsonl").read_text() == kept


def test_a_model_is_tuned_for_by_its_configuration(tmp_path: Path) -> None:
    from transformers import GptOssConfig

    config = GptOssConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        num_local_experts=8,
        num_experts_per_tok=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=64,
    )
    config.architectures = ["GptOssForCausalLM"]
    config.save_pretrained(tmp_path)
    (shape,) = shapes_of_model(str(tmp_path))
    assert (shape.D, shape.F, shape.E, shape.A, shape.transposed, shape.biased) == (32, 48, 8, 2, True, True)
    assert (shape.gate.activation, shape.gate.interleaved) == ("clamped_swiglu", True)


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("--form", "columns"), 2, "form must be one of rows, rows_transposed, grouped, got 'columns'"),
        (("--shape", "2048/768/128"), 2, "--shape must be D/F/E/A"),
        (("--shape", "64/64/4/5"), 2, "more than there are"),
        (("--dtype", "int8"), 2, "--dtype must be one of"),
        (("--minutes", "0"), 2, "--minutes must be above 0"),
        (("--tokens", "0"), 2, "--tokens must be 1 or more"),
        (("--out", "/proc/tiles.json"), 1, "cannot write /proc/tiles.json"),
        (("--shape", "tiny", "--tokens", "1", "--form", "grouped"), 1, "nothing was tuned"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_done_is_said(args: tuple[str, ...], code: int, says: str, tmp_path: Path) -> None:
    args = args if "--out" in args else (*args, "--out", str(tmp_path / "tiles.json"))
    result = call(*args)
    assert result.exit_code == code
    assert says in " ".join(result.stderr.split())
    assert not (tmp_path / "tiles.json").exists()


def test_what_is_no_table_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "tiles.json"
    out.write_text("[1]")
    result = call("--out", out, "--shape", "tiny", "--tokens", "1")
    assert result.exit_code == 1
    assert "expected a JSON object" in " ".join(result.stderr.split())
    assert out.read_text() == "[1]"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "IS_INTERPRETED", False)
    with pytest.raises(PromoeError, match="tuning measures on a GPU"):
        measuring.device_to_tune()


def test_shapes_by_name_and_by_numbers() -> None:
    assert parse_shape("Mixtral") is SHAPES["Mixtral"]
    assert str(parse_shape("2048/768/128/8")) == "2048/768/128/8"


def test_nothing_tunes_but_the_command() -> None:
    """Importing the package and its kernels reads no candidates and loads nothing of tuning."""
    code = (
        "import sys, promoe_triton, promoe_triton.backends.triton, promoe_triton.cli\n"
        "assert not {'promoe_triton.kernels.tuning', 'promoe_triton.kernels.measuring'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert CANDIDATES.exists()
