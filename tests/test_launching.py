"""The second launch of a kernel goes straight to what the first has compiled, with the arguments Triton would pass.

Without a GPU: Triton's own way to run a kernel is replaced, and takes notes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton

from promoe_triton.kernels import launching
from promoe_triton.kernels.checks import IS_INTERPRETED
from promoe_triton.kernels.launching import launch


class Compiled:
    """Stands for what Triton has compiled."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.launched.append((grid, *args))


class Kernel(triton.JITFunction[Any]):  # type: ignore[misc]
    """A kernel of two pointers, a number and two constants, that is never compiled."""

    def __init__(self) -> None:
        self.arg_names = ["out_ptr", "x_ptr", "n", "BLOCK", "KIND"]
        self.compiled: list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any], Compiled]] = []
        self.devices: list[int] = []

    def __getitem__(self, grid: Any) -> Any:
        def run(*args: Any, **options: Any) -> Compiled:
            made = Compiled()
            self.devices.append(torch.cuda.current_device())
            self.compiled.append((grid, args, options, made))
            return made

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # what a tensor in RAM says of its device
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(launching, "_compiled", {})
    return Kernel()


OPTIONS = {"KIND": "silu", "BLOCK": 64, "num_warps": 4}
ROOM = torch.zeros(4096 + 16, dtype=torch.float32)
FIRST = -ROOM.data_ptr() % 64 // 4
X = ROOM[FIRST : FIRST + 64]


def test_the_second_launch_goes_straight_to_what_was_compiled(kernel: Kernel) -> None:
    out = torch.zeros_like(X)
    launch(kernel, 3, (X, out, 7), OPTIONS)
    ((grid, args, options, made),) = kernel.compiled
    assert (grid, options) == ((3,), OPTIONS)
    assert args[2] == 7
    assert not made.launched, "Triton has launched it"
    launch(kernel, 5, (X, X, 7), OPTIONS)
    assert len(kernel.compiled) == 1
    ((grid, *args),) = made.launched
    assert grid == (5, 1, 1)
    assert args == [X, X, 7, 64, "silu"], "constants in the order of the kernel, without the compiler's options"


@pytest.mark.parametrize(
    ("args", "options"),
    [
        pytest.param((ROOM[FIRST + 1 : FIRST + 65], X, 7), OPTIONS, id="an-address-that-is-no-multiple"),
        pytest.param((X, X.to(torch.bfloat16), 7), OPTIONS, id="another-type"),
        pytest.param((X, X, 16), OPTIONS, id="another-number"),
        pytest.param((X, X, 7.0), OPTIONS, id="another-kind-of-number"),
        pytest.param((X, X, 7), OPTIONS | {"BLOCK": 32}, id="another-constant"),
        pytest.param((X, X, 7), OPTIONS | {"num_warps": 8}, id="another-option"),
    ],
)
def test_what_triton_may_compile_anew(args: tuple[Any, ...], options: dict[str, Any], kernel: Kernel) -> None:
    launch(kernel, 1, (X, X, 7), OPTIONS)
    launch(kernel, 1, args, options)
    assert len(kernel.compiled) == 2
    launch(kernel, 1, args, options)
    launch(kernel, 1, (X, X, 7), OPTIONS)
    assert len(kernel.compiled) == 2
    assert [len(made.launched) for *_, made in kernel.compiled] == [1, 1]


def test_another_device_is_made_the_current_one(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    current = [1]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])

    class Device:
        def __init__(self, number: int) -> None:
            self._number = number

        def __enter__(self) -> None:
            current.append(self._number)

        def __exit__(self, *_: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Device)
    launch(kernel, 1, (X, X, 7), OPTIONS)
    assert current == [1]
    assert kernel.devices == [X.get_device()]


def test_it_does_not_grow_for_ever(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "MOST", 8)
    for n in range(100):
        launch(kernel, 1, (X, X, n), OPTIONS)
        assert len(launching._compiled) <= 8


@pytest.mark.skipif(not IS_INTERPRETED, reason="kernels run on a GPU here")
def test_the_interpreter_goes_its_own_way() -> None:
    from promoe_triton.kernels.combine import combine_kernel

    before = dict(launching._compiled)
    ids, weights = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]])
    y, out = torch.zeros(1, 16), torch.ones(2, 16)
    options = {"A": 2, "D": 16, "E": 2, "IDENTITIES": 0, "IS_WEIGHTED": False, "HAS_ORDER": False, "BLOCK_D": 16}
    launch(combine_kernel, 1, (y, 16, out, 16, out, 16, ids, ids, weights), options)
    assert torch.equal(y, torch.full((1, 16), 0.75))
    assert launching._compiled == before
