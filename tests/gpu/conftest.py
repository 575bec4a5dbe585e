"""GPU tests: markers, one GPU per worker. Without a GPU they are skipped.

``--tier NAME`` (repeatable) runs only these tiers.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from tests.gpu.harness.device import NAMED, VISIBLE, ranks, visible
from tests.gpu.together import Together

if TYPE_CHECKING:
    from collections.abc import Callable

CAPABILITIES = {"sm_90": (9, 0), "sm_100": (10, 0), "sm_103": (10, 3), "sm_120": (12, 0)}
HOW_TO_RUN = "run it on a host with a GPU: `nox -s test-gpu -- --sku NAME`"
TOGETHER = pytest.StashKey[Together]()
Margin: TypeAlias = "Callable[[str, float, float], None]"
Record: TypeAlias = "Callable[..., None]"
PARALLEL = pytest.mark.tier("tp2", "tp4")  # of tests that use all GPUs of their tier


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("gpu").addoption("--tier", action="append", help="only these tiers")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.import_plugin("tests.gpu.harness.plugin")  # margins, budget, verdicts
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    for name in CAPABILITIES:
        config.addinivalue_line("markers", f"{name}: only on GPUs of that architecture")
    config.addinivalue_line("markers", "tier(*names): by which rows of suite.toml it runs")
    config.addinivalue_line("filterwarnings", "default")  # what torch warns of is not ours
    config.stash[TOGETHER] = Together(importlib.import_module("tests.gpu.harness.plugin").say)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if gpus := visible():
        os.environ[VISIBLE] = ",".join(gpus)
        if worker:
            os.environ[NAMED] = gpus[int(worker.removeprefix("gw")) % len(gpus)]


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
    tiers, tier = set(item.config.getoption("tier") or ()), item.get_closest_marker("tier")
    # Those for several GPUs run only where the runner says how many.
    if tier is not None and not tiers & {*tier.args} and (tiers or len(tier.args) > 1):
        return f"tier {tier.args[0]}: `--tier {tier.args[0]}` runs it"
    wanted = [name for name in CAPABILITIES if item.get_closest_marker(name) is not None]
    if item.get_closest_marker("gpu") is None and not wanted:
        return ""
    if (found := device()) is None:
        return f"no CUDA device: {HOW_TO_RUN}"
    if wanted and found[1] not in {CAPABILITIES[name] for name in wanted}:
        return f"needs {' or '.join(wanted)}, this is {found[0]}"
    if len(gpus := visible()) < ranks():
        return f"needs {ranks()} GPUs, here are {len(gpus)}"
    return ""


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """Add fields to the test's row of results; values must be JSON."""

    def add(**fields: Any) -> None:
        request.node.user_properties.append(("row", fields))

    return add
