"""What a timeline shows of a run, and the file it writes."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_proactive import Names, computing, faked
from zoo import FAMILIES

import promoe_triton
from promoe_triton.protocols import Chunk, ExpertKey, Observation, Part, Prediction, Seam, Transfer
from promoe_triton.timeline import Span, Timeline

F = FAMILIES["mixtral"]


def test_a_trace_begins_at_zero_and_has_the_computing_lane_first() -> None:
    timeline = Timeline()
    timeline.add("copy 0", "layer 1 expert 2", "urgent", 10.5, 10.75)
    timeline.add("compute", "layer 1 up of 2", "compute", 10.0, 10.5)
    names, spans = ([event for event in timeline.trace()["traceEvents"] if event["ph"] == kind] for kind in ("M", "X"))
    assert [(event["tid"], event["args"]["name"]) for event in names] == [(0, "compute"), (1, "copy 0")]
    assert [(event["tid"], event["ts"], event["dur"], event["cat"]) for event in spans] == [
        (0, 0.0, 0.5e6, "compute"),
        (1, 0.5e6, 0.25e6, "urgent"),
    ]


def test_chunks_say_which_bytes_they_are_and_what_was_dropped_is_a_moment() -> None:
    timeline = Timeline()
    transfer = Transfer(key=ExpertKey(2, 7), part=Part.WHOLE)
    timeline.copied("copy 1", Chunk(transfer, 4096, 12288, True), 1.0, 1.5)
    timeline.add("copy", "layer 2 drops 7", "dropped", 1.25, 1.25)
    chunk, moment = [event for event in timeline.trace()["traceEvents"] if event["ph"] != "M"]
    assert (chunk["cat"], chunk["args"]) == ("speculation", {"offset": 4096, "bytes": 8192})
    assert (moment["ph"], moment["ts"], "dur" in moment) == ("i", 0.25e6, False)


class Wrong:
    """Names the same experts for the next layer, again and again."""

    stateless = True

    def predict(self, seen: Observation) -> list[Prediction]:
        if seen.seam is not Seam.ROUTED or seen.layer:
            return []
        return [Prediction(layer=1, steps=0, expert_ids=torch.arange(6), scores=torch.zeros(6))]


def test_what_a_gate_drops_is_seen(tmp_path: Path) -> None:
    """Copies of experts that the next layer does not need, over a link so slow that they are on their way still."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"predictor": Wrong(), "always_predict": True, "bandwidth": "1MB/s", "warm": False}
    model = promoe_triton.patch(F.build(), slots=6, store="spool", spool_dir=tmp_path, **options)
    with promoe_triton.record_timeline(model) as timeline, torch.no_grad():
        for _ in range(4):
            model(**F.inputs(model, 1))
    dropped = [span.name for span in timeline.spans if span.kind == "dropped"]
    assert dropped
    assert all(name.startswith("layer 1 drops ") for name in dropped)
    ahead = promoe_triton.stats(model).ahead
    assert sum(name.count(",") + 1 for name in dropped) == ahead.dropped > 0


def test_what_is_overtaken_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a link known exactly: copies for the next token have begun, and what a layer waits for passes them."""
    model: Any = F.build()
    nbytes = sum(parameter[0].nbytes for parameter in model.model.layers[0].mlp.experts.parameters())
    made = faked(monkeypatch, bandwidth=1.25 * nbytes / 1e-3)
    rng = random.Random(0)

    def choose() -> Prediction:
        ids = torch.tensor(rng.sample(range(6), 3))
        return Prediction(layer=rng.randrange(2), steps=1, expert_ids=ids, scores=torch.zeros(3))

    options: dict[str, Any] = {"predictor": Names(choose), "always_predict": True, "chunk": 4096}
    promoe_triton.patch(model, slots=8, store="spool", spool_dir=tmp_path, **options)
    computing(model, made.links[0], 1e-3)
    with promoe_triton.record_timeline(model) as timeline, torch.no_grad():
        for token in range(12):
            model(torch.tensor([[token]]))
    timeline.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"urgent", "speculation", "compute", "stall", "predict", "dropped"} <= {event.get("cat") for event in events}
    copies = [event for event in events if event.get("cat") in ("urgent", "speculation")]
    assert max(event["args"]["bytes"] for event in copies) <= 4096 < nbytes
    assert {event["args"]["offset"] for event in copies} > {0, 4096}
    overtaken = set()
    for name in {copy["name"] for copy in copies}:
        mine = [i for i, copy in enumerate(copies) if copy["name"] == name]
        for i, j in pairwise(mine):
            before, after = copies[i], copies[j]
            goes_on = after["args"]["offset"] == before["args"]["offset"] + before["args"]["bytes"]
            between = {copy["cat"] for copy in copies[i + 1 : j]}
            if before["cat"] == after["cat"] == "speculation" and goes_on and "urgent" in between:
                overtaken.add(name)
    assert overtaken


def test_the_oldest_spans_go_first() -> None:
    timeline = Timeline(most=2)
    for begin in range(4):
        timeline.add("compute", str(begin), "compute", begin, begin + 1)
    assert [span.name for span in timeline.spans] == ["2", "3"]


@pytest.mark.parametrize("slots", [4, None], ids=["few slots", "all resident"])
def test_a_run_is_recorded_inside_the_block_and_nowhere_else(slots: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = promoe_triton.patch(F.build(), slots=slots, store="spool" if slots else "auto", spool_dir=tmp_path)
    inputs = F.inputs(model, 7)
    with promoe_triton.record_timeline(model) as timeline:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    spans = list(timeline.spans)
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert list(timeline.spans) == spans
    assert all(span.begin <= span.end for span in spans)
    kinds = {span.kind for span in spans}
    layers = {span.name.split(" of ")[0] for span in spans if span.kind == "compute"}
    assert layers == {f"layer {layer} {half}" for layer in range(len(model._promoe_runtime.layers)) for half in HALVES}
    if slots:
        assert {"stall", "urgent", "predict"} <= kinds
        assert_lanes_do_one_thing_at_a_time(spans)
    file = tmp_path / "trace.json"
    timeline.save(file)
    assert len(json.loads(file.read_text())["traceEvents"]) > len(spans)


HALVES = ("up", "down")


def assert_lanes_do_one_thing_at_a_time(spans: list[Span]) -> None:
    for lane in {span.lane for span in spans}:
        mine = sorted((span for span in spans if span.lane == lane), key=lambda span: span.begin)
        for before, after in pairwise(mine):
            assert before.end <= after.begin, f"{before} and {after} overlap"


def test_only_a_patched_model_has_one() -> None:
    with pytest.raises(promoe_triton.PromoeError, match="not patched"), promoe_triton.record_timeline(F.build()):
        pass
