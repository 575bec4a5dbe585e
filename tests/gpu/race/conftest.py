"""Fixtures of the race tests: the op under test, the native tools, and how long to launch.

``VLLM_FORGE_RACE_SECONDS`` is the time of a cell, 0.8 by default; ``VLLM_FORGE_RACE_LAUNCHES``
instead makes all cells together launch so often: 10000000 is the nightly gate.
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

SECONDS, LAUNCHES = "VLLM_FORGE_RACE_SECONDS", "VLLM_FORGE_RACE_LAUNCHES"
EXPERIMENTS = {"test_controls.py", "test_red_zones.py", "test_sanitizer.py"}
CELLS = pytest.StashKey[int]()


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a test of many launches uses."""

    op: Callable[..., torch.Tensor]
    tools: Tools
    budget: Budget


def pytest_collection_finish(session: pytest.Session) -> None:
    budgeted = [item for item in session.items if "budget" in getattr(item, "fixturenames", ())]
    session.config.stash[CELLS] = max(1, len(budgeted))
    asked = any(item.path.name in EXPERIMENTS for item in session.items)
    # An xdist worker begins what its own tests ask for: all of it would run once per worker.
    if asked and device() is not None and not os.environ.get("PYTEST_XDIST_WORKER"):
        from tests.gpu.race.experiments import start_all

        start_all()


@pytest.fixture
def budget(request: pytest.FixtureRequest) -> Budget:
    """How long one cell launches."""
    from tests.gpu.race.repeat import Budget

    total = os.environ.get(LAUNCHES)
    share = -(-int(total) // request.config.stash[CELLS]) if total else None
    return Budget(seconds=float(os.environ.get(SECONDS, "0.8")), launches=share)


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
