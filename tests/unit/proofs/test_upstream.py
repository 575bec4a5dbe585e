"""vLLM's own tests as published and as patched."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from vllm_forge.proofs.errors import ProofNotRunError, RegressionError, UpstreamRowsError
from vllm_forge.proofs.prove import UPSTREAM_ROWS, judge_upstream, read_upstream
from vllm_forge.proofs.record import TestRun

A, B = "tests/a/test_a.py", "tests/b/test_b.py"


def run(outcomes: dict[str, str], code: int | None = None) -> TestRun:
    red = "failed" in outcomes.values()
    return TestRun(
        exit=int(red) if code is None else code, tests=outcomes, why="AssertionError", tail="tail"
    )


GREEN = {f"{A}::one": "passed", f"{A}::two[x]": "skipped", f"{B}::one": "passed"}


def test_equal_outcomes_are_counted_by_file() -> None:
    assert judge_upstream("1", [A, B], run(GREEN), run(GREEN)) == {
        A: {"passed": 1, "skipped": 1}, B: {"passed": 1},
    }  # fmt: skip


@pytest.mark.parametrize("outcome", ["failed", "skipped", "xfailed", None])
def test_a_test_that_only_the_release_passes_is_a_regression(outcome: str | None) -> None:
    patched = {name: value for name, value in GREEN.items() if name != f"{B}::one"}
    if outcome is not None:
        patched[f"{B}::one"] = outcome
    with pytest.raises(RegressionError, match="1 of vLLM's tests pass as published") as caught:
        judge_upstream("1", [A, B], run(GREEN), run(patched))
    assert f"{B}::one" in str(caught.value)


def test_what_the_series_cures_and_what_fails_in_both_is_shown() -> None:
    published = GREEN | {f"{A}::two[x]": "failed", f"{A}::three": "failed"}
    patched = published | {f"{A}::two[x]": "passed"}
    assert judge_upstream("1", [A], run(published), run(patched))[A] == {
        "failed": 1, "failed, then passed": 1, "passed": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("published", "patched", "words"),
    [
        (run(GREEN, 2), run(GREEN), "published: pytest exited with 2"),
        (run(GREEN), run({}, 4), "patched: pytest exited with 4"),
        (run({f"{A}::one": "skipped"}), run({f"{A}::one": "skipped"}), "nothing in it passes"),
        (run({f"{B}::one": "passed"}), run({f"{B}::one": "passed"}), "nothing in it passes"),
    ],
)
def test_tests_that_did_not_run_are_undecided(
    published: TestRun, patched: TestRun, words: str
) -> None:
    with pytest.raises(ProofNotRunError, match=words):
        judge_upstream("1", [A], published, patched)


def test_rows_name_lines_of_the_matrix(root: Path) -> None:
    assert all(read_upstream(root, line) for line in ("0.22", "0.26", "0.33"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('"1" = [["a"]]\n', "valid string"),
        ('"2" = ["a"]\n', "list of vLLM's tests for line 1"),
        ("[test\n", "Expected"),
    ],
)
def test_invalid_rows_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / UPSTREAM_ROWS).parent.mkdir(parents=True)
    (tmp_path / UPSTREAM_ROWS).write_text(text)
    with pytest.raises(UpstreamRowsError, match=words):
        read_upstream(tmp_path, "1")


def test_committed_records_are_of_the_series_and_its_rows(root: Path) -> None:
    records = sorted((root / "records/upstream").glob("*.json"))
    assert records
    for path in records:
        record = json.loads(path.read_text())
        lock = tomllib.loads((root / "patches/vllm" / path.stem / "lock.toml").read_text())
        trees = {"published": lock["base"], "patched": lock["result"]}
        assert record["trees"] == trees, f"run: patch upstream --line {path.stem}"
        assert list(record["files"]) == read_upstream(root, path.stem)
