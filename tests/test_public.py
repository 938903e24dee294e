"""What users may rely on: names, import orders, and which module may know which."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import promoe_triton

PACKAGE = Path(promoe_triton.__file__).parent
PURE = (
    "core",
    "admission",
    "chunking",
    "protocols",
    "policies",
    "slots",
    "trial",
    "speculation",
    "techniques",
    "transfers",
    "config",
    "errors",
)


def imports(file: Path) -> set[str]:
    """Modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def calls(file: Path, name: str) -> bool:
    """Whether a file calls something of that name, a function or an attribute."""
    called = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    return any(name in (getattr(func, "id", None), getattr(func, "attr", None)) for func in called)


def test_names() -> None:
    assert promoe_triton.__all__ == [
        "Config",
        "PromoeError",
        "Stats",
        "Timeline",
        "__version__",
        "from_pretrained",
        "patch",
        "record_timeline",
        "save_profile",
        "stats",
        "unpatch",
    ]
    assert all(hasattr(promoe_triton, name) for name in promoe_triton.__all__)


@pytest.mark.parametrize(
    "order",
    [
        "import promoe_triton",
        "import promoe_triton.patch",
        "from promoe_triton.patch._families import describe; import promoe_triton",
        "import promoe_triton.patch._swap; import promoe_triton.counters",
    ],
)
def test_patch_is_the_function_under_every_import_order(order: str) -> None:
    code = f"{order}\nimport promoe_triton\nassert callable(promoe_triton.patch) and callable(promoe_triton.stats)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("name", PURE)
def test_the_pure_part_knows_nothing_of_devices_threads_and_files(name: str) -> None:
    allowed = {"promoe_triton." + other for other in (*PURE, "layout", "timeline")}
    ours = {module for module in imports(PACKAGE / f"{name}.py") if module.startswith("promoe_triton.")}
    assert all(any(module.startswith(prefix) for prefix in allowed) for module in ours)
    assert not imports(PACKAGE / f"{name}.py") & {"os", "time", "mmap", "ctypes", "transformers"}


# Who may be known by whom: a part imports from those before it only. In one line: parts that may know each other.
LAYERS = (
    {"errors", "_version"},
    {"protocols", "layout", "timeline", "devices", "traces"},
    {"chunking", "policies", "techniques", "slots", "transfers", "admission", "trial", "memory", "kernels"},
    {"config", "core"},
    {"budget", "counters", "predictors", "backends", "stores"},
    {"links", "demo"},
    {"runtime", "waves", "prefetch", "speculation"},
    {"ops"},
    {"layer"},
    {"patch"},
    {"loading", "tracing", "training"},
    {"simulation"},
    {"evaluation"},
    {"__init__"},
    {"cli"},
    {"__main__"},
)


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_part_has_its_place() -> None:
    assert sorted(part for layer in LAYERS for part in layer) == sorted({part_of(f) for f in PACKAGE.rglob("*.py")})


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_no_part_knows_one_that_stands_above_it(file: Path) -> None:
    height = {part: height for height, layer in enumerate(LAYERS) for part in layer}
    known = {name.split(".")[1] for name in imports(file) if name.startswith("promoe_triton.")} & height.keys()
    assert [part for part in known if height[part] > height[part_of(file)]] == []


def test_only_links_start_threads_and_only_the_reader_reads() -> None:
    for file in PACKAGE.rglob("*.py"):
        place, known = file.relative_to(PACKAGE).as_posix(), imports(file)
        # What tunes compiles candidates side by side, and is never run implicitly.
        if place != "kernels/measuring.py":
            assert not {"concurrent.futures", "multiprocessing", "asyncio", "_thread"} & known, place
        assert not calls(file, "Thread") or place.startswith("links/"), place
        assert not calls(file, "preadv") or place == "stores/reader.py", place


def test_the_tested_versions_can_be_installed_together() -> None:
    """PyPI's torch asks for one version of triton alone; builds without CUDA ask for none."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {Requirement(line).name: Requirement(line).specifier for line in lines if line and line[0] != "#"}
    (asked,) = [{"2.13.0": "3.7.1"}[torch.version] for torch in tested["torch"]]
    assert tested["triton"].contains(asked)


def test_no_forward_looks_at_a_model_type() -> None:
    # Inflating rewrites one kind of checkpoint, and has to know that it is of that kind.
    assert [f.name for f in PACKAGE.rglob("*.py") if "model_type" in f.read_text()] == ["inflate.py"]


ROOT = Path(__file__).parent.parent
PRESENT = {
    *("torch", "triton", "transformers", "pytest", "hypothesis", "matplotlib"),
    # They come with these.
    *("numpy", "safetensors", "tokenizers", "huggingface_hub"),
}
"""What a machine with a GPU has, where this package is not installed."""
ON_A_GPU = [
    *(file for file in PACKAGE.rglob("*.py") if "cli" not in file.parts),
    *ROOT.glob("tests/test_kernels*.py"),
    *ROOT.glob("tests/test_gpu*.py"),
    *(ROOT / "tests" / name for name in ("conftest.py", "kernel_cases.py", "compile_cases.py", "zoo.py")),
    *ROOT.glob("bench/gpu/*.py"),
    *(
        ROOT / "bench" / f"{name}.py"
        for name in ("watch", "proactive_gpu", "subjects", "layers", "others", "proactive", "urgent")
    ),
    *(ROOT / "bench" / f"{name}.py" for name in ("record", "decoding", "models", "timing")),
]


@pytest.mark.parametrize("file", ON_A_GPU, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_machine_with_a_gpu_has_what_runs_there(file: Path) -> None:
    """`make test-gpu` and `make bench-kernels` ask for nothing more, pytest's plugins included."""
    ours = {
        "promoe_triton",
        *(path.stem for folder in ("tests", "bench", "bench/gpu") for path in ROOT.glob(f"{folder}/*.py")),
    }
    outside = {name.partition(".")[0] for name in imports(file)} - ours - set(sys.stdlib_module_names)
    optional = {"accelerate", "rich", "moe_policylang"} if "tests" not in file.parts else set()
    assert not outside - PRESENT - optional
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    known = {"parametrize", "skipif", "skip", "filterwarnings", "usefixtures", "xfail"}
    known |= {marker.partition(":")[0] for marker in options["markers"]}
    assert set(re.findall(r"pytest\.mark\.(\w+)", file.read_text())) <= known


def test_results_are_of_all_that_decides_them() -> None:
    """Measured rows are told apart by a hash: of the kernels, and of whatever of theirs these import."""
    from promoe_triton.kernels.provenance import MEASURED

    prefix = "promoe_triton.kernels."
    used = {
        name.removeprefix(prefix).partition(".")[0]
        for measured in MEASURED
        for name in imports(PACKAGE / "kernels" / f"{measured}.py")
        if name.startswith(prefix)
    }
    assert used <= set(MEASURED)
