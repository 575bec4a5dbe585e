"""The two servers, which tests read."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.gpu.conftest import TOGETHER, why_not
from tests.gpu.replicas import pair

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 150


def pytest_collection_finish(session: pytest.Session) -> None:
    together = session.config.stash[TOGETHER]
    if any("replica" in getattr(item, "fixturenames", ()) and not why_not(item)
           for item in session.items):  # fmt: skip
        together.add("replicas", SECONDS, partial(pair.run, together.work, together.logs), "pair")


@pytest.fixture
def replica(pytestconfig: pytest.Config) -> Callable[[int], pair.Replica]:
    """What came of the Nth."""
    return lambda number: dict(pytestconfig.stash[TOGETHER].result("replicas"))[number]
