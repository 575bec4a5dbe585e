"""What the edits of the installer that this project started from do to releases."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import pytest
from benchmarks.seed_installer import EDITS, Edit, Outcome, apply_edit, as_row, outcome

from tests.support.trees import TOP, write_sdist
from vllm_forge.pages.records import MERGED
from vllm_forge.project import Project
from vllm_forge.sources import SourceRepo

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def outcomes(root: Path) -> dict[tuple[int, str], Outcome]:
    names = [field.name for field in fields(Outcome)]
    rows = Project(root).read_json("records/seed-installer.json")
    outcomes = [Outcome(**{name: row[name] for name in names}) for row in rows]
    assert rows == [as_row(row) for row in outcomes]
    return {(row.change, row.line): row for row in outcomes}


@pytest.mark.parametrize(
    ("line", "places"),
    [("0.22", (2, 1, 0)), ("0.26", (2, 0, 0)), ("0.33", (2, 0, 0))],
)
def test_lines_that_the_edits_change(
    outcomes: dict[tuple[int, str], Outcome], line: str, places: tuple[int, ...]
) -> None:
    assert tuple(outcomes[edit.change, line].places for edit in EDITS) == places


def test_no_edit_reaches_all_places_of_43248(outcomes: dict[tuple[int, str], Outcome]) -> None:
    """Two sites have one line each; the third is written over three lines."""
    rows = [row for row in outcomes.values() if row.change == 43248]
    assert {(row.needed, row.verdict) for row in rows} == {(3, "lands in 2 of 3 places")}


@pytest.mark.parametrize("line", ["0.22", "0.26"])
def test_a_needed_change_is_reported_as_merged(
    outcomes: dict[tuple[int, str], Outcome], line: str
) -> None:
    row = outcomes[43290, line]
    assert row.needed
    assert (row.exists, row.places, row.prints) == (True, 0, MERGED)


def test_recorded_outcomes_are_of_these_lines_and_series(
    root: Path, outcomes: dict[tuple[int, str], Outcome]
) -> None:
    """Stale: run benchmarks/seed_installer.py."""
    matrix = Project(root).matrix
    assert {row.line: row.release for row in outcomes.values()} == {
        name: line.vllm for name, line in matrix.line.items()
    }
    assert all(row.parses for row in outcomes.values())


def test_outcome_of_a_release(root: Path, repo: SourceRepo, tmp_path: Path) -> None:
    project = Project(root)
    edit = Edit(change=43248, file="m.py", old="x = a and b", new="x = bool(a and b)")
    source = write_sdist(tmp_path / f"{TOP}.tar.gz", {"m.py": b"x = a and b\n  x = (a\n  and b)\n"})
    repo.import_archive(project.matrix.line["0.26"].vllm, source)
    row = outcome(project, repo, edit, "0.26")
    assert (row.exists, row.places, row.needed, row.parses) == (True, 1, 3, False)
    other = outcome(project, repo, EDITS[0], "0.26")
    assert (other.exists, other.places, other.verdict) == (False, 0, "file not found")


def test_an_edit_changes_every_line_with_its_text_and_no_other() -> None:
    edit = Edit(change=1, file="f", old="a = b", new="a = c")
    assert apply_edit(edit, "a = b\n  a = b and\na = (\n b)\n") == (
        "a = c\n  a = c and\na = (\n b)\n",
        2,
    )


@pytest.mark.parametrize(
    ("exists", "places", "needed", "prints", "verdict"),
    [
        (True, 1, 1, "patching", "lands"),
        (True, 1, 3, "patching", "lands in 1 of 3 places"),
        (True, 0, 1, MERGED, "text not found"),
        (False, 0, 1, MERGED, "file not found"),
        (True, 0, 0, MERGED, "not needed"),
        (True, 1, 0, "patching", "changed without need"),
    ],
)
def test_words_of_the_table(
    exists: bool, places: int, needed: int, prints: str, verdict: str
) -> None:
    row = Outcome(
        change=1, claims=None, line="0.22", release="0.22.1", parses=True,
        exists=exists, places=places, needed=needed,
    )  # fmt: skip
    assert (row.prints, row.verdict) == (prints, verdict)
