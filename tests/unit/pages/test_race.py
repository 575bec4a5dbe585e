"""Results of the GPU suite become rows of records/race.json and the race page."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from benchmarks.race import collect, record

from vllm_forge.pages.records import exclusion, race
from vllm_forge.project import Project

if TYPE_CHECKING:
    from pathlib import Path

RUN = {
    "tier": "kernel", "suite_sha256": "5" * 64, "exit": 0,
    "started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:01:00+00:00",
    "plan": {"line": "9.9", "tree": "7" * 40}, "gpus": [{"name": "Test GPU", "driver": "1.2"}],
}  # fmt: skip
FOLDER = "tests/gpu/race"


SEES_EARLY: dict[str, Any] = {"sees early": True}


def said(outcome: str = "passed", why: str = "", **facts: Any) -> dict[str, Any]:
    return {"outcome": outcome, "seconds": 1.0, "margins": {}, "facts": facts, "why": why}


def bitwise(outcome: str = "passed", **more: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "kind": "bitwise", "cell": "c", "format": "nvfp4", "mode": "graph", "launches": 500_000,
        "differ": 0, "dirty": 0, "margin": 0.5, "excluded_p": 1e-5,
    } | more  # fmt: skip
    return said(outcome, **facts)


def control(fault: str, tools: list[str], seen: list[str], **more: Any) -> dict[str, Any]:
    return said(kind="control", fault=fault, tools=tools, seen=seen, **more)


def page(tmp_path: Path, *tests: dict[str, Any], **more: Any) -> str:
    named = {f"{FOLDER}/test_x.py::t{number}": test for number, test in enumerate(tests)}
    path = tmp_path / "kernel.json"
    path.write_text(json.dumps(RUN | {"tests": named} | more))
    return race({"runs": [collect(path)]})


def test_page_without_runs_says_not_run() -> None:
    assert race({"runs": []}) == "not run"


def test_launches_are_summed(tmp_path: Path) -> None:
    text = page(tmp_path, bitwise(), bitwise(mode="eager"))
    assert "1,000,000 clean launches exclude p > 6.9e-06 at 99.9 %" in text
    assert "| nvfp4 | graph | 1 | 500,000 | 0 | 0 | 0.50 |" in text


def test_launches_without_a_bound_have_no_margin(tmp_path: Path) -> None:
    row = bitwise(mode="two_streams")
    del row["facts"]["margin"]
    assert "| nvfp4 | two_streams | 1 | 500,000 | 0 | 0 |  |" in page(tmp_path, row)


def test_a_wrong_launch_excludes_nothing(tmp_path: Path) -> None:
    text = page(tmp_path, bitwise("failed", differ=3))
    assert "exclude" not in text
    assert "3 launches are wrong" in text
    assert "* `test_x.py::t0`: failed" in text


def test_detected_faults_are_marked_by_tool(tmp_path: Path) -> None:
    text = page(
        tmp_path,
        control("early", ["float64 bound", "watchdog"], ["float64 bound"], what="too early"),
        control("early", ["memcheck"], []),
        control("no_fence", ["float64 bound", "SASS audit"], ["SASS audit"], what="no fence"),
        control("model_clean", ["watchdog"], [], what="clean, in a model of the sum alone"),
        said(kind="table", tool="racecheck", builds=["early"], **SEES_EARLY),
    )  # fmt: skip
    (early,) = [row for row in text.splitlines() if row.startswith("| `early`")]
    assert early == "| `early` |  |  | X |  |  |  | . |  | . |  | X |  |  |"
    blind = text.partition("Not detected by anything that runs the kernel:")[2]
    assert blind.strip() == "* `no_fence`: no fence"


def test_undetected_fault_that_is_not_required_has_its_reason(tmp_path: Path) -> None:
    rows = [
        control("half", ["synccheck"], [], why_not_required="it hangs"),
        control("late", ["synccheck"], ["synccheck"], why_not_required="seen all the same"),
    ]
    text = page(tmp_path, *rows)
    assert "and not required:\n\n* `half` by synccheck: it hangs" in text
    assert "`late` by" not in text


def test_test_that_did_not_run_has_its_reason(tmp_path: Path) -> None:
    text = page(tmp_path, said("not run", "no sanitizer"))
    assert "* `test_x.py::t0`: no sanitizer" in text
    assert "0 passed, 0 failed, 1 not run" in text


def test_other_tests_and_other_gpus_are_ignored(tmp_path: Path) -> None:
    tests = {
        f"{FOLDER}/test_bitwise.py::a": bitwise(),
        f"{FOLDER}/test_bitwise.py::b": said("other GPU", "needs sm_100"),
        "tests/gpu/numerics/test_wo_a.py::a": said("failed"),
        "tests/gpu/soak/test_artifact.py::a": said("not run"),
        "tests/gpu/soak/test_launches.py::a": bitwise(mode="eager"),
    }
    text = page(tmp_path, tests=tests)
    assert "2 tests of the tier are of this kernel: 2 passed, 0 failed, 0 not run" in text
    assert "1,000,000 clean launches" in text


def test_a_result_replaces_that_of_its_gpu_line_and_tier(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.records.mkdir()
    (project.records / "race.json").write_text('{"runs": []}')
    paths = [tmp_path / f"{number}.json" for number in range(3)]
    for path, tier, launches in zip(paths, ("kernel", "soak", "kernel"), (1, 2, 3), strict=True):
        tests = {f"{FOLDER}/test_bitwise.py::a": bitwise(launches=launches)}
        path.write_text(json.dumps(RUN | {"tier": tier, "tests": tests}))
    record(project, paths)
    runs = json.loads((project.records / "race.json").read_text())["runs"]
    assert [(run["run"]["tier"], run["rows"][0]["launches"]) for run in runs] == [
        ("soak", 2), ("kernel", 3),
    ]  # fmt: skip


def test_excluded_rate_is_the_exact_limit() -> None:
    """In a thousand launches with that rate, one of a thousand runs would be clean."""
    assert exclusion(1000) == "1,000 clean launches exclude p > 6.9e-03 at 99.9 %"
    assert (1 - 6.884e-3) ** 1000 < 0.0011
    assert "p > 1.0e+00" in exclusion(0)
