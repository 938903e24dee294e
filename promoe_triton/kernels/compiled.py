"""What the compiler makes of a kernel, on a machine without a GPU: registers, spills, memory, instructions.

Resources are those of the machine code. Instructions are counted statically, in PTX and SASS for NVIDIA and in the
assembler text for AMD: a count says that a loop has such an instruction, not how often it runs.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from promoe_triton.kernels.launches import Launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

PTX = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma\.",
    "mma.sync": r"\bmma\.sync\.",
    "tf32": r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.\S*tf32",
    "cp.async 16": r"cp\.async\.c[ag]\.shared\.global(?:\.\w+)* \[[^\]]*\], \[[^\]]*\], 0x10\b",
    "cp.async": r"cp\.async\.c[ag]\.shared\.global",
    "tma": r"cp\.async\.bulk\.tensor",
    "wait_group": r"cp\.async\.wait_group",
}
"""What is counted in PTX. Loads are counted by width, beside these."""

SASS = {
    "HMMA": r"\bHMMA\.",
    "HGMMA": r"\bHGMMA\.",
    "UTCMMA": r"\bUTC\w*MMA",
    "LDGSTS.128": r"\bLDGSTS\.\S*128",
    "LDG.128": r"\bLDG\.\S*128",
    "spill": r"\b(?:STL|LDL)\b",
}

GCN = {
    "mfma": r"\bv_mfma_",
    "tf32": r"\bv_mfma_\w*xf32",
    "load 16": r"\b(?:global|buffer|flat)_load_dwordx4\b",
    "load 8": r"\b(?:global|buffer|flat)_load_dwordx2\b",
    "load 4": r"\b(?:global|buffer|flat)_load_dword\b",
    "load 2": r"\b(?:global|buffer|flat)_load_(?:ushort|short\w*|u16|d16\w*)\b",
    "dot": r"\bv_dot2",
}

LOAD = re.compile(r"\bld\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[bfus](\d+)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One kernel to compile for one target: all that decides the result. Made of plain values, so that it travels."""

    target: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], tuple[tuple[str, Any], ...]], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def names(self) -> dict[str, Any]:
        """The compile-time constants by name."""
        names = [name for name, _ in self.signature]
        return {names[path[0]]: value for path, value in self.constants if len(path) == 1}

    @property
    def key(self) -> str:
        """Name the result in a cache: equal while arguments, kernel sources and compiler are."""
        stamp = (self, _kernel(self.kernel).cache_key, triton.__version__, _own_source())
        return hashlib.sha256(repr(stamp).encode()).hexdigest()[:24]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What came of it. registers: of one thread; accumulators (AMD) are counted with them."""

    registers: int
    stack: int
    spills: int
    shared: int
    tensor_memory: int
    warps: int
    counts: Mapping[str, int]


def gpu_target(target: str) -> GPUTarget:
    """Return Triton's name of "sm_90" or "gfx942"."""
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target[3:]), 32)
    return GPUTarget("hip", target, 64)


def _kernel(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


@functools.cache
def _own_source() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


@functools.cache
def _binder(kernel: str, target: str) -> Any:
    """Return what sorts a kernel's arguments and looks at their values."""
    jit = _kernel(kernel)
    return create_function_from_signature(jit.signature, jit.params, make_backend(gpu_target(target)))


def request(launch: Launch, target: str) -> Request:
    """Return what Triton would compile for a launch on a target, by its own rules of specialisation."""
    kernel, backend = _kernel(launch.kernel), make_backend(gpu_target(target))
    bound, specialization, options = _binder(launch.kernel, target)(*launch.args, **launch.options)
    _, signature, constants, attributes = kernel._pack_args(
        backend, dict(launch.options), bound, specialization, options
    )
    return Request(
        target=target,
        kernel=launch.kernel,
        signature=tuple(signature.items()),
        constants=tuple(constants.items()),
        attributes=tuple((path, tuple(map(tuple, attribute))) for path, attribute in attributes.items() if attribute),
        options=tuple(options.items()),
    )


def compile_request(wanted: Request) -> Compiled:
    """Compile one kernel and read the result. What the compiler raises goes through."""
    attributes = {path: [list(pair) for pair in pairs] for path, pairs in wanted.attributes}
    source = ASTSource(_kernel(wanted.kernel), dict(wanted.signature), dict(wanted.constants), attributes)
    built = triton.compile(source, target=gpu_target(wanted.target), options=dict(wanted.options))
    shared, warps = built.metadata.shared, built.metadata.num_warps
    if wanted.target.startswith("sm_"):
        usage, sass = disassemble(built.asm["cubin"])
        return read_nvidia(built.asm["ptx"], sass, usage, shared, warps, getattr(built.metadata, "tmem_size", 0) or 0)
    return read_amd(built.asm["amdgcn"], shared, warps)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Return what cuobjdump says of resources, and the machine code as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(  # type: ignore[return-value]
            subprocess.run([str(TOOLS / tool), *options, file.name], capture_output=True, text=True, check=True).stdout
            for tool, options in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", ["-c"]))
        )


def read_nvidia(ptx: str, sass: str, usage: str, shared: int, warps: int, tensor_memory: int) -> Compiled:
    """Read what was compiled for an NVIDIA target."""
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    counts = {name: len(re.findall(pattern, ptx)) for name, pattern in PTX.items()}
    for width, bits in LOAD.findall(ptx):
        name = f"load {int(width or 1) * int(bits) // 8}"
        counts[name] = counts.get(name, 0) + 1
    machine = {name: len(re.findall(pattern, sass)) for name, pattern in SASS.items()}
    spills = machine.pop("spill")
    return Compiled(
        registers=resources["REG"],
        stack=resources["STACK"] + resources["LOCAL"],
        spills=spills,
        shared=shared,
        tensor_memory=tensor_memory,
        warps=warps,
        counts=counts | machine,
    )


def read_amd(text: str, shared: int, warps: int) -> Compiled:
    """Read what was compiled for an AMD target, from the assembler text and the notes at its end."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    return Compiled(
        registers=number("vgpr_count"),
        stack=number("private_segment_fixed_size"),
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        shared=max(shared, number("group_segment_fixed_size")),
        tensor_memory=0,
        warps=warps,
        counts={name: len(re.findall(pattern, text)) for name, pattern in GCN.items()},
    )
