"""Control groups that hold a process and its page cache to so many bytes of memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


class Unavailable(Exception):
    """No memory control group can be made here; the message says why."""


@contextlib.contextmanager
def limited(nbytes: int) -> Iterator[Path]:
    """Make a child of this process's own memory control group with a limit, and remove it at the end.

    Yields the group's folder, for `join`. Raises Unavailable where that is not permitted.
    """
    parent, limit = _own_group()
    group = parent / f"promoe-bench-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise Unavailable(f"cannot make {group}: {error.strerror}") from error
    try:
        try:
            (group / limit).write_text(str(nbytes))
        except OSError as error:
            raise Unavailable(f"cannot write {group / limit}: {error.strerror}") from error
        yield group
    finally:
        group.rmdir()


def join(group: Path) -> None:
    """Move this process into a group."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


def forget_cached(folder: Path) -> None:
    """Drop the files of a folder from the page cache: these files only, other programs keep theirs."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def read_through(folder: Path) -> None:
    """Bring the files of a folder into the page cache."""
    buffer = bytearray(2**24)
    for file in sorted(folder.rglob("*.safetensors")):
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def _own_group() -> tuple[Path, str]:
    """Return the folder of this process's memory control group and the name of its limit, v1 or v2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory") / path.lstrip("/"), "memory.limit_in_bytes"
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        folder = Path("/sys/fs/cgroup") / path.lstrip("/")
        if controllers == "" and (folder / "cgroup.controllers").exists():
            return folder, "memory.max"
    raise Unavailable("this process is in no memory control group")
