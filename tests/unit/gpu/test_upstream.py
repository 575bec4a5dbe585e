"""Tier upstream: what vLLM's own tests say of two trees, and that a planted regression is red."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu.harness import variants
from tests.gpu.harness.limits import NotStartedError
from tests.gpu.harness.run import verdict
from tests.gpu.upstream import compare

if TYPE_CHECKING:
    from collections.abc import Callable

A, B = "tests/a/test_a.py", "tests/b/test_b.py"
GREEN = {f"{A}::one": "passed", f"{A}::two[x]": "skipped", f"{B}::one": "passed"}
LACKS = {f"{A}::two[x]": "Skipped: needs an FP4 GPU"}


def said(tests: dict[str, str], reasons: dict[str, str] | None = None) -> dict[str, Any]:
    return {"exit": 0, "tests": tests, "reasons": LACKS if reasons is None else reasons}


def test_equal_outcomes_pass_and_what_did_not_run_says_what_it_lacks() -> None:
    assert compare.judge(said(GREEN), said(GREEN)) == {
        "files": {A: {"passed": 1, "skipped": 1}, B: {"passed": 1}},
        "lacks": {"Skipped: needs an FP4 GPU": 1},
    }


@pytest.mark.parametrize("outcome", ["failed", "skipped", "xfailed", None])
def test_what_passes_only_as_published_is_red(outcome: str | None) -> None:
    patched = {name: value for name, value in GREEN.items() if name != f"{B}::one"}
    if outcome is not None:
        patched[f"{B}::one"] = outcome
    with pytest.raises(AssertionError, match=f"1 tests pass as published.*{B}::one: planted"):
        compare.judge(said(GREEN), said(patched, {f"{B}::one": "planted"}))


def test_a_patched_run_that_died_is_red() -> None:
    with pytest.raises(AssertionError, match=r"2 tests pass as published.*Segmentation fault"):
        compare.judge(said(GREEN), said({}, {"": "Segmentation fault"}))


@pytest.mark.parametrize(
    ("tests", "words"),
    [
        ({}, "no such tests"),
        ({f"{A}::one": "skipped"}, "needs an FP4 GPU"),
        ({f"{A}::one": "failed"}, "needs an FP4 GPU"),
    ],
)
def test_where_nothing_passes_as_published_nothing_is_decided(
    tests: dict[str, str], words: str
) -> None:
    """Also where the patched tree passes: then the question was not asked."""
    reasons = LACKS if tests else {}
    for patched in (tests, dict.fromkeys(tests, "passed")):
        with pytest.raises(NotStartedError, match=words):
            compare.judge(said(tests, reasons), said(patched, {}))


def test_what_the_series_cures_is_shown() -> None:
    published = GREEN | {f"{B}::two": "failed"}
    facts = compare.judge(said(published), said(published | {f"{B}::two": "passed"}))
    assert facts["files"][B] == {"passed": 1, "failed, then passed": 1}


TESTS = """
import pytest
from vllm.kernel import VALUE
def test_value(): assert VALUE == {value}
def test_kept(): assert VALUE
def test_hub(): raise OSError("no model some/model")
@pytest.mark.skipif(True, reason="needs an FP4 GPU")
def test_fp4(): pass
"""


@pytest.fixture
def bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int, str], list[dict[str, Any]]]:
    """A package whose VALUE is 1 as published and 2 as patched, and the row that asks for one."""
    package = tmp_path / "upstream" / "vllm"  # on the path of both runs, behind any other
    for place, text in (
        (package / "__init__.py", ""),
        (package / "kernel.py", "VALUE = 2\n"),
        (tmp_path / "variants/published/vllm/kernel.py", "VALUE = 1\n"),
        (tmp_path / "upstream/tests/broken/test_broken.py", "import absent_plugin\n"),
    ):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    monkeypatch.setattr(variants, "installed", lambda: package)
    row = {"tests": [A, B, "tests/broken/test_broken.py"], "options": ["-k", "not deselected"]}
    monkeypatch.setattr(compare, "ROWS", {"row": row})

    def ask(value: int, end: str = "") -> list[dict[str, Any]]:
        path = tmp_path / "upstream" / A
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TESTS.format(value=value) + end)
        trees = compare.lay_published(tmp_path, tmp_path)
        return [
            compare.run("row", over, tmp_path / f"{tree}.log", tmp_path)
            for tree, over in trees.items()
        ]

    return ask


def test_a_planted_regression_is_red_in_a_real_run(
    bundle: Callable[[int, str], list[dict[str, Any]]],
) -> None:
    with pytest.raises(AssertionError, match=r"1 tests pass as .*test_value: .*assert 2 == 1"):
        compare.judge(*bundle(1, ""))


def test_a_real_run_without_one_passes_and_names_what_is_lacking(
    bundle: Callable[[int, str], list[dict[str, Any]]],
) -> None:
    facts = compare.judge(*bundle(2, ""))
    counts = {"failed, then passed": 1, "passed": 1, "failed": 1, "skipped": 1}
    assert facts["files"] == {A: counts}, "B is not in this release, and a broken file has no tests"
    assert {"OSError: no model some/model", "Skipped: needs an FP4 GPU"} <= facts["lacks"].keys()
    assert any("absent_plugin" in why for why in facts["lacks"])


def test_a_patched_tree_that_ends_its_process_is_red(
    bundle: Callable[[int, str], list[dict[str, Any]]],
) -> None:
    dies = "def test_dies():\n    import os\n    VALUE == 2 and os.abort()\n"
    with pytest.raises(AssertionError, match="2 tests pass as published, not as patched"):
        compare.judge(*bundle(2, dies))


def test_a_tier_without_a_gpu_is_not_green() -> None:
    row = {"outcome": "not run", "margins": {}, "why": "no CUDA device"}
    assert verdict({"tests": {"t": row}, "exit": 0}) == "undecided"
    assert verdict({"tests": {}, "exit": 0}) == "undecided"


def test_rows_name_tests_once_and_known_gpus(root: Path) -> None:
    named = [path for row in compare.ROWS.values() for path in row["tests"]]
    assert len(named) == len(set(named))
    for row in compare.ROWS.values():
        assert row.keys() <= {"tests", "options", "gpus"}
        assert set(row.get("gpus", ())) <= {"sm_90", "sm_100", "sm_103", "sm_120"}
    suite = tomllib.loads((root / "tests/gpu/suite.toml").read_text())
    assert suite["tier"]["upstream"]["minutes"] <= 15
