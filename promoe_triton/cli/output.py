"""What a person and a machine see: messages and progress on stderr, tables, JSON alone on stdout."""

from __future__ import annotations

import csv
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from promoe_triton.errors import PromoeError

LINE_SECONDS = 5.0
"""Between two lines of progress where there is no terminal."""


def print_error(error: BaseException | str) -> None:
    """Print an error as one line, however many its message has."""
    message = " ".join(str(error).split()) or type(error).__name__
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


class Lines(logging.Handler):
    """Log records as lines that a person reads: ``warning: ...``."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "red" if record.levelno >= logging.ERROR else "yellow"
        line = Text.assemble((f"{record.levelname.lower()}: ", style), record.getMessage())
        Console(stderr=True).print(line, soft_wrap=True)


@contextmanager
def readable_logging(verbose: bool) -> Iterator[None]:
    """Show what the package logs; messages of transformers and the hub too if `verbose`, else their errors only."""
    logger, hub, handler = logging.getLogger("promoe_triton"), logging.getLogger("huggingface_hub"), Lines()
    before = logger.level, transformers_logging.get_verbosity(), hub.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    transformers_logging.set_verbosity(logging.INFO if verbose else logging.ERROR)
    hub.setLevel(logging.INFO if verbose else logging.ERROR)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        transformers_logging.set_verbosity(before[1])
        hub.setLevel(before[2])


def print_json(value: Any) -> None:
    """Print one JSON object, on one line of stdout. What is not a number (a time nobody measured) becomes null."""
    print(json.dumps(_finite(value), ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def print_pairs(rows: Iterable[tuple[str, str]], *, title: str | None = None, stderr: bool = False) -> None:
    """Print a table of labels and values."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, Text(value))
    Console(stderr=stderr).print(table)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table of numbers, to the right of their first column."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in header:
        table.add_column(column, justify="left" if column == header[0] else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def write_csv(out: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a table as a CSV file. Raises PromoeError where that cannot be done."""
    try:
        with out.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)
    except OSError as error:
        raise PromoeError(f"{out} cannot be written: {error}") from error


def print_note(text: str) -> None:
    """Print what a table's columns mean."""
    Console().print(Text(text, style="dim"))


def bytes_progress() -> Progress:
    """Return a progress bar for bytes, on stderr where that is a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextmanager
def working(message: str) -> Iterator[None]:
    """Show on stderr that something takes a while: a moving line in a terminal, else one line."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{message} ...", soft_wrap=True, highlight=False, markup=False)
        yield
        return
    with console.status(Text(message)):
        yield


@contextmanager
def steps_progress(label: str, steps: int | None) -> Iterator[Callable[[str], None]]:
    """Show how many steps are done, on stderr: a bar in a terminal, else a line every few seconds.

    steps: how many there are; None: nobody knows.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console, label, steps).step
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[what]}"), console=console, transient=True) as progress:
        task = progress.add_task(label, total=steps, what="")
        yield lambda what: progress.update(task, advance=1, what=what)


class _Lines:
    """A line when some seconds have passed since the last, and at the end."""

    def __init__(self, console: Console, label: str, steps: int | None) -> None:
        self._console, self._label, self._steps = console, label, steps
        self._done, self._last = 0, 0.0

    def step(self, what: str) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._last >= LINE_SECONDS or self._done == self._steps:
            self._last = now
            of = "" if self._steps is None else f" of {self._steps}"
            line = f"{self._label}: {self._done}{of}, {what}"
            self._console.print(line, soft_wrap=True, highlight=False, markup=False)
