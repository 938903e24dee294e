"""Traces: what is recorded is what a model did, however it is run; what is read is what was recorded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer
from typer.testing import CliRunner
from zoo import FAMILIES

import promoe_triton
from promoe_triton.cli import trace as recording
from promoe_triton.cli.commands import app
from promoe_triton.demo import MODEL
from promoe_triton.errors import PromoeError
from promoe_triton.traces import Document, TracedLayer, TraceWriter, read_trace
from promoe_triton.tracing import Tracer

HELDOUT = MODEL.parent / "heldout.txt"
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]


def build(name: str = "qwen3_moe") -> Any:
    torch.manual_seed(0)
    return FAMILIES[name].build()


def record(model: Any, prompt: int = 4, piece: int = 256) -> dict[str, Tensor]:
    with Tracer(model) as tracer:
        return tracer.document(TOKENS, prompt, piece)


class TestRecording:
    def test_the_routing_is_the_routers_own(self) -> None:
        model = build()
        chosen: dict[int, list[Tensor]] = {}
        given: dict[int, list[Tensor]] = {}
        for layer, block in enumerate(model.model.layers):

            def note(module: Any, args: Any, output: Any, layer: int = layer) -> None:
                given.setdefault(layer, []).append(args[0].reshape(-1, args[0].shape[-1]))
                chosen.setdefault(layer, []).append(output[-1])

            block.mlp.gate.register_forward_hook(note)
        seen = record(model)
        for layer in chosen:
            assert torch.equal(seen[f"ids.{layer}"].long(), torch.cat(chosen[layer]))
            assert torch.equal(seen[f"state.{layer}"], torch.cat(given[layer]))
        assert seen["is_prefill"].tolist() == [True] * 4 + [False] * 9
        assert seen["token_ids"].tolist() == TOKENS
        assert len(chosen) > 1

    def test_states_at_all_seams(self) -> None:
        model = build()
        with torch.no_grad():
            hidden = model(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states
        seen = record(model, prompt=len(TOKENS))
        for layer in range(len(hidden) - 1):
            assert torch.equal(seen[f"entered.{layer}"], hidden[layer][0])
        assert torch.equal(model.model.norm(seen["left"]), hidden[-1][0])

    @pytest.mark.parametrize("slots", [3, None], ids=["few", "all"])
    def test_a_patched_model_gives_the_same_trace(self, slots: int | None) -> None:
        want = record(build())
        model = promoe_triton.patch(build(), slots=slots, store="auto" if slots is None else "spool")
        got = record(model)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)

    def test_token_by_token(self) -> None:
        want, got = record(build()), record(build(), piece=1)
        assert all(torch.equal(got[name], want[name]) for name in want if name.startswith("ids"))
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)

    def test_the_model_is_as_before(self) -> None:
        model = build()
        record(model)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    @pytest.mark.parametrize("name", ["llama4_text", "jetmoe"])
    def test_experts_that_are_not_given_ids_by_token(self, name: str) -> None:
        with pytest.raises(PromoeError, match=r"cannot be traced"):
            record(build(name))

    def test_a_model_without_experts(self) -> None:
        with pytest.raises(PromoeError, match="no MoE experts"):
            Tracer(torch.nn.Linear(2, 2))


LAYERS = [TracedLayer(path="a", experts=4, active=2, hidden=3)]
ABOUT = {"model": "m", "gates": "g"}


def some(number: int, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "token_ids": torch.randint(9, (tokens,), generator=generator, dtype=torch.int32),
        "position": torch.arange(tokens, dtype=torch.int32),
        "is_prefill": torch.arange(tokens) < 2,
        "ids.0": torch.randint(4, (tokens, 2), generator=generator, dtype=torch.int16),
        "weights.0": torch.rand(tokens, 2, generator=generator),
    }


SIZES = (5, 1, 7, 3, 4)


def write(folder: Path, begin: int = 0, end: int = len(SIZES), shard_tokens: int = 6) -> TraceWriter:
    writer = TraceWriter(folder, ABOUT, LAYERS, shard_tokens)
    for number in range(begin, end):
        writer.add(some(number, SIZES[number]), number // 2)
    return writer


def same(document: Document, number: int) -> bool:
    want = some(number, SIZES[number])
    return (
        (document.number, document.text) == (number, number // 2)
        and document.tokens == SIZES[number]
        and torch.equal(document.token_ids_T, want["token_ids"])
        and torch.equal(document.is_prefill_T, want["is_prefill"])
        and torch.equal(document.expert_ids_TA(0), want["ids.0"].long())
        and torch.equal(document.weights_TA(0), want["weights.0"])
    )


class TestFiles:
    def test_what_is_read_is_what_was_written(self, tmp_path: Path) -> None:
        write(tmp_path).flush()
        trace = read_trace(tmp_path)
        assert (trace.documents, trace.tokens, trace.layers) == (5, sum(SIZES), tuple(LAYERS))
        assert [shard.documents for shard in trace.shards] == [2, 1, 2]
        assert [same(document, number) for number, document in enumerate(trace.read())] == [True] * 5
        assert next(trace.read()).state_TD(0) is None

    def test_goes_on_after_the_last_complete_shard(self, tmp_path: Path) -> None:
        write(tmp_path, end=4)  # the fourth waits, and is lost
        writer = TraceWriter(tmp_path, ABOUT, LAYERS, 6)
        assert writer.documents == 3
        write(tmp_path, begin=3).flush()
        assert [same(document, number) for number, document in enumerate(read_trace(tmp_path).read())] == [True] * 5

    def test_another_model(self, tmp_path: Path) -> None:
        write(tmp_path).flush()
        for about, layers, what in (
            (ABOUT | {"model": "n", "gates": "h"}, LAYERS, "model, gates"),
            (ABOUT, [*LAYERS, *LAYERS], "layers"),
        ):
            with pytest.raises(PromoeError, match=rf"a trace of something else \(other {what}\)"):
                TraceWriter(tmp_path, about, layers, 6)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(PromoeError, match="holds no trace"):
            read_trace(tmp_path)

    def test_empty(self, tmp_path: Path) -> None:
        write(tmp_path, end=1, shard_tokens=100)
        with pytest.raises(PromoeError, match="is empty"):
            read_trace(tmp_path)

    def test_another_format(self, tmp_path: Path) -> None:
        write(tmp_path).flush()
        header = json.loads((tmp_path / "trace.json").read_text())
        (tmp_path / "trace.json").write_text(json.dumps(header | {"format": 99}))
        with pytest.raises(PromoeError, match="format 99"):
            read_trace(tmp_path)
        (tmp_path / "trace.json").write_text('{"format": 2}')
        with pytest.raises(PromoeError, match="no header of a trace"):
            read_trace(tmp_path)

    def test_truncated(self, tmp_path: Path) -> None:
        write(tmp_path).flush()
        shard = tmp_path / "shard-00001.safetensors"
        content = shard.read_bytes()
        shard.write_bytes(content[:-8])
        with pytest.raises(PromoeError, match=r"shard-00001.safetensors cannot be read .*record the trace again"):
            list(read_trace(tmp_path).read())
        shard.unlink()
        with pytest.raises(PromoeError, match=r"lacks shard-00001.safetensors"):
            read_trace(tmp_path)

    def test_a_shard_of_something_else(self, tmp_path: Path) -> None:
        write(tmp_path).flush()
        shard = tmp_path / "shard-00002.safetensors"
        save_file({name: tensor[:-1].clone() for name, tensor in load_file(shard).items()}, shard)
        with pytest.raises(PromoeError, match=r"does not hold the documents"):
            list(read_trace(tmp_path).read())


class TestCommand:
    def run(self, *arguments: object) -> Any:
        return CliRunner().invoke(app, ["trace", *map(str, arguments)])

    def test_the_demo_model(self, tmp_path: Path) -> None:
        options = (MODEL, "--text", HELDOUT, "--length", 24, "--prompt", 8, "--out", tmp_path / "t", "--json")
        done = self.run(*options, "--documents", 2, "--slots", "0.25")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["documents"] == 2
        trace = read_trace(tmp_path / "t")
        assert (trace.tokens, len(trace.layers)) == (48, 8)
        assert trace.about["texts"] == [
            {"name": "heldout.txt", "sha256": hashlib.sha256(HELDOUT.read_bytes()).hexdigest()}
        ]
        assert trace.about.keys() >= {"model", "revision", "architecture", "dtype", "gates", "recording"}
        assert trace.about["versions"].keys() == {"promoe_triton", "torch", "transformers"}
        first = next(trace.read())
        assert (first.expert_ids_TA(7).max() < trace.layers[7].experts).all()
        # More of the same text goes on where that ended.
        assert self.run(*options, "--documents", 3).exit_code == 0
        assert [shard.documents for shard in read_trace(tmp_path / "t").shards] == [2, 1]

    def test_no_more_than_a_block_is_in_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Documents are those of the text as a whole; the second text begins a document of its own."""
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        text = HELDOUT.read_text()[:6000]
        (tmp_path / "a.txt").write_text(text)
        (tmp_path / "b.txt").write_text(text[:300])
        seen: list[int] = []

        def tokens(part: str, **options: Any) -> Any:
            seen.append(len(part))
            return tokenizer(part, **options)

        monkeypatch.setattr(recording, "BLOCK", 500)
        found = list(recording._documents(tokens, [tmp_path / "a.txt", tmp_path / "b.txt"], 32))
        assert max(seen) < 700
        assert tokenizer.decode([token for ids, number in found if not number for token in ids]) == text
        sizes = [[len(ids) for ids, number in found if number == text] for text in (0, 1)]
        assert all({*of[:-1]} == {32} and 1 < of[-1] <= 32 for of in sizes)
        assert [number for _, number in found] == sorted(number for _, number in found)
        assert {number for _, number in found} == {0, 1}

    def test_texts_are_not_read_further_than_they_are_asked_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(recording, "BLOCK", 100)
        tokenizer, seen = AutoTokenizer.from_pretrained(MODEL), []
        documents = recording._documents(lambda p, **o: seen.append(p) or tokenizer(p, **o), [HELDOUT], 8)
        next(documents)
        assert sum(map(len, seen)) < 1000

    def test_bad_texts(self, tmp_path: Path) -> None:
        (tmp_path / "empty.txt").write_text("")
        (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
        for name, message in (("empty.txt", "no document"), ("latin.txt", "not UTF-8"), ("none.txt", "No such file")):
            done = self.run(MODEL, "--text", tmp_path / name, "--out", tmp_path / "t")
            assert done.exit_code in (1, 2)
            assert message in " ".join(done.output.split())
        assert not (tmp_path / "t").exists()
