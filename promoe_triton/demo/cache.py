"""The inflated demo model: written once, kept in a cache folder, found again by what it was made from."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from promoe_triton.budget import control_groups
from promoe_triton.demo.inflate import check_disk, inflate, plan_inflation
from promoe_triton.errors import PromoeError
from promoe_triton.stores.resolve import resolve_files
from promoe_triton.stores.safetensors_files import read_headers

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return where inflated checkpoints are kept: below XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "promoe-triton"


def inflated(
    source: Path,
    folder: Path,
    expert_bytes: int,
    *,
    seed: int = 0,
    on_begin: Callable[[int], None] = lambda nbytes: None,
    on_progress: Callable[[int], None] = lambda nbytes: None,
) -> Path:
    """Return the checkpoint `source` with experts of at least `expert_bytes`, written to `folder` unless it is there.

    on_begin: called with the bytes that will be written, if any; on_progress: with those written since.
    Raises PromoeError where the disk is too full or another process is writing the same checkpoint.
    """
    plan = plan_inflation(source, expert_bytes)
    name = f"demo-{plan.expert_bytes / 1e6:.2f}MB-{_fingerprint(source, seed)}"
    target = folder / name
    if _is_whole(target):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder / f"{name}.lock"):
        if _is_whole(target):
            return target
        partial = folder / f"{name}.partial"
        for leftover in (partial, target):
            shutil.rmtree(leftover, ignore_errors=True)
        check_disk(folder, plan.total_bytes)
        on_begin(plan.total_bytes)
        try:
            inflate(source, partial, expert_bytes=expert_bytes, seed=seed, on_progress=on_progress)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return target


def machine_memory() -> int:
    """Return the RAM of this machine in bytes, or of the control group this process is in where that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit, _, _ in control_groups():
        # No limit is written as "max"; a group may also be one that we cannot see.
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(limit.read_text()))
    return total


def _fingerprint(source: Path, seed: int) -> str:
    digest = hashlib.sha256(f"{seed}".encode())
    for file in [*resolve_files(str(source)), *sorted(source.glob("*.json"))]:
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:8]


def _is_whole(target: Path) -> bool:
    if not target.exists():
        return False
    try:
        read_headers(resolve_files(str(target)))
    except PromoeError as reason:
        logger.warning("writing %s again: %s", target, reason)
        return False
    return True


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PromoeError(
                f"another process is writing this checkpoint (it holds {lock}); wait for it, or name another folder"
            ) from None
        yield
