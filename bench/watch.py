"""A worker that measures, and what watches it: what takes the device down, or hangs, is noted and left behind."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

HUNG = -1
"""What stands for the exit code of a worker that was killed as it took too long."""


GO_ON = 4
"""Exit code of a worker that has noted what failed, and cannot go on itself."""


def supervise(command: Sequence[str], marker: Path, patience: float, note: Callable[[int], None]) -> int:
    """Run workers until one has gone through everything; return its exit code.

    marker: the file in which a worker says what it is at, there only while it measures. note: called with the exit code
    of a worker that did not come to the end; the next one must not try the same again. patience: seconds for one thing.
    """
    marker.unlink(missing_ok=True)
    while True:
        worker = subprocess.Popen(list(command))
        try:
            code = _wait(worker, marker, patience)
        except KeyboardInterrupt:
            worker.wait(60)
            code = 130
        if code == 0 or not (marker.exists() or code == GO_ON):
            return code
        if code == 130:
            print("interrupted; run again to go on", flush=True)
            marker.unlink(missing_ok=True)
            return code
        if code != GO_ON:
            note(code)
        marker.unlink(missing_ok=True)
        # What was measured again is there now: going on must not measure it a third time.
        command = [part for part in command if part != "--force"]


def reason(code: int, patience: float) -> str:
    """Say what became of a worker."""
    return f"took longer than {patience:.0f} s" if code == HUNG else f"the process ended with {code}"


def _wait(worker: subprocess.Popen[bytes], marker: Path, patience: float) -> int:
    while True:
        try:
            return worker.wait(2)
        except subprocess.TimeoutExpired:
            if marker.exists() and time.time() - marker.stat().st_mtime > patience:
                worker.kill()
                worker.wait()
                return HUNG
