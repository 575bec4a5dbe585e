"""The ledger of known faults: every row is found by something that exists, or says why not."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from vllm_forge.checkpoints.inspect import findings
from vllm_forge.pages.errors import FaultsFileError
from vllm_forge.pages.faults import CHECKED_BY, FILE, Fault, known_faults, read_faults
from vllm_forge.patches import read_dispositions
from vllm_forge.project import Project
from vllm_forge.serve.rules import RULES

ROOT = Path(__file__).parents[3]
FAULTS = read_faults(Project(ROOT))
GOTCHAS = {f"G{number:02}" for number in range(1, 85)}  # numbers of the family's lists
ROW = """
[[fault]]
id = "X01"
seen = "speed"
symptom = "slow"
cause = "load"
remedy = "wait"
"""


def text_of(pattern: str) -> str:
    return "".join(path.read_text() for path in sorted(ROOT.glob(pattern)))


TEXTS = {
    "doctor": text_of("src/vllm_forge/serve/*.py"),
    "image": text_of("src/vllm_forge/images/*.py"),
    "error": text_of("src/vllm_forge/**/errors.py") + text_of("src/vllm_forge/*/errors.py"),
}
TIERS = tomllib.loads((ROOT / "tests/gpu/suite.toml").read_text())["tier"]


def is_there(finder: str) -> bool:
    """Whether what finds a fault exists under that name."""
    kind, _, name = finder.partition(" ")
    match kind:
        case "inspect":
            return name in {row["check"] for row in findings.FAULTS.values()}
        case "lint":
            return name in {rule.__name__ for rule in RULES}
        case "receipt":
            return name in TIERS
        case "error":
            return f"class {name}(" in TEXTS["error"]
        case "test":
            path, _, function = name.partition("::")
            test = re.compile(rf"^\s*(async )?def {re.escape(function)}\(", re.M)
            return (ROOT / path).is_file() and bool(test.search((ROOT / path).read_text()))
    return f'"{name}"' in TEXTS[kind]


@pytest.mark.parametrize("fault", FAULTS.fault, ids=lambda fault: fault.id)
def test_what_finds_a_fault_exists(fault: Fault) -> None:
    assert [finder for finder in fault.found_by if not is_there(finder)] == []


@pytest.mark.parametrize(
    "finder",
    [
        "inspect missing-mpt", "lint no_rule", "doctor no check", "image no-check",
        "error NoSuchError", "receipt marathon", "test tests/unit/test_none.py::test_it",
        "test tests/unit/pages/test_faults.py::test_that_is_gone",
    ],
)  # fmt: skip
def test_name_of_nothing_is_noticed(finder: str) -> None:
    assert not is_there(finder)


def test_every_gotcha_of_the_family_has_a_row() -> None:
    assert {fault.id for fault in FAULTS.fault} >= GOTCHAS


def test_every_decision_names_a_test_that_exists() -> None:
    page = known_faults(Project(ROOT))
    for entry in read_dispositions(ROOT / "patches/vllm"):
        assert f"| {entry.about} | {entry.title} |" in page.replace("\\", "")
        proofs = {decision.proof for decision in entry.on.values()} - {None}
        assert [proof for proof in proofs if not is_there(f"test {proof}")] == []
    assert all(is_there(f"test {name}") for name in CHECKED_BY.values())


def test_page_is_searchable_by_the_words_of_the_error() -> None:
    page = known_faults(Project(ROOT))
    for words in ("No devices were found", "w13_input_scale", "matching target", "error 802"):
        assert words in page


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROW, "X01: expected either found_by or out_of_scope"),
        (
            ROW + 'found_by = ["lint served"]\nout_of_scope = "a reason of twenty characters"',
            "either",
        ),
        (ROW + 'found_by = ["guess served"]', "pattern"),
        (2 * (ROW + 'found_by = ["lint served"]\n'), "duplicate id: X01"),
    ],
)
def test_invalid_rows_are_refused(rows: str, message: str, tmp_path: Path) -> None:
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_text(f'schema_version = 1\nsources = "this test"\n{rows}')
    with pytest.raises(FaultsFileError, match=message):
        read_faults(Project(tmp_path))
