"""On what kernels were measured, and which kernels: what goes beside every number."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

MEASURED = ("activation", "checks", "combine", "grouped", "launching", "pool", "rounding", "rows", "schedule", "tiles")
"""The files that decide what a kernel does, and which one runs."""


@functools.cache
def source_hash() -> str:
    """Return a hash of the kernels' source, without the table of tiles."""
    here = Path(__file__).parent
    files = [here / f"{name}.py" for name in MEASURED]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:12]


@functools.cache
def about_device(device: torch.device) -> dict[str, str]:
    """Return device, driver and versions by name."""
    names = {
        "device": "CPU, Triton's interpreter",
        "driver": "",
        "runtime": str(torch.version.cuda or torch.version.hip or ""),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "transformers": _version("transformers"),
    }
    if device.type == "cuda":
        names |= {"device": torch.cuda.get_device_name(device), "driver": _driver()}
    return names


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _driver() -> str:
    """Return the driver's version, if anything tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.split("\n")[0].strip() or "unknown"
