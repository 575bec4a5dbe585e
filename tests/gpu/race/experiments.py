"""The faults, what must see each, and the experiments that say so.

A tool that must see a fault and does not is red. What else sees it is recorded for the table, and
so is what sees it nowhere: two of the mutants change nothing that can be relied on to happen on a
GPU, and are for the audit of the machine code alone.

Experiments run in processes of their own, several at a time, begun before they are asked for. Each
costs seconds of imports and little of the GPU. One that crashes or hangs is a result of its own and
hides no other. Those of the first stage let the driver compile the wheel's kernels, which takes one
processor a minute, while mutants, which need no compiling, already run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.gpu.harness import limits
from tests.gpu.race.kit import native
from tests.gpu.race.mutants import MUTANTS

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[3]
AT_A_TIME = max(2, min(10, (os.cpu_count() or 2) - 2))
OVERRUN = 20_480  # bytes, as reported in vllm-project/vllm#36889
WARMED = ("w4a16", "nvfp4", "fp8")  # one of each file of kernels; MXFP4 is in NVFP4's
CHECKS = ("memcheck", "initcheck", "racecheck", "synccheck")


class Tool(Enum):
    """What can see a fault."""

    BITWISE_ONE = "bitwise, one input"
    BITWISE = "bitwise, two inputs in turn"
    REFERENCE = "float64 bound"
    PARTITION = "other partition"
    WORKSPACE = "locks zero"
    POISON = "NaN left"
    WATCHDOG = "watchdog"
    RED_ZONES = "red zones"
    MEMCHECK = "memcheck"
    INITCHECK = "initcheck"
    RACECHECK = "racecheck"
    SYNCCHECK = "synccheck"
    AUDIT = "SASS audit"


@dataclass(frozen=True)
class Control:
    """A fault; ``order`` is its experiment, for child.py."""

    name: str
    what: str
    order: dict[str, Any]

    @property
    def build(self) -> str | None:
        """The mutant, for sanitizers and the audit."""
        return self.name if self.order["do"] == "mutant" else None

    @property
    def must(self) -> set[Tool]:
        """Tools each of which has to see it."""
        return MUST.get(self.name, set())

    @property
    def any_of(self) -> frozenset[Tool]:
        """Tools one of which has to see it."""
        return PROTOCOL if self.name in ANY_OF else frozenset()

    @property
    def clean(self) -> bool:
        return self.name in CLEAN


T = Tool
PROTOCOL = frozenset({T.BITWISE, T.REFERENCE, T.WORKSPACE, T.WATCHDOG})
MUST: dict[str, set[Tool]] = {
    "early_release": {T.REFERENCE, T.BITWISE},
    "no_acquire": {T.REFERENCE, T.WORKSPACE, T.INITCHECK, T.AUDIT},
    "no_reset": {T.WORKSPACE, T.WATCHDOG},
    "slot_overlap": {T.REFERENCE},
    "short_c_tmp": {T.RED_ZONES, T.MEMCHECK},
    "skipped_write": {T.POISON, T.REFERENCE},
    "no_release_barrier": {T.AUDIT},
    "no_stage_barrier": {T.RACECHECK},
    "half_barrier": {T.WATCHDOG},
    "foreign_mask": {T.SYNCCHECK},
    "no_fence": {T.AUDIT},
    "weak_acquire": {T.AUDIT},
    "half_reduce": {T.REFERENCE},
    "atomic_add": {T.BITWISE},
    "model_no_wait": {T.REFERENCE},
    "model_early_release": {T.REFERENCE},
    "model_no_reset": {T.WORKSPACE, T.WATCHDOG},
    "model_stale_read": {T.REFERENCE},
}
ANY_OF = {"lock_alias", "dirty_workspace", "shared_workspace", "model_lock_alias",
          "model_slot_overlap"}  # fmt: skip
CLEAN = {"clean", "own_workspaces", "model_clean"}
# Asked, not required: what a checker was measured not to report of a fault that others must see.
NOT_REQUIRED = {
    ("half_barrier", T.SYNCCHECK): "the launch does not end, and it had said nothing when ended",
}
# Faults of the sum alone, in plain CUDA; tools.cu knows each by its place.
MICRO = ("clean", "no_wait", "early_release", "no_reset", "lock_alias", "slot_overlap",
         "stale_read")  # fmt: skip


def _controls() -> Iterator[Control]:
    for mutant in MUTANTS:
        yield Control(mutant.name, mutant.what, {"do": "mutant", "name": mutant.name})
    for name, what in (
        ("half_reduce", "partial sums are kept in 16 bits (an option of the op)"),
        ("atomic_add", "the sum is taken in any order (an option of the op)"),
    ):
        yield Control(name, what, {"do": "option", "name": name})
    yield Control("dirty_workspace", "a lock is not zero on entry", {"do": "dirty_workspace"})
    for name, what, shared in (
        ("shared_workspace", "two launches at a time share a workspace", True),
        ("own_workspaces", "no fault: two launches at a time, each with its own workspace", False),
    ):
        yield Control(name, what, {"do": "streams", "shared": shared})
    for name in MICRO:
        fault = "no fault" if name == "clean" else name.replace("_", " ")
        what = f"{fault}, in a model of the sum alone"
        yield Control(f"model_{name}", what, {"do": "micro", "name": name})


CONTROLS = {control.name: control for control in _controls()}
# short_c_tmp ends the context of a checker, the others may hang: each on its own.
ALONE = ("short_c_tmp", "half_barrier", "foreign_mask", "lock_alias")
TOGETHER = tuple(mutant.name for mutant in MUTANTS if mutant.name not in ALONE)
SETS = {"wheel": ("wheel",), "builds": TOGETHER, **{name: (name,) for name in ALONE}}
# What is worth a run of its own: a fault, and the tools that it is for.
CHECKED = {
    "wheel": CHECKS,
    "builds": CHECKS,
    "short_c_tmp": ("memcheck",),
    "half_barrier": ("synccheck",),
    "foreign_mask": ("synccheck",),
    "lock_alias": (),
}


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
    place = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    return Path(place) if Path(place).is_file() else None


def start_warming() -> tuple[str, ...]:
    """Let the driver compile the wheel's kernels; the names of those experiments."""
    for form in WARMED:
        jobs().start(f"warm-{form}", {"do": "warm", "form": form}, kind="wheel kernels")
    return tuple(f"warm-{form}" for form in WARMED)


def start_all() -> None:
    """Begin what has not begun, what others wait for first."""
    warm = start_warming()
    for waits in (False, True):
        for control in CONTROLS.values():
            if waits == (control.order["do"] not in {"mutant", "micro"}):
                jobs().start(control.name, control.order, after=warm if waits else ())
    short = {"do": "zones", "name": "short_c_tmp", "short": OVERRUN}
    jobs().start("zones-short_c_tmp", short)
    for name, tools in CHECKED.items():
        for tool in tools:
            _start_check(name, tool, warm)
    jobs().start("zones-wheel", {"do": "zones", "name": "wheel"}, after=warm, kind="red zones")


def _start_check(name: str, tool: str, warm: tuple[str, ...]) -> None:
    if (program := sanitizer()) is None:
        return
    kind = "broken build" if name in ALONE else "sanitizer"
    if (name, Tool(tool)) in NOT_REQUIRED:
        kind = "blind sanitizer"
    # For 10 s by default it waits for the process to call CUDA, which imports much before.
    patience = int(limits.limit(kind).seconds)
    prefix = (
        str(program), "--tool", tool, "--launch-timeout", str(patience),
        "--kernel-name", "kns=6MarlinI", "--print-limit", "100000",
        "--show-backtrace", "device", "--target-processes", "application-only",
    )  # fmt: skip
    jobs().start(
        f"{tool}-{name}",
        {"do": "sanitized", "names": list(SETS[name])},
        after=warm if name == "wheel" else (),
        kind=kind,
        prefix=prefix,
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )


def result(name: str) -> Said:
    """Wait for an experiment.

    Raises:
        KeyError: it is not one of this machine: a program is missing.
    """
    if name not in start_warming():
        start_all()
    return jobs().result(name)


def seen_by(said: Said) -> set[Tool]:
    """Which detectors a row of child.py sets off."""
    row = said.row
    found = {
        T.BITWISE_ONE: row.get("differ_one_input", 0) > 0,
        T.BITWISE: row.get("differ", 0) > 0,
        T.REFERENCE: row.get("margin", 0) > 1,
        T.PARTITION: row.get("partition", 0) > 1,
        T.WORKSPACE: row.get("dirty", 0) > 0,
        T.POISON: row.get("nan", 0) > 0,
        T.WATCHDOG: said.hung,
    }
    return {tool for tool, fired in found.items() if fired}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What compute-sanitizer said, once per place: ``kind``, ``build``, source lines, how often."""

    kind: str
    build: str
    places: tuple[str, ...]
    count: int


KINDS = re.compile(
    r"=+ (?:Error: |Warning: )?(?:\(Warp Level Programming\) )?(?P<kind>Invalid \S+ \w+ of size|"
    r"Uninitialized \S+ memory read|Potential \w+ hazard|Race reported between \w+ access|"
    r"Barrier error detected)"
)
BUILD = re.compile(r"marlin_(?P<build>\w+?)(?:::|\d+Marlin|6Marlin)")
PLACE = re.compile(r"(?P<file>[\w.]+\.(?:h|cuh|cu)):(?P<line>\d+)")


def reports(text: str) -> list[Report]:
    """Read compute-sanitizer's output; equal reports once."""
    counted: dict[tuple[str, str, tuple[str, ...]], int] = {}
    for block in re.split(r"(?m)^(?==+ \S)", text):
        head = KINDS.match(block)
        if head is None:
            continue
        build = BUILD.search(block)
        places = tuple(sorted({f"{m['file']}:{m['line']}" for m in PLACE.finditer(block)}))
        key = (head["kind"], build["build"] if build else "unknown", places)
        counted[key] = counted.get(key, 0) + 1
    return [
        Report(kind=kind, build=build, places=places, count=count)
        for (kind, build, places), count in sorted(counted.items())
    ]


@cache
def audited() -> dict[str, set[str]]:
    """Build -> what the audit of its machine code says, of all kernels."""
    found: dict[str, set[str]] = {}
    for name, row in native().items():
        if isinstance(row.get("sass"), dict):
            found[name] = {text for texts in row["sass"].values() for text in texts}
    return found
