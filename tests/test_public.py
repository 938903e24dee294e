"""What users may rely on: names, import orders, and which module may know which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import promoe_triton

PACKAGE = Path(promoe_triton.__file__).parent
PURE = (
    "core",
    "admission",
    "chunking",
    "protocols",
    "policies",
    "slots",
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


def test_only_links_start_threads_and_only_the_reader_reads() -> None:
    for file in PACKAGE.rglob("*.py"):
        text, place = file.read_text(), file.relative_to(PACKAGE).as_posix()
        assert "threading.Thread(" not in text or place.startswith(("links/", "cli/")), place
        assert "preadv(" not in text or place == "stores/reader.py", place
