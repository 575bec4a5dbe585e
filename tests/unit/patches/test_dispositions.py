"""dispositions.toml: its form, and those of its grounds that need no vLLM.

tests/patches/test_dispositions.py has the others, and `nox -s prove` runs the proofs it names.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_forge.matrix import load
from vllm_forge.patches import decisions, known_issues, read_dispositions, read_series
from vllm_forge.patches.errors import DispositionError

REPO = Path(__file__).parents[3]
MATRIX = load(REPO)
COMMITTED = read_dispositions(REPO / "patches" / "vllm")
GOOD = """
schema_version = 1
[[disposition]]
about = "#1"
title = "a change"
upstream = "open"
[disposition.on.all]
status = "refused"
reason = "It does harm."
proof = "tests/patches/test_harm.py::test_harm"
[disposition.on."0.26"]
status = "not-applicable"
reason = "Nobody asks for it."
no_preset = "magic"
"""


def read(folder: Path, text: str) -> object:
    (folder / "dispositions.toml").write_text(text, encoding="utf-8")
    return read_dispositions(folder)


def test_a_lines_own_decision_goes_before_the_one_for_all(tmp_path: Path) -> None:
    read(tmp_path, GOOD)
    entries = read_dispositions(tmp_path)
    for line, status in (("0.22", "refused"), ("0.26", "not-applicable")):
        ((about, decision),) = decisions(entries, line)
        assert (about, decision.status) == ("#1", status)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("refused", "denied", "#1.on.all.status: Input should be 'carried'"),
        ('proof = "', 'proff = "', "unknown key #1.on.all.proff (did you mean 'proof'?"),
        ("refused", "carried", "carried needs patch"),
        ("refused", "retired", "retired needs landed and where"),
        ('no_preset = "magic"\n', "", "needs evidence: one of patch, where"),
        ('proof = "', 'skus = ["b300"]\nproof = "', "skus is for what is undecided"),
        ("It does harm.", "", "reason: String should have at least 1 character"),
        ("schema_version = 1", "schema_version = 2", "schema_version: Input should be 1"),
        ('about = "#1"\n', "", "disposition 1.about: Field required"),
        ("[[disposition]]", "[[disposition", "Expected ']]' at the end of an array declaration"),
        ('upstream = "open"\n', "", "#1.upstream: Field required"),
    ],
)
def test_what_is_not_in_form_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(DispositionError) as error:
        read(tmp_path, GOOD.replace(old, new, 1))
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_entry_that_is_not_a_table_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DispositionError, match="disposition 1: Input should be a valid dict"):
        read(tmp_path, "schema_version = 1\ndisposition = [1]\n")


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DispositionError, match=r"missing dispositions\.toml"):
        read_dispositions(tmp_path)


def test_a_refusal_without_a_test_is_refused(tmp_path: Path) -> None:
    text = GOOD.replace('proof = "tests/patches/test_harm.py::test_harm"', 'undecided = "a GPU"')
    with pytest.raises(DispositionError, match="refused needs proof"):
        read(tmp_path, text)


def test_every_change_is_decided_for_every_line(tmp_path: Path) -> None:
    read(tmp_path, GOOD.replace("on.all", 'on."0.22"'))
    with pytest.raises(DispositionError, match=r"nothing is decided for line 0\.33"):
        decisions(read_dispositions(tmp_path), "0.33")
    for line in MATRIX.line:
        assert len(decisions(COMMITTED, line)) == len(COMMITTED)


@pytest.mark.parametrize("line", MATRIX.line)
def test_what_is_carried_is_the_series(line: str) -> None:
    """So that a patch which leaves a series makes a test red, here and in `nox -s prove`."""
    carried = [d.patch for _, d in decisions(COMMITTED, line) if d.status == "carried"]
    series = [patch.name for patch in read_series(REPO / MATRIX.line[line].series)]
    assert sorted(filter(None, carried)) == sorted(series)


def test_entries_are_about_lines_that_there_are() -> None:
    for entry in COMMITTED:
        assert set(entry.on) <= {*MATRIX.line, "all"}, entry.about
    assert len({entry.about for entry in COMMITTED}) == len(COMMITTED)


@pytest.mark.parametrize("line", MATRIX.line)
def test_a_sku_that_is_said_not_to_be_served_is_not(line: str) -> None:
    for about, decision in decisions(COMMITTED, line):
        if decision.not_served is not None:
            assert decision.not_served in MATRIX.sku, about
            assert decision.not_served not in MATRIX.line[line].skus, about


def test_open_issues_are_about_known_skus() -> None:
    rows = [decision for entry in COMMITTED for decision in entry.on.values()]
    assert {sku for decision in rows for sku in decision.skus} <= set(MATRIX.sku)


def test_an_open_issue_is_known_to_its_sku_alone(tmp_path: Path) -> None:
    open_issue = 'status = "not-applicable"\nundecided = "a GPU"\nskus = ["b300"]\n'
    read(tmp_path, GOOD + f'[disposition.on."0.33"]\nreason = "?"\n{open_issue}')
    entries = read_dispositions(tmp_path)
    known = {
        (line, sku): [entry.about for entry, _ in known_issues(entries, line, sku)]
        for line in ("0.26", "0.33")
        for sku in ("b200", "b300")
    }
    assert {place for place, about in known.items() if about} == {("0.33", "b300")}


def test_no_preset_asks_for_what_none_is_said_to() -> None:
    presets = {name: preset.model_dump_json() for name, preset in MATRIX.preset.items()}
    words = {d.no_preset for entry in COMMITTED for d in entry.on.values() if d.no_preset}
    assert words
    assert not [(name, word) for name in presets for word in words if word in presets[name]]
