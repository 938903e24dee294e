"""Kernels compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def check_compile(*arguments: str) -> Any:
    """Run the command in a process that interprets nothing; return what it prints as JSON."""
    command = [sys.executable, str(ROOT / "bench" / "check_compile.py"), "--json", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.timeout(600)
def test_a_tenth_of_all_kernels() -> None:
    found = check_compile("--sample", "0.1", "--seed", "0")
    assert {kernel["target"] for kernel in found["kernels"]} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert not [kernel for kernel in found["kernels"] if kernel["broken"]]
