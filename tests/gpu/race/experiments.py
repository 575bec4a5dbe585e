"""The faults, what must see each, and the experiments that say so.

A tool that must see a fault and does not is red. What else sees it is recorded for the table, and
so is what sees it nowhere: two of the mutants change nothing that can be relied on to happen on a
GPU, and are for the audit of the machine code alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any

from tests.gpu.harness import limits
from tests.gpu.race.jobs import Said, jobs, sanitizer
from tests.gpu.race.kit import native
from tests.gpu.race.mutants import MUTANTS

if TYPE_CHECKING:
    from collections.abc import Iterator

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


@dataclass(frozen=True, kw_only=True)
class Control:
    """A fault.

    Attributes:
        order: the experiment, for child.py.
        must: tools each of which has to see it.
        any_of: tools one of which has to see it.
        build: the mutant, for sanitizers and the audit.
    """

    name: str
    what: str
    order: dict[str, Any]
    must: frozenset[Tool] = frozenset()
    any_of: frozenset[Tool] = frozenset()
    build: str | None = None
    clean: bool = field(default=False)


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
}
ANY_OF = {"lock_alias": PROTOCOL}
# Asked, not required: what a checker was measured not to report of a fault that others must see.
NOT_REQUIRED = {
    ("half_barrier", T.SYNCCHECK): "the launch does not end, and it had said nothing when ended",
}
MICRO_MUST = {
    "no_wait": {T.REFERENCE},
    "early_release": {T.REFERENCE},
    "no_reset": {T.WORKSPACE, T.WATCHDOG},
    "stale_read": {T.REFERENCE},
}


def _controls() -> Iterator[Control]:
    for mutant in MUTANTS:
        yield Control(
            name=mutant.name,
            what=mutant.what,
            order={"do": "mutant", "name": mutant.name},
            must=frozenset(MUST.get(mutant.name, ())),
            any_of=ANY_OF.get(mutant.name, frozenset()),
            build=mutant.name,
            clean=mutant.name == "clean",
        )
    for name, what, tool in (
        ("half_reduce", "partial sums are kept in 16 bits (an option of the op)", T.REFERENCE),
        ("atomic_add", "the sum is taken in any order (an option of the op)", T.BITWISE),
    ):
        order = {"do": "option", "name": name}
        yield Control(name=name, what=what, order=order, must=frozenset({tool}))
    yield Control(
        name="dirty_workspace",
        what="a lock is not zero on entry",
        order={"do": "dirty_workspace"},
        any_of=PROTOCOL,
    )
    yield Control(
        name="shared_workspace",
        what="two launches at a time share a workspace",
        order={"do": "streams", "shared": True},
        any_of=PROTOCOL,
    )
    yield Control(
        name="own_workspaces",
        what="no fault: two launches at a time, each with its own workspace",
        order={"do": "streams", "shared": False},
        clean=True,
    )
    names = ("clean", "no_wait", "early_release", "no_reset", "lock_alias", "slot_overlap")
    for name in (*names, "stale_read"):
        must = frozenset(MICRO_MUST.get(name, ()))
        yield Control(
            name=f"model_{name}",
            what=("no fault" if name == "clean" else name.replace("_", " "))
            + ", in a model of the sum alone",
            order={"do": "micro", "name": name},
            must=must,
            any_of=frozenset() if must or name == "clean" else PROTOCOL,
            clean=name == "clean",
        )


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


def start_warming() -> tuple[str, ...]:
    """Let the driver compile the wheel's kernels; the names of those experiments."""
    for form in WARMED:
        jobs().start(f"warm-{form}", {"do": "warm", "form": form}, kind="wheel kernels")
    return tuple(f"warm-{form}" for form in WARMED)


def start_all() -> None:
    """Begin what has not begun, what others wait for first."""
    warm = start_warming()
    free = [c for c in CONTROLS.values() if c.order["do"] in {"mutant", "micro"}]
    for control in (*free, *(c for c in CONTROLS.values() if c not in free)):
        after = () if control in free else warm
        jobs().start(control.name, control.order, after=after)
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
    if name in start_warming():
        return jobs().result(name)
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
