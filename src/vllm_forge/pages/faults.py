"""The page of known faults: what one sees, why, what to do, and what finds it here."""

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vllm_forge.host import read_data
from vllm_forge.matrix import FrozenModel
from vllm_forge.pages.errors import FaultsFileError
from vllm_forge.pages.markdown import table
from vllm_forge.patches import read_dispositions
from vllm_forge.patches.dispositions import ALL, GROUNDS, Decision, Disposition
from vllm_forge.project import Project

FILE = "records/known-faults.toml"
Finder = Annotated[
    str, Field(pattern=r"^(inspect|lint|doctor|image|error|receipt) \S.*$|^test \S+\.py::\w+$")
]
# Evidence of a decision -> the test that fails when it is not so any more.
CHECKED_BY = {
    "patch": "tests/patches/test_dispositions.py::test_carried_is_what_the_series_has",
    "where": "tests/patches/test_dispositions.py::test_the_source_line_that_is_named_is_there",
    "not_served": "tests/unit/patches/test_dispositions.py::"
    "test_a_sku_that_is_said_not_to_be_served_is_not",
    "no_preset": "tests/unit/patches/test_dispositions.py::"
    "test_no_preset_asks_for_what_none_is_said_to",
}


class Fault(FrozenModel):
    """A row; the head of the file says what each field means."""

    id: str = Field(pattern=r"^[A-Z]\d\d$")
    seen: Literal[
        "making a checkpoint", "loading a checkpoint", "starting a server",
        "wrong or poor answers", "speed", "building", "the host", "measuring",
    ]  # fmt: skip
    symptom: str
    cause: str
    remedy: str
    found_by: tuple[Finder, ...] = ()
    out_of_scope: str | None = Field(default=None, min_length=20)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if bool(self.found_by) == bool(self.out_of_scope):
            raise ValueError(f"{self.id}: expected either found_by or out_of_scope")
        return self


class FaultsFile(FrozenModel):
    schema_version: Literal[1]
    sources: str
    fault: tuple[Fault, ...]

    @model_validator(mode="after")
    def _ids_are_unique(self) -> Self:
        ids = [fault.id for fault in self.fault]
        if twice := {name for name in ids if ids.count(name) > 1}:
            raise ValueError(f"duplicate id: {', '.join(sorted(twice))}")
        return self


def read_faults(project: Project) -> FaultsFile:
    """The rows of known-faults.toml; FaultsFileError if it is missing or invalid."""
    remedy = "its head says what a row has"
    path, parse = project.root / FILE, FaultsFile.model_validate
    return read_data(path, parse, FaultsFileError, what=FILE, remedy=remedy)


def known_faults(project: Project) -> str:
    """Tables by where a fault is seen, then the decisions about upstream changes."""
    file = read_faults(project)
    order = list(dict.fromkeys(fault.seen for fault in file.fault))
    faults = sorted(file.fault, key=lambda fault: (order.index(fault.seen), fault.id))
    head = ["symptom", "cause", "remedy", "found by", "id"]
    lines = [f"Sources: {_plain(file.sources)}.", ""]
    for seen, rows in groupby(faults, key=lambda fault: fault.seen):
        cells = [
            [*map(_plain, (row.symptom, row.cause, row.remedy)), _finders(row), row.id]
            for row in rows
        ]
        lines += [f"## {seen.capitalize()}", "", table(head, cells), ""]
    decided = [
        _decided(entry, project) for entry in read_dispositions(project.root / "patches/vllm")
    ]
    head = ["change", "what", "decided for the lines", "what a test holds"]
    return "\n".join([*lines, "## Upstream changes", "", table(head, decided)])


def _plain(text: str) -> str:
    """Text as it is read, so that a search of the file finds it; no emphasis and no HTML."""
    return re.sub(r"([*<`\\])", r"\\\1", text)


def _finders(fault: Fault) -> str:
    if fault.out_of_scope:
        return f"out of scope: {_plain(fault.out_of_scope)}"
    parts = (finder.partition(" ") for finder in fault.found_by)
    return "; ".join(f"{kind} `{name}`" for kind, _, name in parts)


def _decided(entry: Disposition, project: Project) -> list[str]:
    by_line = {line: entry.on.get(line) or entry.on[ALL] for line in project.matrix.line}
    status = "; ".join(f"{line}: {decision.status}" for line, decision in by_line.items())
    held = dict.fromkeys(text for decision in by_line.values() for text in _held(decision))
    return [_plain(entry.about), _plain(entry.title), status, "; ".join(held)]


def _held(decision: Decision) -> Iterator[str]:
    for ground in GROUNDS:
        if (value := getattr(decision, ground)) is None:
            continue
        if ground == "undecided":
            yield f"undecided: {_plain(value)}"
        else:
            yield f"`{value if ground == 'proof' else CHECKED_BY[ground]}`"
