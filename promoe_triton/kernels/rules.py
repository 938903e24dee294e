"""What compiled kernels must be, as a list; where a rule cannot hold, a reason stands in WAIVERS.

| rule         | holds where                                                                                     |
|--------------|-------------------------------------------------------------------------------------------------|
| spills       | nothing is kept in local memory                                                                 |
| fits         | a program fits a multiprocessor: shared memory, tensor memory, registers                        |
| tensor cores | a grouped product uses the best instruction that its target has for the M side of its dot       |
| precision    | products of rows in fp32 are IEEE's: nothing is cut to TF32, or sent through NVIDIA's tensor cores |
| pipeline     | a grouped product brings all its operands 16 bytes at a time, a step or more ahead              |
| wide loads   | a product of single rows loads its weights 128 bits at a time                                   |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from promoe_triton.kernels.compiled import Compiled, Request
from promoe_triton.kernels.devices import Device

TENSOR_COLUMNS = 512
"""Columns of tensor memory that a multiprocessor of sm_100 has."""

TENSOR_ROWS = 64
"""Rows on the M side from which on wgmma and tcgen05 are there."""

BEST = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma.sync", "gfx942": "mfma"}
SMALL = {**BEST, "sm_90": "mma.sync", "sm_100": "mma.sync"}
TENSOR = ("wgmma", "tcgen05", "mma.sync", "mfma")

SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "i8": 1, "u8": 1, "fp8e4nv": 1, "fp8e5": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A kernel, what came of it, and where it is to run."""

    request: Request
    compiled: Compiled
    device: Device

    @property
    def form(self) -> str:
        return self.request.kernel.rpartition(":")[2].removesuffix("_kernel")

    @property
    def constants(self) -> dict[str, Any]:
        return self.request.names

    @property
    def dtype(self) -> str:
        """The type of the rows."""
        return dict(self.request.signature)["x_ptr"].removeprefix("*")

    @property
    def weight_size(self) -> int:
        return SIZES[dict(self.request.signature)["w_ptr"].removeprefix("*")]

    @property
    def has_small_weights(self) -> bool:
        """Whether it reads weights of 8 bits."""
        return "w_ptr" in dict(self.request.signature) and self.weight_size == 1

    @property
    def weight_rows(self) -> int:
        """Rows of the weight that a program takes in one load."""
        return int(self.constants["BLOCK_N"]) * (2 if self.constants["IS_INTERLEAVED"] else 1)

    @property
    def weight_loads(self) -> int:
        """How many loads of weights a step has: two where gate and up lie apart."""
        return 2 if self.constants["IS_GATED"] and not self.constants["IS_INTERLEAVED"] else 1

    @property
    def stages(self) -> int:
        return int(dict(self.request.options)["num_stages"])

    @property
    def threads(self) -> int:
        return self.compiled.warps * (32 if self.device.is_nvidia else 64)

    @property
    def dot_rows(self) -> int:
        """The M side of the dot: rows of the block, or of the weight where they change sides."""
        block = int(self.constants["BLOCK_M"])
        return block if block >= TENSOR_ROWS else self.weight_rows

    def transfers(self, rows: int, size: int, columns: int = 0) -> int:
        """Return how many 16-byte instructions bring so many rows of one step, or of its first columns."""
        return -(-rows * (columns or int(self.constants["BLOCK_K"])) * size // (16 * self.threads))


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiver:
    """Where a rule is not asked for, and why."""

    rule: str
    holds: Callable[[Facts], bool]
    reason: str


def _spills(facts: Facts) -> str:
    c = facts.compiled
    return f"{c.spills} spills, {c.stack} bytes of stack" if c.spills or c.stack else ""


def _fits(facts: Facts) -> str:
    c, device = facts.compiled, facts.device
    if c.shared > device.shared_of_block:
        return f"{c.shared} bytes of shared memory, {device.shared_of_block} there are"
    if c.tensor_memory > TENSOR_COLUMNS:
        return f"{c.tensor_memory} columns of tensor memory, {TENSOR_COLUMNS} there are"
    if occupancy(facts) < 1:
        return f"{c.registers} registers for each of {facts.threads} threads"
    return ""


def _tensor_cores(facts: Facts) -> str:
    counts = facts.compiled.counts
    wanted = (BEST if facts.dot_rows >= TENSOR_ROWS else SMALL)[facts.device.target]
    used = [name for name in TENSOR if counts.get(name)]
    return "" if used == [wanted] else f"{wanted} expected for M = {facts.dot_rows}, got {', '.join(used) or 'none'}"


def _precision(facts: Facts) -> str:
    counts = facts.compiled.counts
    if facts.dtype != "fp32":
        return ""
    if counts.get("tf32"):
        return f"{counts['tf32']} instructions that cut to TF32"
    used = [name for name in TENSOR if counts.get(name)]
    return f"rows in fp32 go through {', '.join(used)}" if used and facts.device.is_nvidia else ""


def _pipeline(facts: Facts) -> str:
    counts = facts.compiled.counts
    size = SIZES[facts.dtype]
    step = facts.transfers(int(facts.constants["BLOCK_M"]), size)
    step += facts.transfers(facts.weight_rows, facts.weight_size) * facts.weight_loads
    if not facts.device.is_nvidia:
        # Loads go through registers here: one step is loaded while the last one is computed.
        found, expected = counts.get("load 16", 0), step
        return "" if found >= expected else f"{expected} 16-byte loads expected, got {found}"
    if counts["tma"]:
        return ""
    narrow = counts["cp.async"] - counts["cp.async 16"]
    if narrow:
        return f"{narrow} copies of fewer than 16 bytes"
    expected = facts.stages * step
    found = counts["cp.async 16"]
    return "" if found >= expected else f"{expected} 16-byte copies expected for {facts.stages} stages, got {found}"


def _wide_loads(facts: Facts) -> str:
    counts = facts.compiled.counts
    K, depth = int(facts.constants["K"]), int(facts.constants["BLOCK_K"])
    # The loop and what is left over are two pieces of code.
    steps = [columns for columns in (depth if depth <= K else 0, K % depth) if columns]
    of_all = sum(facts.transfers(facts.weight_rows, facts.weight_size, columns) for columns in steps)
    expected = of_all * facts.weight_loads
    found = counts.get("load 16", 0)
    return "" if found >= expected else f"{expected} 128-bit loads of weights expected, got {found}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """broken: what is wrong, or an empty text. forms: the kernels it is about; empty: all."""

    name: str
    broken: Callable[[Facts], str]
    forms: tuple[str, ...] = ()


RULES = (
    Rule(name="spills", broken=_spills),
    Rule(name="fits", broken=_fits),
    Rule(name="tensor cores", broken=_tensor_cores, forms=("grouped",)),
    Rule(name="precision", broken=_precision, forms=("grouped", "rows")),
    Rule(name="pipeline", broken=_pipeline, forms=("grouped",)),
    Rule(name="wide loads", broken=_wide_loads, forms=("rows",)),
)

WAIVERS = (
    Waiver(
        rule="tensor cores",
        holds=lambda facts: facts.dtype == "fp32" and facts.device.is_nvidia,
        reason="NVIDIA's tensor cores have no IEEE products in single precision",
    ),
    Waiver(
        rule="pipeline",
        holds=lambda facts: facts.has_small_weights and facts.device.is_nvidia,
        reason="no store keeps weights of 8 bits yet: where they are transposed, or go to wgmma through registers, "
        "they come 4 bytes a copy",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """broken: rule -> what is wrong; excused: rule -> why it need not hold (and does not)."""

    broken: dict[str, str]
    excused: dict[str, str]


def occupancy(facts: Facts) -> int:
    c = facts.compiled
    return facts.device.occupancy(registers=c.registers, shared=c.shared, warps=c.warps)


def judge(facts: Facts) -> Verdict:
    """Hold a compiled kernel against all rules that are about it."""
    broken, excused = {}, {}
    for rule in RULES:
        if rule.forms and facts.form not in rule.forms:
            continue
        if not (wrong := rule.broken(facts)):
            continue
        reasons = [e.reason for e in WAIVERS if e.rule == rule.name and e.holds(facts)]
        if reasons:
            excused[rule.name] = reasons[0]
        else:
            broken[rule.name] = wrong
    return Verdict(broken=broken, excused=excused)
