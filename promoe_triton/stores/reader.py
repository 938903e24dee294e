"""Reads from files by `preadv`, past the page cache or through it. Releases the interpreter while it reads."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from promoe_triton.errors import PromoeError
from promoe_triton.protocols import PAGE, round_up
from promoe_triton.stores.safetensors_files import Unchanged

logger = logging.getLogger(__name__)


class _Handle:
    """An open file that is closed with the last reference to it: a thread in the middle of a read holds one."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        status = os.fstat(descriptor)
        self.identity = (status.st_dev, status.st_ino)

    def __del__(self) -> None:
        os.close(self.descriptor)


class FileReader:
    """Open handles of a store's files. Any number of threads may read at once."""

    def __init__(self, unchanged: Unchanged, direct: bool) -> None:
        self.direct = direct
        self._unchanged = unchanged
        self._handles: dict[Path, _Handle] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> FileReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check(self, files: Mapping[Path, int], since: object = None) -> object:
        """Raise PromoeError unless these files, read at these offsets, are still those that were indexed.

        Returns what tells them from files that are written later. since: what an earlier call returned; raises also
        where one of them has been written in between, and restored: what was read meanwhile may be of either.
        """
        for file, offset in files.items():
            self._unchanged.check(file, offset)
            # Not by what that returned: whoever asked first was told, and this may be another reader of the same files.
            with self._lock:
                handle = self._handles.get(file)
                if handle is not None and handle.identity != self._unchanged.identity(file):
                    del self._handles[file]
        stamps = {file: self._unchanged.stamp(file) for file in files}
        if since is not None and stamps != since:
            raise PromoeError(f"{', '.join(map(str, files))}: written anew while an expert was read; call again")
        return stamps

    def _open(self, file: Path) -> _Handle:
        with self._lock:
            handle = self._handles.get(file)
            if handle is None:
                handle = _Handle(self._open_anew(file))
                if handle.identity != self._unchanged.identity(file):
                    raise PromoeError(f"{file} was exchanged while it was opened; call again")
                self._handles[file] = handle
            return handle

    def _open_anew(self, file: Path) -> int:
        if self.direct:
            try:
                return os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise PromoeError(f"cannot open {file}: {error.strerror}") from error
                logger.warning("%s is on a file system without direct reads; reading it buffered", file)
        try:
            return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise PromoeError(f"cannot open {file}: {error.strerror}") from error

    def read(self, file: Path, offset: int, nbytes: int, buffer: memoryview, start: int) -> int:
        """Read a range of any alignment into `buffer` from `start` on; return where its first byte lies.

        Direct reads take the pages around it too: the buffer needs room for one page before and after.
        """
        if not self.direct:
            self.read_into(file, offset, nbytes, buffer, start)
            return start
        phase = offset % PAGE
        start = round_up(start)
        self.read_into(file, offset - phase, round_up(phase + nbytes), buffer, start, needed=phase + nbytes)
        return start + phase

    def read_into(
        self, file: Path, offset: int, nbytes: int, buffer: memoryview, start: int, needed: int | None = None
    ) -> None:
        """Read `nbytes` at `offset` to `buffer[start:]`; the file may end after `needed` of them.

        Direct readers need all four numbers to be multiples of the page. Raises PromoeError, naming the file
        and the offset, on an I/O error and where the file ends too early.
        """
        needed = nbytes if needed is None else needed
        handle = self._open(file)
        done = 0
        while done < needed:
            view = buffer[start + done : start + nbytes]
            try:
                count = os.preadv(handle.descriptor, [view], offset + done)
            except OSError as error:
                raise PromoeError(f"reading {file} at offset {offset + done}: {error.strerror}") from error
            reached = done + count
            # After a short direct read, what follows must start on a page again.
            progress = count - count % PAGE if self.direct and reached < needed else count
            if progress == 0:
                end = min(os.fstat(handle.descriptor).st_size, offset + reached)
                raise PromoeError(
                    f"{file} ends at offset {end}, {offset + needed - end} bytes before the expert does: "
                    "it is truncated; restore the file and call again"
                )
            done += progress

    def close(self) -> None:
        with self._lock:
            self._handles.clear()
