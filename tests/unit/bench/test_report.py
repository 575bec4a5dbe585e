"""Tables and charts of results."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.bench import condition, rows_of, write_result
from vllm_forge.bench.errors import InvalidResultError
from vllm_forge.bench.results import read_arm
from vllm_forge.bench.summary import summarize
from vllm_forge.cli import main

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def results(tmp_path: Path) -> list[str]:
    paths = [
        write_result(tmp_path / f"{arm}{c}.json", rows_of(c, items=20, starts=2),
                     orders=(0, 3), edit=condition(concurrency=c))
        for arm, c in (("mtp", 1), ("plain", 8))
    ]  # fmt: skip
    return list(map(str, paths))


def test_summary_is_that_of_the_rows(tmp_path: Path) -> None:
    rows = [
        row.model_copy(
            update={"output_tokens": 91, "drafted": 100, "accepted": 80, "positions": (49, 31)}
        )
        for row in rows_of(1, items=10)
    ]
    found = summarize(read_arm(write_result(tmp_path / "a.json", rows)))
    assert found.rates == (10 * 91 / 60,)
    assert (found.ttft, found.acceptance) == (0.1, 0.8)
    assert found.tpot == pytest.approx(0.01)
    assert found.cells() == ["a, c=8", "2" * 12, "1", "1", "15.2", "15.2", "not run", "0.100",
                             "10.00", "80.00%", "98.00% / 62.00%"]  # fmt: skip


def test_answers_alone_have_no_speed(tmp_path: Path) -> None:
    rows = [row.model_copy(update={"ttft": None}) for row in rows_of(1, items=5)]
    path = write_result(tmp_path / "a.json", rows, edit=lambda record: record["starts"][0].clear()
                        or record["starts"][0].update(order=0))  # fmt: skip
    assert summarize(read_arm(path)).cells()[4:] == ["not run"] * 7
    assert main(["bench", "report", str(path), f"--output={tmp_path / 'report'}"]) == 0


def test_report_has_the_same_bytes_each_time(results: list[str], tmp_path: Path) -> None:
    folders = [tmp_path / "x", tmp_path / "y"]
    for folder in folders:
        assert main(["bench", "report", *results, f"--output={folder}"]) == 0
    names = {path.name for path in folders[0].iterdir()}
    assert names == {"report.md", "starts.svg", "pareto.svg", "first-tokens.svg",
                     "positions.svg"}  # fmt: skip
    for name in names:
        assert len({(folder / name).read_bytes() for folder in folders}) == 1
    assert b"mtp1, c=1" in (folders[0] / "starts.svg").read_bytes()
    assert b"c=8" in (folders[0] / "pareto.svg").read_bytes()


def test_invalid_result_is_not_reported(tmp_path: Path) -> None:
    rows = [row.model_copy(update={"finish": "error"}) for row in rows_of(1, items=5)]
    path = write_result(tmp_path / "a.json", rows)
    code = main(["bench", "report", str(path), f"--output={tmp_path / 'report'}"])
    assert code == InvalidResultError.exit_code
    assert not (tmp_path / "report").exists()
