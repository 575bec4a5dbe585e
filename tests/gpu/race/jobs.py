"""Experiments in processes of their own, several at a time, begun before they are asked for.

Each costs seconds of imports and little of the GPU. One that crashes or hangs is a result of its
own and hides no other. Those of the first stage let the driver compile the wheel's kernels, which
takes one processor a minute, while mutants, which need no compiling, already run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.gpu.harness import limits

ROOT = Path(__file__).parents[3]

AT_A_TIME = max(2, min(10, (os.cpu_count() or 2) - 2))


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a process said.

    Attributes:
        row: the JSON object of its last line; empty if there is none.
        code: exit status; None after the time-out, when it was killed.
    """

    row: dict[str, Any]
    code: int | None
    seconds: float
    text: str

    @property
    def hung(self) -> bool:
        return self.code is None or bool(self.row.get("hung"))


def run_child(
    order: dict[str, Any],
    *,
    limit: limits.Limit,
    prefix: tuple[str, ...] = (),
    **variables: str,
) -> Said:
    """Run one experiment to its end, or to its limit.

    Raises:
        NotStartedError: it was killed there, and that says nothing about it.
    """
    started = time.monotonic()
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "2")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(_paths())} | threads | variables
    process = subprocess.Popen(
        [*prefix, sys.executable, "-m", "tests.gpu.race.child", json.dumps(order)],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    code: int | None
    try:
        text, _ = process.communicate(timeout=limit.seconds)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # the process group that was started above
        text, _ = process.communicate()
        code = None
        limit.check(" ".join(map(str, order.values())))
    return Said(row=_last_object(text), code=code, seconds=time.monotonic() - started, text=text)


def _paths() -> list[str]:
    named = os.environ.get("PYTHONPATH", "")
    return [str(ROOT), str(ROOT / "src"), *filter(None, named.split(os.pathsep))]


def _last_object(text: str) -> dict[str, Any]:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            return found if isinstance(found, dict) else {}
    return {}


class Jobs:
    """The experiments of a test run, by name."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="experiment")
        self.futures: dict[str, Future[Said]] = {}

    def start(
        self, name: str, order: dict[str, Any], *, after: tuple[str, ...] = (),
        kind: str = "control", prefix: tuple[str, ...] = (), **variables: str,
    ) -> None:  # fmt: skip
        """Begin an experiment, after those named, unless it has begun; ``kind``: of its limit."""
        if name in self.futures:
            return
        earlier = [self.futures[one] for one in after]

        def run() -> Said:
            for one in earlier:
                one.result()
            return run_child(order, limit=limits.limit(kind), prefix=prefix, **variables)

        self.futures[name] = self.pool.submit(run)

    def result(self, name: str) -> Said:
        """Wait for an experiment."""
        return self.futures[name].result()


@cache
def jobs() -> Jobs:
    """Those of this process."""
    return Jobs()


@cache
def sanitizer() -> Path | None:
    """compute-sanitizer of the toolkit, or of its wheel beside torch's."""
    named = shutil.which("compute-sanitizer")
    places = [Path(named)] if named else []
    places.append(Path("/usr/local/cuda/bin/compute-sanitizer"))
    return next((path for path in places if path.is_file()), None)
