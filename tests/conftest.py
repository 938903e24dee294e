"""One thread for tiny models, no hub, no progress bars; and the report that the README's table is made from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # looked at when kernels are imported

import transformers
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()

_outcomes: dict[str, dict[str, str]] = {}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families-report", help="write the outcome of every family's tests to this JSON file")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note the outcome of tests named test_families.py::test_x[family-variant]."""
    if report.when != "call" or "test_families.py" not in report.nodeid or "[" not in report.nodeid:
        return
    test, _, parameters = report.nodeid.partition("::")[2].rstrip("]").partition("[")
    family, _, variant = parameters.rpartition("-") if test != "test_refused_by_name" else (parameters, "", "refused")
    _outcomes.setdefault(family, {})[variant] = report.outcome


def pytest_sessionfinish(session: Any) -> None:
    path = session.config.getoption("--families-report")
    if path and not hasattr(session.config, "workerinput"):
        versions = {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}
        families = {family: dict(sorted(found.items())) for family, found in sorted(_outcomes.items())}
        report = {"versions": versions, "families": families}
        Path(path).write_text(json.dumps(report, indent=1) + "\n")
