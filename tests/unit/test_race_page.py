"""docs/race.md is docs/race.json; results are read as the suite writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_forge.report.race_page import DATA, PAGE, collect, render

REPO = Path(__file__).parents[2]
RUN = {
    "started": "2026-01-01T00:00:00+00:00",
    "gpu": {"name": "Test GPU", "driver_version": "1.2"},
    "kit": {"line": "9.9", "wheel": "vllm-9.9.whl"},
    "parts": {"controls": {"exit": 0, "seconds": 3.0}, "launches": {"exit": 1, "seconds": 4.4}},
}


def bitwise(**more: Any) -> dict[str, Any]:
    return {
        "test": "tests/gpu/race/test_bitwise.py::a", "outcome": "passed", "seconds": 1,
        "kind": "bitwise", "cell": "c", "format": "nvfp4", "mode": "graph", "launches": 500_000,
        "differ": 0, "dirty": 0, "margin": 0.5, "excluded_p": 1e-5,
    } | more  # fmt: skip


def control(fault: str, tools: list[str], seen: list[str], **more: Any) -> dict[str, Any]:
    return {
        "test": f"tests/gpu/race/test_controls.py::{fault}", "outcome": "passed",
        "kind": "control", "fault": fault, "tools": tools, "seen": seen,
    } | more  # fmt: skip


def page(tmp_path: Path, *rows: dict[str, Any]) -> str:
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return render({"runs": [collect(tmp_path)]})


def test_the_page_is_the_data() -> None:
    data = json.loads((REPO / DATA).read_text())
    remedy = "run: python -m vllm_forge.report.race_page RESULTS"
    assert (REPO / PAGE).read_text() == render(data), remedy


def test_without_a_run_it_says_so() -> None:
    assert "\nnot run\n" in render({"runs": []})


def test_launches_are_added_up(tmp_path: Path) -> None:
    text = page(tmp_path, bitwise(), bitwise(mode="eager"))
    assert "1,000,000 clean launches exclude p > 6.9e-06 at 99.9 %" in text
    assert "| nvfp4 | graph | 1 | 500,000 | 0 | 0 | 0.50 |" in text


def test_a_wrong_launch_excludes_nothing(tmp_path: Path) -> None:
    text = page(tmp_path, bitwise(differ=3, outcome="failed"))
    assert "exclude" not in text
    assert "3 launches are wrong" in text
    assert "* `test_bitwise.py::a`: failed" in text


def test_faults_and_tools(tmp_path: Path) -> None:
    text = page(
        tmp_path,
        control("early", ["float64 bound", "watchdog"], ["float64 bound"], what="too early"),
        control("early", ["memcheck"], []),
        control("no_fence", ["float64 bound", "SASS audit"], ["SASS audit"], what="no fence"),
        {"test": "t", "outcome": "passed", "kind": "table", "tool": "racecheck",
         "builds": ["early"], "sees early": True},
    )  # fmt: skip
    (early,) = [row for row in text.splitlines() if row.startswith("| `early`")]
    assert early == "| `early` |  |  | X |  |  |  | . |  | . |  | X |  |  |"
    assert "Seen by nothing that runs the kernel:\n\n* `no_fence`: no fence" in text


def test_what_need_not_be_seen_is_listed_with_its_reason(tmp_path: Path) -> None:
    rows = [
        control("half", ["synccheck"], [], why_not_required="it hangs"),
        control("late", ["synccheck"], ["synccheck"], why_not_required="seen all the same"),
    ]
    text = page(tmp_path, *rows)
    assert "without being red:\n\n* `half` by synccheck: it hangs\n" in text
    assert "`late` by" not in text


def test_what_did_not_run_is_listed_with_its_reason(tmp_path: Path) -> None:
    row = {"test": "x/test_y.py::z", "outcome": "skipped", "reason": "no sanitizer"}
    assert "* `test_y.py::z`: no sanitizer" in page(tmp_path, row)
    assert "0 passed, 0 failed, 1 not run" in page(tmp_path, row)
