"""Processes that tests start: each leads a group of its own, and none outlives the run."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.gpu.harness.limits import Limit

ROOT = Path(__file__).parents[3]
_GROUPS: set[int] = set()
_LOCK, _ENDED = threading.Lock(), threading.Event()


def start(argv: Sequence[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a process in the root of the suite; all that it prints goes to ``log``.

    Raises:
        InterruptedError: the tests were ended.
    """
    with _LOCK, log.open("wb") as out:
        if _ENDED.is_set():
            raise InterruptedError(f"{log.stem} was not started: the tests were ended")
        process = subprocess.Popen(
            argv, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        _GROUPS.add(process.pid)
    return process


def run(argv: Sequence[str], log: Path, env: Mapping[str, str], limit: Limit) -> None:
    """Run a process to its end, or end it at its limit.

    Raises:
        NotStartedError: it was ended, and that is no fault of it.
    """
    process = start(argv, log, env)
    try:
        process.wait(timeout=limit.seconds)
    except subprocess.TimeoutExpired:
        with log.open("ab") as out:
            out.write(b"\nit was ended: it took too long\n")
        limit.check(log.stem)
    finally:
        end(process, signal.SIGKILL)


def end(process: subprocess.Popen[bytes], *numbers: signal.Signals) -> None:
    """Send a process and all that it started these signals, one after the other."""
    for number in numbers:
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=15)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    with _LOCK:
        _GROUPS.discard(process.pid)


def end_all() -> None:
    """End what runs, and start nothing more; from another thread, what is asked of it fails."""
    with _LOCK:
        _ENDED.set()
        for leader in _GROUPS:
            try:
                os.killpg(leader, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended by itself
