"""What the user sees while a long step runs."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

# stdout is for results (JSON, tables); progress and commands go to stderr.
# Without emoji: "vllm:x:10001" of a passwd line is not a cross.
console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def printable(text: str) -> str:
    """Text of others, as a terminal may have it.

    What would move its cursor or colour it, and bytes of a path that are no UTF-8, become escapes;
    lines stay lines.
    """
    return "".join(
        mark if mark.isprintable() or mark == "\n" else mark.encode("unicode_escape").decode()
        for mark in text
    )


def gigabytes(size: int) -> str:
    """Bytes for people: GB of 10^9, one decimal."""
    return f"{size / 1e9:.1f} GB"


def progress() -> Progress:
    """A byte-counting progress bar; draws nothing where stderr is not a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


@contextmanager
def report(what: str) -> Iterator[None]:
    """Print ``what`` when a step starts and its seconds when it ends."""
    console.print(f"[bold]>[/] {escape(what)}")
    start = time.monotonic()
    yield
    console.print(f"  {what}: {time.monotonic() - start:.1f} s", style="dim", markup=False)
