"""Fixtures of the race tests: the op under test, the native tools, and how long to launch.

``VLLM_FORGE_RACE_SECONDS`` is the time of a cell, 0.8 by default. Tier soak launches ten million
times (tests/gpu/soak).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.gpu.conftest import device
from tests.gpu.race.kit import native_library, wheel_library

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from tests.gpu.race.repeat import Budget, Tools

SECONDS = "VLLM_FORGE_RACE_SECONDS"
EXPERIMENTS = {"test_controls.py", "test_red_zones.py", "test_sanitizer.py"}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a test of many launches uses."""

    op: Callable[..., torch.Tensor]
    tools: Tools
    budget: Budget


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With workers one has all experiments, which it begins at once; the others have the rest."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        items.sort(key=lambda item: item.path.name not in EXPERIMENTS)


def pytest_collection_finish(session: pytest.Session) -> None:
    asked = any(item.path.name in EXPERIMENTS for item in session.items)
    # Each xdist worker collects all tests: the one that runs the experiments begins them.
    if asked and device() is not None and not os.environ.get("PYTEST_XDIST_WORKER"):
        from tests.gpu.race.experiments import start_all

        start_all()


@pytest.fixture
def budget() -> Budget:
    """How long one cell launches."""
    from tests.gpu.race.repeat import Budget

    return Budget(seconds=float(os.environ.get(SECONDS, "0.8")))


@pytest.fixture
def bench(op: Callable[..., torch.Tensor], tools: Tools, budget: Budget) -> Bench:
    """All three."""
    return Bench(op=op, tools=tools, budget=budget)


@pytest.fixture(scope="session")
def op() -> Callable[..., torch.Tensor]:
    """The wheel's op, after the driver has compiled its kernels."""
    from tests.gpu.race.case import load_op
    from tests.gpu.race.experiments import WARMED, result

    library = wheel_library()
    for form in WARMED:
        said = result(f"warm-{form}")
        assert said.code == 0, said.text[-2000:]
    return load_op(library)


@pytest.fixture(scope="session")
def tools() -> Tools:
    """The checking kernel."""
    from tests.gpu.race.repeat import Tools

    return Tools(native_library("tools"))
