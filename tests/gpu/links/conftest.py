"""Servers and sums of each link, which tests read."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.gpu.conftest import TOGETHER, why_not
from tests.gpu.links import sums
from tests.gpu.links.servers import ARMS, LinkFleet

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gpu.race_server.arms import AskedOf

TIERS = pytest.mark.tier("pcie2", "pcie4")
GROUP = "links"
SECONDS = {"server": 120, "sums": 60}


def pytest_collection_finish(session: pytest.Session) -> None:
    """What collected tests name as parameters, all at once: there are few servers."""
    together = session.config.stash[TOGETHER]
    fleet = LinkFleet(together.work, together.logs)
    for item in session.items:
        if not isinstance(item, pytest.Function) or why_not(item):
            continue
        if "asked" in item.fixturenames:
            arm = str(item.callspec.params["arm"])
            seconds = SECONDS["server"] + 10 * (ARMS[arm].graphs + ARMS[arm].speculate)
            together.add(f"link-{arm}", seconds, partial(fleet.run, arm), GROUP)
        elif "summed" in item.fixturenames:
            link, backend = (str(item.callspec.params[name]) for name in ("link", "backend"))
            call = partial(sums.run, link, backend, together.work)
            together.add(f"sums-{link}-{backend}", SECONDS["sums"], call, GROUP)


@pytest.fixture
def asked(pytestconfig: pytest.Config) -> AskedOf:
    """What came of an arm's server."""
    return lambda name: pytestconfig.stash[TOGETHER].result(f"link-{name}")


@pytest.fixture
def summed(pytestconfig: pytest.Config) -> Callable[[str, str], sums.Summed]:
    """What the ranks gave together over a link, with a backend of the experts."""
    return lambda link, backend: pytestconfig.stash[TOGETHER].result(f"sums-{link}-{backend}")
