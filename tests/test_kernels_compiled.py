"""Kernels compiled for GPUs that are not here: a tenth of them every time, and that each rule can be broken."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from promoe_triton.kernels.checks import IS_INTERPRETED
from promoe_triton.kernels.compiled import Compiled, Request, gpu_target, read_amd, read_nvidia
from promoe_triton.kernels.devices import Device, devices, work
from promoe_triton.kernels.launches import recording
from promoe_triton.kernels.rules import RULES, Facts, judge, occupancy
from promoe_triton.kernels.shapes import SHAPES
from promoe_triton.kernels.tiles import TABLE

TESTS = Path(__file__).parent
COMMAND = TESTS.parent / "bench" / "check_compile.py"
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process that interprets nothing."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = filter(None, (str(TESTS.parent), env.get("PYTHONPATH")))
    env |= {"PYTHONPATH": os.pathsep.join(path), "TRITON_DEFAULT_FP_FUSION": "1"}
    return subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, env=env, check=False
    )


@pytest.mark.timeout(600)
def test_a_tenth_of_all_kernels() -> None:
    done = run(COMMAND, "--json", "--sample", "0.1", "--seed", "0")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {kernel["target"] for kernel in found["kernels"]} == set(TARGETS)
    assert not [kernel for kernel in found["kernels"] if kernel["broken"] or not kernel["per_processor"]]
    excused = [kernel for kernel in found["kernels"] if kernel["excused"]]
    assert all("fp32" in kernel["kernel"] or "scaled" in kernel["used_by"] for kernel in excused), "nothing else is"


def test_a_sample_is_the_same_every_time_and_compiled_once(tmp_path: Path) -> None:
    options = ("--json", "--target", "gfx942", "--sample", "0.01", "--cache", str(tmp_path))
    first, second = run(COMMAND, *options), run(COMMAND, *options)
    assert first.stdout == second.stdout
    assert "compiled 4 of 4" in first.stderr
    assert "compiled 4 of 4" not in second.stderr


def test_a_bad_table_is_refused_by_kernel_tile_target_and_rule(tmp_path: Path) -> None:
    table = json.loads(TABLE.read_text())
    for tile in table["targets"]["gfx942"]["16"]["grouped"].values():
        tile["stages"], tile["depth"] = 4, 128
    (tmp_path / "tiles.json").write_text(json.dumps(table))
    options = ("--target", "gfx942", "--sample", "0.05", "--cache", str(tmp_path / "cache"))
    done = run(COMMAND, *options, "--table", str(tmp_path / "tiles.json"))
    assert done.returncode == 1
    broken = [line for line in done.stderr.splitlines() if line.startswith("BROKEN gfx942: grouped")]
    assert any("x128 w" in line and "fits: " in line for line in broken), done.stderr


def test_kernels_that_break_rules() -> None:
    done = run(TESTS / "compile_cases.py")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    found = report["broken"]
    assert found.pop("shipped") == {}
    assert found.pop("shipped in fp32") == {}
    expected = {
        "masked on sm_80": "pipeline",
        "masked on sm_90": "pipeline",
        "too large for sm_90": "fits",
        "too large for sm_120": "fits",
        "too many registers": "spills",
        "rows that are not aligned": "pipeline",
        "single rows that are not aligned": "wide loads",
        "fp32 with TF32 allowed on sm_80": "precision",
        "fp32 with TF32 allowed on sm_90": "precision",
        "fp32 with TF32 allowed on sm_100": "precision",
        "fp32 with TF32 allowed on sm_120": "precision",
    }
    assert found.keys() == expected.keys()
    assert not [case for case, rule in expected.items() if rule not in found[case]], found
    # The alignment of what lies in a schedule follows from the number of tokens, and must compile nothing again.
    assert set(report["versions"].values()) == {1}, report["versions"]


def request(target: str, form: str, dtype: str = "bf16", weights: str = "", **constants: Any) -> Request:
    known = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "K": 2048, "IS_GATED": False, "IS_INTERLEAVED": False}
    known |= constants
    signature = (("x_ptr", f"*{dtype}"), ("w_ptr", f"*{weights or dtype}"), *((name, "constexpr") for name in known))
    return Request(
        target=target,
        kernel=f"somewhere:{form}_kernel",
        signature=signature,
        constants=tuple(((index,), value) for index, value in enumerate(known.values(), 2)),
        attributes=(),
        options=(("num_warps", 8), ("num_stages", 3)),
    )


GOOD = {
    "sm_80": {"mma.sync": 64, "cp.async": 24, "cp.async 16": 24, "tma": 0},
    "sm_90": {"wgmma": 4, "cp.async": 24, "cp.async 16": 24, "tma": 0},
    "sm_100": {"tcgen05": 8, "cp.async": 0, "cp.async 16": 0, "tma": 2},
    "sm_120": {"mma.sync": 64, "cp.async": 24, "cp.async 16": 24, "tma": 0},
    "gfx942": {"mfma": 32, "load 16": 8},
}


def facts(target: str, form: str = "grouped", dtype: str = "bf16", **changes: Any) -> Facts:
    """Return a kernel that breaks no rule, changed."""
    counts = {**GOOD[target], **({"load 16": 8} if form == "rows" else {}), **changes.pop("counts", {})}
    constants = {name: changes.pop(name) for name in list(changes) if name.isupper() or name == "weights"}
    compiled = Compiled(registers=100, stack=0, spills=0, shared=60000, tensor_memory=128, warps=8, counts=counts)
    compiled = dataclasses.replace(compiled, **changes)
    return Facts(request=request(target, form, dtype, **constants), compiled=compiled, device=devices()[target])


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_good_is_not_refused(target: str) -> None:
    assert judge(facts(target)).broken == {}
    assert judge(facts(target, "rows", BLOCK_N=16, BLOCK_K=256)).broken == {}


TWICE = {"cp.async": 48, "cp.async 16": 48}
CASES = {
    "a spill": ("spills", facts("sm_90", spills=1)),
    "a stack": ("spills", facts("gfx942", stack=16)),
    "shared memory": ("fits", facts("sm_120", shared=101377)),
    "local data share": ("fits", facts("gfx942", shared=65537)),
    "tensor memory": ("fits", facts("sm_100", tensor_memory=513)),
    "registers": ("fits", facts("sm_80", registers=255, warps=16)),
    "no tensor cores": ("tensor cores", facts("sm_80", counts={"mma.sync": 0})),
    "the tensor cores of another generation": ("tensor cores", facts("sm_90", counts={"wgmma": 0, "mma.sync": 64})),
    "two kinds of them": ("tensor cores", facts("sm_100", counts={"mma.sync": 64})),
    "wgmma for too few rows": ("tensor cores", facts("sm_90", BLOCK_M=16, BLOCK_N=32)),
    "fp32 cut to TF32": (
        "precision",
        facts("sm_90", dtype="fp32", counts={**TWICE, "wgmma": 0, "mma.sync": 64, "tf32": 64}),
    ),
    "fp32 cut to TF32 on AMD": ("precision", facts("gfx942", dtype="fp32", counts={"load 16": 16, "tf32": 32})),
    "fp32 made of bf16": ("precision", facts("sm_90", dtype="fp32", counts=TWICE)),
    "no copies": ("pipeline", facts("sm_80", counts={"cp.async": 0, "cp.async 16": 0})),
    "only half of the copies": ("pipeline", facts("sm_90", counts={"cp.async": 12, "cp.async 16": 12})),
    "narrow copies": ("pipeline", facts("sm_90", counts={"cp.async": 48})),
    "narrow loads on AMD": ("pipeline", facts("gfx942", counts={"load 16": 3})),
    "narrow loads of a row": ("wide loads", facts("sm_90", "rows", counts={"load 16": 1}, BLOCK_N=16, BLOCK_K=512)),
    "a tail with narrow loads": ("wide loads", facts("sm_90", "rows", BLOCK_N=64, BLOCK_K=256, K=2880)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_rule_can_be_broken(case: str) -> None:
    rule, wrong = CASES[case]
    assert list(judge(wrong).broken) == [rule]


def test_every_rule_has_a_case() -> None:
    assert {rule for rule, _ in CASES.values()} == {rule.name for rule in RULES}


def test_single_precision_is_excused_with_its_reason() -> None:
    counts = {"mma.sync": 0, "cp.async": 48, "cp.async 16": 48}
    verdict = judge(facts("sm_80", dtype="fp32", counts=counts))
    assert verdict.broken == {}
    assert "IEEE" in verdict.excused["tensor cores"]
    assert judge(facts("gfx942", dtype="fp32", counts={"mfma": 0, "load 16": 16})).broken, "AMD's have such products"


def test_weights_of_8_bits_are_excused_from_speed_alone() -> None:
    slow: Any = {"counts": {"cp.async": 36, "cp.async 16": 4}}
    verdict = judge(facts("sm_80", weights="i8", **slow))
    assert verdict.broken == {}
    assert set(verdict.excused) == {"pipeline"}
    assert set(judge(facts("sm_80", **slow)).broken) == {"pipeline"}
    assert list(judge(facts("sm_80", weights="i8", spills=24)).broken) == ["spills"]
    assert list(judge(facts("sm_80", weights="i8", shared=200_000)).broken) == ["fits"]
    assert list(judge(facts("sm_90", weights="i8", BLOCK_M=16, counts={"wgmma": 0})).broken) == ["tensor cores"]


def test_ranks_and_scales_are_compiled() -> None:
    """As kernels of their own, for every target."""
    script = (
        "import check_compile as c; seen = c.wanted(c.TARGETS, c.TABLE);"
        "print(*sorted({(r.target, r.kernel.rpartition(':')[2], n) for r in seen for n in ('HAS_RANK', 'HAS_SCALE')"
        " if r.names.get(n)}), sep='\\n')"
    )
    done = run(Path("-c"), f"import sys; sys.path.insert(0, {str(COMMAND.parent)!r}); {script}")
    assert done.returncode == 0, done.stderr
    kernels = {"HAS_RANK": ("schedule_small_kernel", "begin_kernel"), "HAS_SCALE": ("rows_kernel", "grouped_kernel")}
    want = {str((target, kernel, name)) for target in TARGETS for name in kernels for kernel in kernels[name]}
    assert set(done.stdout.splitlines()) == want


PTX = """
    ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @%p1 ld.global.L1::evict_last.v2.b32 { %r5, %r6 }, [ %rd2 + 0 ];
    ld.global.b16 { %rs1 }, [ %rd3 + 0 ];
    cp.async.cg.shared.global [ %r7 + 0 ], [ %rd4 + 0 ], 0x10, 0x10;
    cp.async.ca.shared.global [ %r8 + 0 ], [ %rd5 + 0 ], 0x4, 0x4;
    cp.async.wait_group 2;
    mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 { %f3 }, { %r9 }, { %r10 }, { %f3 };
    wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, %rd6, %rd7, 1, 1, 1, 0, 1;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %f2 }, { %r9 }, { %r10 }, { %f2 };
    tcgen05.mma.cta_group::1.kind::f16 [ %r11 + 0 ], %rd8, %rd9, %r12, %p2;
    tcgen05.wait::st.sync.aligned;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r13], [%rd10, {%r14, %r15}], [%r16];
"""
SASS = """
    /*0010*/ LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
    /*0020*/ LDG.E.128 R4, desc[UR4][R2.64] ;
    /*0030*/ STL [R1], R4 ;
    /*0040*/ LDL.LU R4, [R1] ;
    /*0050*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
    /*0060*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
"""
USAGE = "Function k:\n  REG:168 STACK:24 SHARED:0 LOCAL:8 CONSTANT[0]:640 TEXTURE:0 SURFACE:0 SAMPLER:0\n"


def test_nvidia_is_read() -> None:
    read = read_nvidia(PTX, SASS, USAGE, shared=1024, warps=4, tensor_memory=64)
    assert (read.registers, read.stack, read.spills) == (168, 32, 2)
    assert (read.shared, read.warps, read.tensor_memory) == (1024, 4, 64)
    once = (
        "wgmma",
        "tf32",
        "tcgen05",
        "tma",
        "cp.async 16",
        "wait_group",
        "load 16",
        "load 8",
        "load 2",
        "HMMA",
        "HGMMA",
    )
    assert {name: read.counts[name] for name in once} == dict.fromkeys(once, 1)
    assert read.counts["cp.async"] == read.counts["mma.sync"] == 2
    assert read.counts["LDGSTS.128"] == read.counts["LDG.128"] == 1


GCN = """
    buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
    global_load_dwordx2 v[5:6], v[7:8], off
    global_load_ushort v9, v[7:8], off
    v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
    .group_segment_fixed_size: 32768
    .private_segment_fixed_size: 16
    .sgpr_spill_count: 3
    .vgpr_count:     96
    .vgpr_spill_count: 4
"""


def test_amd_is_read() -> None:
    read = read_amd(GCN, shared=0, warps=4)
    assert (read.registers, read.stack, read.spills, read.shared) == (96, 16, 7, 32768)
    assert {name: count for name, count in read.counts.items() if count} == {
        "mfma": 1,
        "load 16": 1,
        "load 8": 1,
        "load 2": 1,
    }


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs"),
    [
        ("sm_90", 32, 0, 4, 16),  # 2048 threads
        ("sm_120", 32, 0, 4, 12),  # 1536 threads
        ("sm_90", 255, 0, 4, 2),  # eight warps of 256 registers for each thread
        ("sm_80", 168, 0, 4, 3),  # registers are given in 256s for a warp
        ("sm_90", 64, 73728, 4, 3),  # shared memory, with the kilobyte that CUDA takes
        ("sm_100", 64, 232448, 8, 1),  # all there is
        ("sm_80", 255, 0, 16, 0),  # more registers than there are
        ("sm_90", 16, 0, 1, 32),  # as many programs as there may be
        ("gfx942", 128, 0, 4, 4),  # four waves on each of the four units
        ("gfx942", 64, 0, 4, 8),  # no more than eight
        ("gfx942", 64, 33000, 4, 1),  # one in the local data share
    ],
)
def test_occupancy(target: str, registers: int, shared: int, warps: int, programs: int) -> None:
    assert devices()[target].occupancy(registers=registers, shared=shared, warps=warps) == programs


def test_occupancy_of_a_kernel() -> None:
    assert occupancy(facts("sm_90")) == 2


def test_predictions_are_the_roofs() -> None:
    shape = SHAPES["Qwen3-30B"]
    one, many = work(shape, 1, torch.bfloat16), work(shape, 8192, torch.bfloat16)
    device: Device = devices()["sm_90"]
    weights = 8 * 3 * 2048 * 768 * 2
    assert weights < one["up"].bytes + one["down"].bytes < 1.01 * weights, "eight experts, each once"
    assert one["up"].seconds(device, torch.bfloat16) == one["up"].bytes / 3.35e12
    assert many["up"].flops == 2 * 8192 * 8 * 2 * 768 * 2048
    assert many["up"].seconds(device, torch.bfloat16) == many["up"].flops / 989e12
    assert "schedule" not in one
    assert "schedule" in many


@pytest.mark.skipif(not IS_INTERPRETED, reason="on a GPU nothing is interpreted")
def test_nothing_is_recorded_where_kernels_are_interpreted() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), recording():
        pass


def test_targets() -> None:
    assert (gpu_target("sm_100").arch, gpu_target("gfx942").warp_size) == (100, 64)
    assert set(devices()) == set(TARGETS) == set(json.loads(TABLE.read_text())["targets"])
