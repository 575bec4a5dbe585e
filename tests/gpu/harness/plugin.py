"""Pytest plugin of the GPU suite: the budget, margins, and the verdict of each test.

Load it with ``-p tests.gpu.harness.plugin``; ``tests/gpu/conftest.py`` says which tests are for
which GPU and tier. What does not run has a reason that names what would run it.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu.harness.limits import DEADLINE, NotStartedError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

RESULTS = "VLLM_FORGE_GPU_RESULTS"
MARGIN = "margin"
ENGINES = "engines(*names): engines that a test reads; those of a run are started together"
VALUE = "value(points, seconds): what a test is worth, and what it takes; the budget's order"
# How tests/gpu/conftest.py says that a test is for another GPU, or of another tier.
OTHER_TIER = "other tier"
SKIPS = {"needs sm_": "other GPU", "tier ": OTHER_TIER}
NOT_RUN = "not run"
_LIVE = os.dup(2)  # before pytest captures it: plugins named with -p are imported first
UNFINISHED = -1  # the exit code of pytest before it ends


def say(text: str) -> None:
    """Tell the user now, past pytest's capture; from any thread."""
    os.write(_LIVE, f"{text}\n".encode())


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker and the collector of verdicts."""
    for marker in (VALUE, ENGINES):
        config.addinivalue_line("markers", marker)
    worker = hasattr(config, "workerinput")  # its reports reach the controller, which writes them
    results = None if worker else os.environ.get(RESULTS)
    config.pluginmanager.register(Verdicts(results), "vllm-forge-verdicts")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the most valued first; what is equal keeps its order."""
    items.sort(key=lambda item: -_value(item)[0] / _value(item)[1])


def _value(item: pytest.Item) -> tuple[float, float]:
    """Points and seconds."""
    mark = item.get_closest_marker("value")
    points, seconds = mark.args if mark else (1.0, 1.0)
    return float(points), float(seconds)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What does not fit into the rest of the budget is not begun."""
    deadline = float(os.environ.get(DEADLINE, math.inf))
    _, seconds = _value(item)
    left = deadline - time.time()
    if seconds > left:
        pytest.skip(
            f"budget: takes about {seconds:.0f} s and {max(left, 0):.0f} s are left; "
            "run with more --minutes"
        )


@pytest.fixture
def margin(record_property: Callable[[str, object], None]) -> Callable[[str, float, float], None]:
    """Compare a measured value with its bound, and keep both for the receipt.

    ``margin(name, measured, bound)`` fails above the bound, and for nan.
    """

    def check(name: str, measured: float, bound: float) -> None:
        record_property(f"{MARGIN}:{name}", json.dumps([float(measured), float(bound)]))
        assert measured <= bound, f"{name}: {measured:.6g} is above its bound {bound:.6g}"

    return check


class Verdicts:
    """Collects what each test said; the worst of setup, call and teardown counts.

    Args:
        results: file that is written after each test, or None.
    """

    def __init__(self, results: str | None = None) -> None:
        self.results = results
        self.rows: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Generator[None, Any, Any]:
        """What was not started in time leaves the tests that read it without a verdict."""
        try:
            return (yield)
        except NotStartedError as error:
            pytest.skip(str(error))

    pytest_runtest_call = pytest_runtest_setup

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one test."""
        row = self.rows.setdefault(
            report.nodeid,
            {"outcome": NOT_RUN, "seconds": 0.0, "margins": {}, "facts": {}, "why": ""},
        )
        row["seconds"] = round(row["seconds"] + report.duration, 3)
        if report.failed:
            row["outcome"], row["why"] = "failed", row["why"] or _said(report)
        elif hasattr(report, "wasxfail"):
            row["outcome"], row["why"] = "failed", f"xfail is no verdict: {report.wasxfail}"
        elif report.skipped and row["outcome"] != "failed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            reason = reason.removeprefix("Skipped: ")
            row["outcome"] = NOT_RUN
            for start, outcome in SKIPS.items():
                if reason.startswith(start):
                    row["outcome"] = outcome
            row["why"] = reason
        elif report.when == "call" and row["outcome"] == NOT_RUN:
            row["outcome"] = "passed"
        if report.when == "call":
            for name, value in report.user_properties:
                if name.startswith(f"{MARGIN}:"):
                    measured, bound = json.loads(str(value))
                    row["margins"][name.partition(":")[2]] = {"measured": measured, "bound": bound}
                elif isinstance(value, dict):
                    row["facts"] |= value
        if report.when == "teardown":
            self.write(UNFINISHED)  # a run that is killed has said what it knew

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """The last word."""
        self.write(int(exitstatus))

    def write(self, code: int) -> None:
        """Write all verdicts, if there is a file for them."""
        if self.results is None:
            return
        ours = {name: row for name, row in self.rows.items() if row["outcome"] != OTHER_TIER}
        aside = Path(f"{self.results}.new")
        aside.write_text(json.dumps({"exit": code, "tests": ours}, indent=1) + "\n")
        aside.replace(self.results)


def _said(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    return text.strip()[:600]
