"""What the user sees while a long step runs."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import progress
from rich.console import Console
from rich.markup import escape
from rich.text import Text

# Seconds between lines of progress where no bar can be drawn, as in a log of CI.
PROGRESS_S = 10.0
_bar = threading.Lock()  # of the one bar: rich before 14.1 refuses a second


class PlainConsole(Console):
    """Without emoji: "vllm:x:10001" of a passwd line is not a cross."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"highlight": False, "emoji": False, **settings})

    def render_str(self, text: str, **settings: Any) -> Text:
        """Text, and cells of tables: as ``printable`` has it."""
        return super().render_str(printable(text), **settings)

    def on_broken_pipe(self) -> None:
        """Let `cli.main` report it; rich would exit with 1, silently."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


# stdout is for results (JSON, tables); progress and commands go to stderr.
console = PlainConsole(stderr=True, soft_wrap=True)


def printable(text: str) -> str:
    """Text of others, as a terminal may have it.

    What would move its cursor or colour it, and bytes of a path that are not UTF-8, become escapes;
    lines stay lines.
    """
    return "".join(
        mark if mark.isprintable() or mark == "\n" else mark.encode("unicode_escape").decode()
        for mark in text
    )


def show(text: object) -> None:
    """Print a result for people to stdout, see ``printable``."""
    print(printable(str(text)))


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


@contextmanager
def transfer_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show bytes, speed and remaining time: a bar in a terminal, else, or beside one, lines.

    ``total`` is 0 where it is unknown. Yields a function to call, from any thread, with the bytes
    since its last call; bytes that must be transferred again are negative.
    """
    if console.is_terminal and _bar.acquire(blocking=False):
        columns = (
            progress.TextColumn("{task.description}"), progress.BarColumn(),
            progress.DownloadColumn(), progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )  # fmt: skip
        try:
            with progress.Progress(*columns, console=console) as bar:
                task = bar.add_task(what, total=total or None)
                yield lambda size: bar.advance(task, size)
        finally:
            _bar.release()
    else:
        start = shown = time.monotonic()
        done, lock = 0, threading.Lock()

        def advance(size: int) -> None:
            nonlocal done, shown
            with lock:
                done += size
                now = time.monotonic()
                if now - shown < PROGRESS_S:
                    return
                shown = now
            console.print(progress_line(what, done, total, now - start), style="dim", markup=False)

        yield advance


def progress_line(what: str, done: int, total: int, seconds: float) -> str:
    speed = done / seconds
    left = f", {(total - done) / speed:.0f} s left" if speed > 0 and total else ""
    size = f"{done / 1e9:.1f} of {gigabytes(total)}" if total else gigabytes(done)
    return f"  {what}: {size}, {speed / 1e6:.1f} MB/s{left}"


@contextmanager
def report(what: str) -> Iterator[None]:
    """Print ``what`` when a step starts and its seconds when it ends."""
    console.print(f"[bold]>[/] {escape(what)}")
    start = time.monotonic()
    yield
    console.print(f"  {what}: {time.monotonic() - start:.1f} s", style="dim", markup=False)
