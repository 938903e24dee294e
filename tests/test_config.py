"""What a user may ask for, and what is refused before anything is touched."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zoo import FAMILIES

import promoe_triton
from promoe_triton.config import Config, check_slots, configured, format_size, parse_size

NAN, INF = float("nan"), float("inf")


def test_defaults_are_valid() -> None:
    config = Config()
    assert config.slots is None
    assert config.device == "auto"
    assert config.chunk_bytes == 4 * 2**20


@pytest.mark.parametrize(
    "slots",
    [
        pytest.param(None, id="whatever-fits"),
        pytest.param(1, id="least-count"),
        pytest.param(10**9, id="count-above-any-model"),
        pytest.param(1.0, id="all"),
        pytest.param(1e-9, id="smallest-share"),
        pytest.param("12GiB", id="size"),
        pytest.param("1B", id="least-size"),
    ],
)
def test_slots(slots: Any) -> None:
    assert Config(slots=slots).slots == slots


@pytest.mark.parametrize(
    ("slots", "error", "message"),
    [
        pytest.param(0, ValueError, "at least 1", id="0"),
        pytest.param(-1, ValueError, "at least 1", id="negative"),
        pytest.param(0.0, ValueError, r"\(0, 1\]", id="0.0"),
        pytest.param(-0.5, ValueError, r"\(0, 1\]", id="negative-share"),
        pytest.param(1.5, ValueError, r"\(0, 1\]", id="1.5"),
        pytest.param(2.0, ValueError, "a count is an int", id="count-as-float"),
        pytest.param(NAN, ValueError, r"\(0, 1\]", id="nan"),
        pytest.param(INF, ValueError, r"\(0, 1\]", id="inf"),
        pytest.param(True, TypeError, "got True", id="True"),
        pytest.param(False, TypeError, "got False", id="False"),
        pytest.param([4], TypeError, r"got \[4\]", id="list"),
        pytest.param(b"1GiB", TypeError, "got b'1GiB'", id="bytes"),
        pytest.param("12", ValueError, "got '12'", id="no-unit"),
        pytest.param("", ValueError, "got ''", id="empty"),
        pytest.param("GiB", ValueError, "got 'GiB'", id="no-number"),
        pytest.param("abc GiB", ValueError, "got 'abc GiB'", id="abc-GiB"),
        pytest.param("-1GiB", ValueError, "got '-1GiB'", id="negative-size"),
        pytest.param("0GiB", ValueError, "must be positive", id="0GiB"),
        pytest.param("0.1B", ValueError, "must be positive", id="less-than-a-byte"),
        pytest.param("1e999GiB", ValueError, "got '1e999GiB'", id="infinite-size"),
        pytest.param("nanGiB", ValueError, "got 'nanGiB'", id="nan-size"),
        pytest.param("1.2.3GiB", ValueError, "got '1.2.3GiB'", id="two-points"),
        pytest.param("4 slots", ValueError, "got '4 slots'", id="unknown-unit"),
    ],
)
def test_bad_slots(slots: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_slots(slots)
    with pytest.raises(error, match=message):
        Config(slots=slots)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param({"device": "gpu"}, ValueError, "'cuda' or a GPU such as 'cuda:1', got 'gpu'", id="device-gpu"),
        pytest.param({"device": "cuda:x"}, ValueError, "got 'cuda:x'", id="device-number"),
        pytest.param({"device": None}, TypeError, "got None", id="device-none"),
        pytest.param({"store": "host"}, ValueError, "store must be one of auto, checkpoint, spool", id="store"),
        pytest.param({"io": "mmap"}, ValueError, "io must be one of auto, buffered, direct", id="io"),
        pytest.param({"io": None}, ValueError, "got None", id="io-none"),
        pytest.param({"partition": "none"}, ValueError, "partition must be one of auto, layer, global", id="partition"),
        pytest.param({"policy": "fifo"}, ValueError, "one of auto, lru, lfru, predicted, static", id="policy"),
        pytest.param({"backend": "cuda"}, ValueError, "backend must be one of auto, torch", id="backend"),
        pytest.param({"depth": 0}, ValueError, "depth must be at least 1, got 0", id="depth-0"),
        pytest.param({"chunk": 0}, ValueError, "multiple of 4096", id="chunk-0"),
        pytest.param({"chunk": -4096}, ValueError, "multiple of 4096", id="chunk-negative"),
        pytest.param({"chunk": 4095}, ValueError, "multiple of 4096.*4095", id="chunk-below-a-page"),
        pytest.param({"chunk": 5000}, ValueError, "multiple of 4096", id="chunk-no-multiple"),
        pytest.param({"chunk": "1MB"}, ValueError, "multiple of 4096.*'1MB'", id="chunk-decimal-size"),
        pytest.param({"chunk": "big"}, ValueError, "got 'big'", id="chunk-no-size"),
        pytest.param({"io_timeout": 0}, ValueError, "io_timeout must be a positive", id="io_timeout-0"),
        pytest.param({"io_timeout": -1.0}, ValueError, "io_timeout must be a positive", id="io_timeout-negative"),
        pytest.param({"io_timeout": NAN}, ValueError, "io_timeout must be a positive", id="io_timeout-nan"),
        pytest.param({"io_timeout": INF}, ValueError, "io_timeout must be a positive", id="io_timeout-inf"),
        pytest.param({"lock_timeout": 1e10}, ValueError, "lock_timeout must be a positive", id="lock_timeout-1e10"),
        pytest.param({"lock_timeout": 0.0}, ValueError, "lock_timeout must be a positive", id="lock_timeout-0"),
        pytest.param({"lock_timeout": NAN}, ValueError, "lock_timeout must be a positive", id="lock_timeout-nan"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Config(**options)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"depth": 1.5}, id="depth-no-int"),
        pytest.param({"depth": "2"}, id="depth-text"),
        pytest.param({"depth": True}, id="depth-bool"),
        pytest.param({"depth": 10**9}, id="depth-a-billion-threads"),
        pytest.param({"chunk": 4096.0}, id="chunk-float"),
        pytest.param({"chunk": True}, id="chunk-bool"),
        pytest.param({"bandwidth": True}, id="bandwidth-bool"),
        pytest.param({"bandwidth": NAN}, id="bandwidth-nan"),
        pytest.param({"bandwidth": INF}, id="bandwidth-inf"),
        pytest.param({"bandwidth": 0}, id="bandwidth-0"),
        pytest.param({"bandwidth": [1]}, id="bandwidth-list"),
        pytest.param({"warm": "no"}, id="warm-text"),
        pytest.param({"always_predict": 1}, id="always-predict-number"),
        pytest.param({"spool_dir": 3}, id="spool_dir-int"),
        pytest.param({"profile": 3}, id="profile-int"),
        pytest.param({"tiles": 3}, id="tiles-int"),
        pytest.param({"io_timeout": "60"}, id="io_timeout-text"),
        pytest.param({"io_timeout": True}, id="io_timeout-bool"),
        pytest.param({"lock_timeout": "60"}, id="lock_timeout-text"),
        pytest.param({"lock_timeout": None}, id="lock_timeout-none"),
    ],
)
def test_options_of_another_type(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(options))} must be"):
        Config(**options)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        pytest.param({"slots": np.int64(4)}, int, id="count"),
        pytest.param({"slots": np.float32(0.5)}, float, id="share"),
        pytest.param({"slots": np.float64(0.5)}, float, id="share-that-is-a-float"),
        pytest.param({"depth": np.int32(2)}, int, id="depth"),
        pytest.param({"chunk": np.int64(8192)}, int, id="chunk"),
        pytest.param({"bandwidth": np.float64(1e9)}, float, id="bandwidth"),
        pytest.param({"distance": np.uint8(3)}, int, id="distance"),
        pytest.param({"latency": np.float32(0.25)}, float, id="latency"),
    ],
)
def test_numbers_of_numpy_are_numbers(options: dict[str, Any], kind: type) -> None:
    """As tables of experiments hold them."""
    ((name, given_),) = options.items()
    value = getattr(Config(**options), name)
    assert type(value) is kind
    assert value == given_


@pytest.mark.parametrize(
    ("chunk", "nbytes"), [(4096, 4096), ("1MiB", 2**20), ("4 KiB", 4096)], ids=["int", "size", "least"]
)
def test_chunk_bytes(chunk: int | str, nbytes: int) -> None:
    assert Config(chunk=chunk).chunk_bytes == nbytes


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().slots = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1B", 1),
        ("12GiB", 12 * 2**30),
        ("12gib", 12 * 2**30),
        (" 800 MB ", 800 * 10**6),
        ("1.5e9 B", 1_500_000_000),
        (".5KiB", 512),
        ("2KB", 2000),
        ("2TB", 2 * 10**12),
        ("1TiB", 2**40),
        ("1e-1KB", 100),
        ("0GiB", 0),
    ],
)
def test_parse_size(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@given(st.integers(0, 2**50))
def test_bytes_survive_parse_size(nbytes: int) -> None:
    assert parse_size(f"{nbytes}B") == nbytes


@given(st.text())
def test_parse_size_gives_bytes_or_says_what_it_wants(text: str) -> None:
    try:
        nbytes = parse_size(text)
    except ValueError as error:
        assert f"got {text!r}" in str(error)  # noqa: PT017
    else:
        assert nbytes >= 0
        assert re.search("[bB]", text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (9_437_184, "9.44 MB"),
        (999_600, "1000 kB"),
        (62e9, "62 GB"),
        (1_234_000_000_000, "1234 GB"),
        (-2_000_000, "-2 MB"),
    ],
)
def test_format_size(nbytes: float, text: str) -> None:
    assert format_size(nbytes) == text


class TestThroughPatch:
    """Options come as keywords of `patch`, and a refused one leaves the model alone."""

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            pytest.param({"slots": 0}, ValueError, "at least 1", id="slots-0"),
            pytest.param({"slots": True}, TypeError, "got True", id="slots-True"),
            pytest.param({"slots": "12"}, ValueError, "got '12'", id="slots-no-unit"),
            pytest.param({"slot": 3}, TypeError, "slot", id="unknown-name"),
            pytest.param({"device": "gpu"}, ValueError, "a GPU such as", id="device-gpu"),
            pytest.param({"policy": "fifo", "slots": 3}, ValueError, "policy", id="policy"),
        ],
    )
    def test_refused(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        model = FAMILIES["mixtral"].build()
        before = dict(model.named_parameters())
        with pytest.raises(error, match=message):
            promoe_triton.patch(model, **options)
        assert type(model).__module__.startswith("transformers")
        assert type(model).__mro__[1].__module__.startswith("transformers")
        after = dict(model.named_parameters())
        assert after.keys() == before.keys()
        assert all(after[name] is before[name] for name in before)

    def test_keywords_override_a_config(self) -> None:
        model = FAMILIES["mixtral"].build()
        promoe_triton.patch(model, Config(slots=5, policy="lfru", store="spool"), slots=4)
        assert promoe_triton.stats(model).slots == 4
        assert model._promoe_runtime.config.policy == "lfru"  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        ("slots", "count"),
        [
            pytest.param(1, 1, id="1"),
            pytest.param(7, 7, id="7"),
            pytest.param(12, 12, id="all"),
            pytest.param(100, 12, id="more-than-all"),
            pytest.param(0.5, 6, id="half"),
            pytest.param(0.01, 1, id="share-of-less-than-one"),
            pytest.param(1.0, 12, id="share-of-all"),
            pytest.param(None, 12, id="whatever-fits"),
            pytest.param("1GiB", 12, id="size-above-all"),
        ],
    )
    def test_how_many_slots(self, slots: Any, count: int) -> None:
        model = promoe_triton.patch(FAMILIES["mixtral"].build(), slots=slots, store="spool")
        assert promoe_triton.stats(model).slots == count
        assert promoe_triton.stats(model).experts == 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slot": 4}, "there is no option 'slot'; did you mean slots?"),
        ({"colour": 1}, "there is no option 'colour'; there are"),
    ],
)
def test_an_option_that_is_not_one_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        configured(None, options)
    with pytest.raises(TypeError, match=re.escape(words)):
        promoe_triton.patch(torch.nn.Linear(1, 1), **options)


def test_a_slip_of_the_pen_does_not_go_to_transformers(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"there is no option 'predicter'; did you mean predictor\?"):
        promoe_triton.from_pretrained(str(tmp_path), predicter="gate")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "predicted"),
        ({"ablation": "lru"}, "lru"),
        ({"ablation": "+reorder"}, "lru"),
        ({"ablation": "static"}, "static"),
        ({"ablation": "layer", "policy": "lfru"}, "static"),
        ({"policy": "lfru"}, "lfru"),
        ({"ablation": "+prefetch", "policy": "predicted"}, "predicted"),
    ],
)
def test_which_policy_is_meant(options: dict[str, Any], name: str) -> None:
    assert Config(**options).replacement == name
