"""compute-sanitizer finds what it can find in the builds, and nothing new in the wheel.

racecheck looks at shared memory only: what blocks do to each other through ``c_tmp`` it cannot see.
``sanitizer_baseline.json`` has the reports that are known and why they do no harm; a report is
known by its tool, its kind, and the text of the source lines that it names.
"""

from __future__ import annotations

import json
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu.race.experiments import (
    CHECKED,
    CHECKS,
    MUST,
    NOT_REQUIRED,
    SETS,
    Report,
    Tool,
    reports,
    result,
)
from tests.gpu.race.kit import release_source
from tests.gpu.race.mutants import BY_NAME, lay_out

if TYPE_CHECKING:
    from tests.gpu.conftest import Record

pytestmark = [pytest.mark.gpu, pytest.mark.tier("kernel"), pytest.mark.xdist_group("experiments")]

BASELINE = Path(__file__).with_name("sanitizer_baseline.json")
WHEEL = "moe_wna16"  # the kernel's namespace in the wheel, marlin_moe_wna16
FAULTS = [
    *((name, tool) for name, tools in MUST.items() for tool in tools if tool.value in CHECKS),
    *NOT_REQUIRED,
]


@cache
def texts(build: str) -> dict[str, list[str]]:
    """File -> lines of a mutant's own text."""
    source = release_source()
    if source is None or build not in BY_NAME:
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        lay_out(BY_NAME[build], source, Path(scratch))
        return {path.name: path.read_text().splitlines() for path in Path(scratch).iterdir()}


def at(report: Report) -> tuple[str, ...]:
    """``file: text`` of the lines that a report names; ``file:line`` where it is not here."""
    found = []
    for place in report.places:
        file, _, line = place.partition(":")
        lines = texts(report.build).get(file, [])
        here = int(line) <= len(lines)
        found.append(f"{file}: {lines[int(line) - 1].strip()}" if here else place)
    return tuple(sorted(found))


def known(tool: str, report: Report) -> bool:
    """Whether the baseline has a report. The wheel has no line numbers: then its kind decides."""
    for row in json.loads(BASELINE.read_text(encoding="utf-8")):
        if (row["tool"], row["kind"]) != (tool, report.kind):
            continue
        lines = at(report)
        if all(any(re.search(pattern, line) for pattern in row["lines"]) for line in lines):
            return True
    return False


def said_of(tool: str, name: str) -> list[Report]:
    """Reports of one checker on one set of builds; red where it did not run to its end."""
    try:
        said = result(f"{tool}-{name}")
    except KeyError:
        pytest.skip("no compute-sanitizer: install CUDA's toolkit or nvidia-cuda-sanitizer-api")
    broken = name in {"short_c_tmp", "half_barrier", "foreign_mask"}
    assert broken or "launched" in said.row, f"exit {said.code}\n{said.text[-3000:]}"
    assert "COMPUTE-SANITIZER" in said.text, said.text[-3000:]
    assert "were not printed" not in said.text, "reports are cut: raise --print-limit"
    return reports(said.text)


def as_rows(found: list[Report]) -> list[dict[str, Any]]:
    return [
        {"kind": one.kind, "build": one.build, "at": at(one), "count": one.count} for one in found
    ][:40]


@pytest.mark.parametrize("tool", CHECKS)
@pytest.mark.parametrize("name", ["wheel", "clean"])
def test_nothing_new(tool: str, name: str, record: Record) -> None:
    found = said_of(tool, "wheel" if name == "wheel" else "builds")
    mine = [one for one in found if one.build == (WHEEL if name == "wheel" else name)]
    new = [one for one in mine if not known(tool, one)]
    record(kind="sanitizer", tool=tool, build=name, reports=as_rows(mine), new=as_rows(new))
    assert new == []


@pytest.mark.parametrize(
    ("fault", "tool"), FAULTS, ids=lambda value: getattr(value, "value", value)
)
def test_a_fault_is_reported(fault: str, tool: Tool, record: Record) -> None:
    name = fault if fault in CHECKED else "builds"
    found = [one for one in said_of(tool.value, name) if one.build == fault]
    new = [one for one in found if not known(tool.value, one)]
    record(
        kind="control",
        fault=fault,
        tools=[tool.value],
        seen=[tool.value] if new else [],
        reports=as_rows(new),
        why_not_required=NOT_REQUIRED.get((fault, tool)),
    )
    if (fault, tool) in NOT_REQUIRED:
        return
    assert new, f"{tool.value} is blind to {fault}"


@pytest.mark.parametrize("tool", CHECKS)
def test_what_else_is_reported(tool: str, record: Record) -> None:
    """For the table: no verdict, except that the checker ran."""
    found = said_of(tool, "builds")
    for build in SETS["builds"]:
        new = [one for one in found if one.build == build and not known(tool, one)]
        record(**{f"sees {build}": bool(new)})
    record(kind="table", tool=tool, builds=list(SETS["builds"]))
