"""GPU tests: markers, one GPU per worker, a wrong GPU refused, a row of results per test.

On their own they are skipped where there is no GPU. Options: ``--sku NAME`` (of matrix.toml: any
other GPU is refused), ``--tier NAME`` (repeatable), ``--results FILE`` (one JSON object per line).
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu.together import Together

if TYPE_CHECKING:
    from collections.abc import Callable

MATRIX = Path(__file__).parents[2] / "matrix.toml"
CAPABILITIES = {"sm_90": (9, 0), "sm_100": (10, 0), "sm_103": (10, 3), "sm_120": (12, 0)}
TIERS = ("kernel", "server", "soak")
HOW_TO_RUN = "run it on a host with a GPU: `nox -s test-gpu -- --sku NAME`"
RESULTS = pytest.StashKey[Path]()
TOGETHER = pytest.StashKey[Together]()
VISIBLE = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu")
    group.addoption("--sku", help="the SKU of matrix.toml that this GPU must be")
    group.addoption("--tier", action="append", choices=TIERS, help="only these tiers")
    group.addoption("--results", type=Path, help="append one JSON object per test to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.import_plugin("tests.gpu.harness.plugin")  # margins, budget, verdicts
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    for name in CAPABILITIES:
        config.addinivalue_line("markers", f"{name}: only on GPUs of that architecture")
    config.addinivalue_line("markers", "tier(name): kernel (minutes), server or soak (hours)")
    config.addinivalue_line("filterwarnings", "default")  # what torch warns of is not ours
    config.stash[TOGETHER] = Together(importlib.import_module("tests.gpu.harness.plugin").say)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    gpus = config.stash[VISIBLE] = _visible()
    if worker and gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(worker.removeprefix("gw")) % len(gpus)]
    if not worker and (path := config.getoption("results")) is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        config.stash[RESULTS] = path
        config.pluginmanager.register(_Results(path))


def _visible() -> list[str]:
    """The GPUs of this process, without touching CUDA."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(number) for number, _ in enumerate(listed.stdout.splitlines())]


def visible(config: pytest.Config) -> list[str]:
    """The GPUs of the whole run; an xdist worker has one of them for itself."""
    return config.stash[VISIBLE]


@cache
def device() -> tuple[str, tuple[int, int]] | None:
    """Name and compute capability of the GPU; None where torch finds none."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse to say anything about a SKU on another GPU."""
    name = session.config.getoption("sku")
    if name is None:
        return
    rows = tomllib.loads(MATRIX.read_text(encoding="utf-8"))["sku"]
    if name not in rows:
        pytest.exit(f"no SKU {name!r}; there are {', '.join(rows)}", pytest.ExitCode.USAGE_ERROR)
    wanted, found = rows[name], device()
    capability = tuple(int(part) for part in wanted["compute_capability"].split("."))
    if found is None or found[1] != capability or not found[0].startswith(wanted["device"]):
        here = f"{found[0]} ({found[1][0]}.{found[1][1]})" if found else "no GPU"
        pytest.exit(
            f"--sku {name} is {wanted['device']} ({wanted['compute_capability']}), this is {here}",
            pytest.ExitCode.USAGE_ERROR,
        )


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Begin what tests read; conftests of folders have said what that is."""
    # A worker of xdist has collected what others will run: it begins when it is asked.
    if not session.config.option.collectonly and not hasattr(session.config, "workerinput"):
        session.config.stash[TOGETHER].start()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End what still runs: no test that is left asks for it."""
    session.config.stash[TOGETHER].end()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if reason := why_not(item):
        pytest.skip(reason)


def why_not(item: pytest.Item) -> str:
    """Why a test does not run here, and what would run it; empty if it does."""
    tiers, tier = item.config.getoption("tier"), item.get_closest_marker("tier")
    if tiers and tier is not None and tier.args[0] not in tiers:
        return f"tier {tier.args[0]}: `--tier {tier.args[0]}` runs it"
    wanted = [name for name in CAPABILITIES if item.get_closest_marker(name) is not None]
    if item.get_closest_marker("gpu") is None and not wanted:
        return ""
    if (found := device()) is None:
        return f"no CUDA device: {HOW_TO_RUN}"
    if wanted and found[1] not in {CAPABILITIES[name] for name in wanted}:
        return f"needs {' or '.join(wanted)}, this is {found[0]}"
    return ""


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Add fields to the test's row of results; values must be JSON."""

    def add(**fields: Any) -> None:
        request.node.user_properties.append(("row", fields))

    return add


class _Results:
    """One line per test, written when it ends: what comes later cannot lose it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        row: dict[str, Any] = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
        }
        for name, fields in report.user_properties:
            if name == "row" and isinstance(fields, dict):
                row |= fields
        if not report.passed:
            reason = report.longrepr
            text = reason[2] if isinstance(reason, tuple) else report.longreprtext
            row["reason"] = text[-2000:]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
