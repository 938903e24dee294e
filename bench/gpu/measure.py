"""From a cell to its rows: is it right, how long does it take, how far is that from the roof."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grid
import rivals
import torch
from grid import Cell
from rivals import Absent
from stage import DoesNotFit, Stage
from table import Result
from torch import Tensor

from promoe_triton.kernels.combine import combine
from promoe_triton.kernels.samples import relative_error
from promoe_triton.kernels.schedule import schedule
from promoe_triton.kernels.shapes import SHAPES
from promoe_triton.kernels.tiles import TileTable
from promoe_triton.kernels.timing import Calls, Times, time_eager, time_graph, time_host
from promoe_triton.kernels.trials import TOLERANCES, Cost, ProductTrial

RIVAL_TOLERANCE = 2e-2
"""Others round between their stages as they like; beyond this they compute something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofs:
    """What this device was seen to do in this run: bytes per second of a copy, operations per second of a product."""

    copy: float
    matmul: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> Roofs:
        """Copy a large tensor (bytes read plus bytes written), and multiply two large random matrices."""
        size, side = (1 << 30, 8192) if device.type == "cuda" else (1 << 22, 128)
        source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        time = time_eager if device.type == "cuda" else time_host
        copying = time([lambda: target.copy_(source)], 0.2)
        multiplying = time([lambda: a @ b], 0.3)
        return cls(copy=2 * size / copying.p50, matmul=2 * side**3 / multiplying.p50)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is timed: calls that take turns, the error of the first, what they must move, and how they may run."""

    calls: Calls
    error: float
    bound: float
    cost: Cost
    experts: float
    waves: int = 1
    captured: bool = True
    why_wrong: str = ""
    ours: bool = True


class Bench:
    """Measures cells; keeps the experts of the shape it measured last."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, table: TileTable, roofs: Roofs, seconds: float
    ) -> None:
        self._device, self._dtype, self._table = device, dtype, table
        self._roofs, self._seconds = roofs, seconds
        self._stage: Stage | None = None

    def measure(self, cell: Cell) -> list[Result]:
        """Return the rows of a cell, whatever happens to it, unless the device itself is lost."""
        mode = self._modes(True)[0]
        try:
            subject = self._subject(cell)
        except (Absent, DoesNotFit) as reason:
            return [Result(mode=mode, status="skipped", reason=str(reason))]
        except torch.OutOfMemoryError:
            self._stage = None
            torch.cuda.empty_cache()
            return [Result(mode=mode, status="skipped", reason="out of the device's memory")]
        except Exception as error:
            self._check_alive()
            return [Result(mode=mode, status="failed", reason=brief(error))]
        return [self._timed(subject, mode) for mode in self._modes(subject.captured)]

    def _modes(self, captured: bool) -> tuple[str, ...]:
        if self._device.type != "cuda":
            return ("interpreter",)
        return ("graph", "eager") if captured else ("eager",)

    def _subject(self, cell: Cell) -> Subject:
        stage = self._on(cell.shape)
        if cell.part == "layer":
            return self._ours(stage, cell) if cell.variant in OWN else self._rival(stage, cell)
        return KERNELS[cell.part](stage, cell.T)

    def _on(self, shape: str) -> Stage:
        if self._stage is None or self._stage.shape.name != shape:
            self._stage = None
            if self._device.type == "cuda":
                # What was compiled may hold on to the weights of the shape before.
                torch.compiler.reset()
                torch.cuda.empty_cache()
            self._stage = Stage(SHAPES[shape], self._dtype, self._device, self._table)
        return self._stage

    def _ours(self, stage: Stage, cell: Cell) -> Subject:
        runs, waves = stage.runs(cell.variant, cell.T, cell.residency)
        got = runs[0](fill=torch.nan)
        whole, _ = stage.runs(grid.OURS, cell.T, 100)
        same = torch.equal(got, whole[0]())
        return Subject(
            calls=runs,
            error=relative_error(got, stage.reference(cell.T)),
            bound=TOLERANCES[stage.dtype],
            cost=stage.cost(cell.T),
            experts=stage.experts(cell.T),
            waves=waves,
            why_wrong="" if same else "not the bits of one pass",
        )

    def _rival(self, stage: Stage, cell: Cell) -> Subject:
        gathered = rivals.gathered_bytes(cell.variant, stage, cell.T)
        if stage.device.type == "cuda" and gathered > 0.7 * torch.cuda.mem_get_info(stage.device)[0]:
            raise Absent(f"gathers {gathered / 1e9:.0f} GB of weights")
        forwards = rivals.forwards(cell.variant, stage)
        calls = stage.calls(cell.T)
        runs = [functools.partial(forwards[i % len(forwards)], call) for i, call in enumerate(calls)]
        ours = cell.variant == grid.BACKEND
        return Subject(
            calls=runs,
            error=relative_error(runs[0](), stage.reference(cell.T)),
            bound=TOLERANCES[stage.dtype] if ours else RIVAL_TOLERANCE,
            cost=stage.cost(cell.T),
            experts=stage.experts(cell.T),
            captured=cell.variant not in rivals.UNCAPTURED,
            ours=ours,
        )

    def _timed(self, subject: Subject, mode: str) -> Result:
        """Time a subject that is right; say why where it is not, or where it cannot be timed."""
        if subject.error > subject.bound or subject.why_wrong:
            why = subject.why_wrong or f"further than {subject.bound:g} from float64"
            return Result(mode=mode, status="wrong", reason=why, error=subject.error, bound=subject.bound)
        try:
            with torch.inference_mode():
                syncs = waits(subject.calls[0]) if mode == "eager" else ""
                times = TIMERS[mode](subject.calls, self._seconds)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return Result(mode=mode, status="skipped", reason="out of the device's memory", error=subject.error)
        except Exception as error:
            self._check_alive()
            return Result(mode=mode, status="failed", reason=brief(error), error=subject.error)
        return self._result(subject, mode, times, syncs)

    def _result(self, subject: Subject, mode: str, times: Times, syncs: str) -> Result:
        cost = subject.cost
        moving, computing = cost.nbytes / self._roofs.copy, cost.flops / self._roofs.matmul
        roof = max(moving, computing)
        return Result(
            mode=mode,
            status="ok",
            p20=times.p20 * 1e6,
            p50=times.p50 * 1e6,
            p80=times.p80 * 1e6,
            repeats=times.repeats,
            calls=len(subject.calls),
            error=subject.error,
            bound=subject.bound,
            syncs=syncs,
            waves=subject.waves,
            experts=subject.experts,
            nbytes=cost.nbytes,
            flops=cost.flops,
            roof=roof * 1e6,
            limit="memory" if moving >= computing else "compute",
            share=roof / times.p50,
            gbps=cost.nbytes / times.p50 / 1e9,
            tflops=cost.flops / times.p50 / 1e12,
        )

    def _check_alive(self) -> None:
        """Raise where the device answers no more: the process must be started anew then."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()


OWN = (grid.OURS, grid.DENSE, grid.ONE_BY_ONE)
TIMERS: dict[str, Callable[[Calls, float], Times]] = {
    "graph": time_graph,
    "eager": time_eager,
    "interpreter": time_host,
}


def waits(call: Callable[[], object]) -> str:
    """Tell whether a call makes the host wait for the GPU: "0" or "1+"."""
    call()
    with watching():
        try:
            call()
        except RuntimeError as error:
            if "synchroniz" not in str(error).lower():
                raise
            return "1+"
    return "0"


@contextmanager
def watching() -> Iterator[None]:
    mode: Any = torch.cuda.set_sync_debug_mode
    torch.cuda.synchronize()
    mode("error")
    try:
        yield
    finally:
        mode("default")


def brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def product(stage: Stage, T: int, part: str) -> Subject:
    """Return one of the two products, with the tile that the table has for it."""
    trial = ProductTrial(stage.shape, part, stage.sets, stage.calls(T))
    choose = stage.table.rows if trial.call.by_rows else stage.table.grouped
    tile = choose(trial.call, trial.product)
    return Subject(
        calls=trial.runs(tile),
        error=trial.error(tile),
        bound=TOLERANCES[stage.dtype],
        cost=trial.cost(),
        experts=stage.experts(T),
    )


def scheduling(stage: Stage, T: int) -> Subject:
    """Return the schedule alone, checked against a stable sort; what it must move is its input and its result."""
    calls, E = stage.calls(T), stage.shape.E
    block = stage.table.block(stage.shape.call(T, stage.dtype))

    def run(i: int) -> Any:
        return schedule(calls[i].ids_TA, calls[i].weights_TA, None, experts=E, block=block)

    want = torch.sort(calls[0].ids_TA.flatten(), stable=True).indices
    plan = run(0)
    moved = calls[0].ids_TA.nbytes + calls[0].weights_TA.nbytes + plan.packed.nbytes
    return Subject(
        calls=[functools.partial(run, i) for i in range(len(calls))],
        error=0.0 if torch.equal(plan.order_R.long(), want) else float("inf"),
        bound=0.0,
        cost=Cost(nbytes=moved, flops=0.0),
        experts=stage.experts(T),
    )


def combining(stage: Stage, T: int) -> Subject:
    """Return the sum over A alone, from rows in a random order; they take turns, so as not to lie in a cache."""
    calls, shape = stage.calls(T), stage.shape
    R = T * shape.A
    generator = torch.Generator(stage.device).manual_seed(T)
    out = [torch.randn(R, shape.D, generator=generator, device=stage.device).to(stage.dtype) for _ in calls]
    order = torch.randperm(R, generator=generator, device=stage.device)
    order_R = order.to(torch.int32)

    def run(i: int) -> Tensor:
        call = calls[i]
        return combine(out[i], order_R, call.x_TD, call.ids_TA, call.weights_TA, experts=shape.E, weighted=True)

    want = out[0][order].double().view(T, shape.A, -1).sum(1)
    moved = out[0].nbytes + R * (calls[0].ids_TA.itemsize + 4) + T * shape.D * stage.dtype.itemsize
    return Subject(
        calls=[functools.partial(run, i) for i in range(len(calls))],
        error=relative_error(run(0), want),
        bound=TOLERANCES[stage.dtype],
        cost=Cost(nbytes=moved, flops=float(R * shape.D)),
        experts=stage.experts(T),
    )


KERNELS: dict[str, Callable[[Stage, int], Subject]] = {
    "rows, up": functools.partial(product, part="up"),
    "rows, down": functools.partial(product, part="down"),
    "grouped, up": functools.partial(product, part="up"),
    "grouped, down": functools.partial(product, part="down"),
    "schedule": scheduling,
    "combine": combining,
}
"""What is measured of each kernel alone, at the numbers of tokens that `grid` has for it."""
