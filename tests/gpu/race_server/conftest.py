"""Servers of the race tests."""

from __future__ import annotations

from functools import partial

import pytest

from tests.gpu.conftest import TOGETHER, why_not
from tests.gpu.race_server.arms import ARMS, AskedOf, Fleet

SECONDS = 120  # of a start and all that is asked, about


def pytest_collection_finish(session: pytest.Session) -> None:
    """Every arm that a collected test names as its parameter ``arm``."""
    together = session.config.stash[TOGETHER]
    wanted = dict.fromkeys(
        str(item.callspec.params["arm"])
        for item in session.items
        if isinstance(item, pytest.Function)
        and "asked" in item.fixturenames
        and hasattr(item, "callspec")
        and not why_not(item)
    )
    if wanted:
        fleet = Fleet(together.work, together.logs)
        for name in wanted:
            # What compiles the most goes ahead.
            seconds = SECONDS + 10 * (ARMS[name].graphs + ARMS[name].speculate)
            call = partial(fleet.run, name)
            together.add(f"race-{name}", seconds, call, "race-server", "race")


@pytest.fixture
def asked(pytestconfig: pytest.Config) -> AskedOf:
    """What came of an arm's server."""
    return lambda name: pytestconfig.stash[TOGETHER].result(f"race-{name}")
