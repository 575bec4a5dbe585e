"""records/verdicts.json: every broken checkpoint is refused, for its reason; the page is of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.variants import check_id, load_variants
from tests.support.verdicts import VERDICTS
from vllm_forge.checkpoints.inspect.findings import ALIASES, FAULTS, label
from vllm_forge.checkpoints.inspect.inspection import Outcome
from vllm_forge.matrix import load

ROOT = Path(__file__).parents[3]
RECORD = json.loads((ROOT / VERDICTS).read_text())
VARIANTS = load_variants()
NUMBERS = re.compile(r"\bG\d\d\b")
# What the issue asks for, each by a variant that triggers it.
ASKED = {
    "G01", "G05", "G07", "G08", "G09", *(f"G{n}" for n in range(11, 20)), "G22", "G23", "G57",
    "G58", "G69",
}  # fmt: skip
DRAFTERLESS = {"nvfp4a16-no-mtp"}  # sound, and its config promises no drafter
# Broken for another line than the default one.
ELSEWHERE = {"old-expert-targets": "0.33"}


def _row(name: str) -> dict[str, Any]:
    row: dict[str, Any] = RECORD["variants"][name]
    return row


def _outcomes(name: str) -> list[str]:
    return [row["outcome"] for row in _row(name)["lines"].values()]


def _checks(name: str) -> list[str]:
    """Ids of the checks whose numbers a row of variants.toml gives."""
    return [check_id(number) for number in NUMBERS.findall(VARIANTS[name].breaks)]


def test_the_record_is_of_these_variants_and_lines() -> None:
    lines = load(ROOT).line
    assert RECORD["vllm"] == {name: line.vllm for name, line in lines.items()}
    told = {name: (row["about"], row["breaks"]) for name, row in RECORD["variants"].items()}
    assert told == {name: (row.about, row.breaks) for name, row in VARIANTS.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_fault_is_found_by_its_check(name: str) -> None:
    assert set(_checks(name)) <= {row["check"] for row in _row(name)["findings"]}


def test_every_numbered_check_has_a_variant() -> None:
    assert {check for name in VARIANTS for check in _checks(name)} >= set(map(check_id, ASKED))


def test_every_fault_of_the_table_is_used_and_every_check_is_documented() -> None:
    folder = ROOT / "src/vllm_forge/checkpoints/inspect"
    code = "".join(path.read_text() for path in folder.glob("*.py"))
    assert [fault for fault in FAULTS if f'"{fault}"' not in code] == []
    page = (ROOT / "docs/generated/checks.md").read_text()
    checks = {row["check"] for row in FAULTS.values()}
    assert set(ALIASES) <= checks
    for check in checks:
        assert f"`{check}`" in page, check
        assert check not in ALIASES or f"| {ALIASES[check]} |" in page, check


def test_a_number_is_an_alias_of_its_check() -> None:
    assert check_id("G01") == check_id("missing-mtp") == "missing-mtp"
    assert (label("missing-mtp"), label("files")) == ("missing-mtp (G01)", "files")


@pytest.mark.parametrize("name", [name for name, row in VARIANTS.items() if not row.breaks])
def test_a_sound_one_serves_everywhere(name: str) -> None:
    assert _row(name)["error"] is None
    expected = Outcome.WITHOUT if name in DRAFTERLESS else Outcome.WITH_MTP
    assert set(_outcomes(name)) == {expected}


@pytest.mark.parametrize("name", [name for name, row in VARIANTS.items() if row.breaks])
def test_a_broken_one_is_refused(name: str) -> None:
    if name in ELSEWHERE:
        assert _row(name)["lines"][ELSEWHERE[name]]["outcome"] == Outcome.NOT
    else:
        assert _row(name)["error"] in ("CheckpointRefusedError", "CheckpointDepartsError")


OUTCOMES = {
    "redhat-no-mtp": [Outcome.WITHOUT] * 3,
    "partial-mtp": [Outcome.WITHOUT] * 3,
    "card-no-activations": [Outcome.NOT] * 3,
    "card-some-weights-only": [Outcome.NOT, Outcome.WITH_MTP, Outcome.WITH_MTP],
    "dspark": [Outcome.WITHOUT, Outcome.WITH_DSPARK, Outcome.WITH_DSPARK],
    "nvidia-modelopt": [Outcome.WITHOUT, Outcome.WITHOUT, Outcome.WITH_MTP],
    "modelopt-fp8-mtp": [Outcome.WITHOUT] * 3,
    "split-global-scales": [Outcome.NOT] * 3,
    "missing-experts": [Outcome.NOT] * 3,
    "unfused-targets": [Outcome.NOT, Outcome.NOT, Outcome.WITH_MTP],
    "old-expert-targets": [Outcome.WITH_MTP, Outcome.WITH_MTP, Outcome.NOT],
    "new-expert-targets": [Outcome.NOT, Outcome.NOT, Outcome.WITH_MTP],
    "no-draft-ignore": [Outcome.WITHOUT] * 3,
    "global-scale-shape": [Outcome.WITH_MTP] * 3,
    "actorder-static": [Outcome.WITH_MTP] * 3,
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_outcomes_are_vllms_own(name: str) -> None:
    assert _outcomes(name) == OUTCOMES[name]


def test_vllm_says_why() -> None:
    why = " ".join(_row("partial-mtp")["lines"]["0.26"]["why"])
    assert "vLLM silently loads only 0 of" in why
    assert "KeyError" in " ".join(_row("old-expert-targets")["lines"]["0.33"]["why"])


def test_faults_that_no_load_shows_are_found_by_a_check() -> None:
    """The lines that load it have the finding alone, which names kernel and repacking."""
    for line in ("0.26", "0.33"):
        (why,) = _row("card-no-activations")["lines"][line]["why"]
        assert "fp8_einsum" in why
        assert "repacks" in why
    assert "vLLM stops" in _row("card-no-activations")["lines"]["0.22"]["why"][0]


def test_measured_inspections_have_the_known_outcomes() -> None:
    result = json.loads((ROOT / "benchmarks/results/inspect.json").read_text())
    for row in result["artifacts"].values():
        assert set(row["outcomes"].values()) <= {"serves with MTP", "serves without MTP"}
