"""A million known tokens of each server under concurrency; the server tier asks for thousands."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.gpu.conftest import TOGETHER, Margin, Record
from tests.gpu.race_server.arms import ARMS, AskedOf, Fleet
from tests.gpu.race_server.verdicts import require_known

if TYPE_CHECKING:
    from collections.abc import Iterator


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.tier("soak"),
    pytest.mark.xdist_group("soak-server"),
    pytest.mark.value(10, 100),
]
CLEAN = [name for name, arm in ARMS.items() if arm.clean and not arm.parallel]
RATE = 1e-5  # of wrong tokens; what one server must be able to exclude
TOKENS = 30_000  # per client and level: 31 clients


@pytest.fixture(scope="module")
def asked(pytestconfig: pytest.Config) -> Iterator[AskedOf]:
    """What came of an arm; all begin when the first is asked for, and each takes little memory."""
    together = pytestconfig.stash[TOGETHER]
    fleet = Fleet(together.work, together.logs, tokens=TOKENS)
    with ThreadPoolExecutor(len(CLEAN)) as pool:
        runs = {name: pool.submit(fleet.run, name) for name in CLEAN}
        yield lambda name: runs[name].result()


@pytest.mark.parametrize("arm", CLEAN)
def test_every_token_is_the_known_one_for_long(
    arm: str, asked: AskedOf, margin: Margin, record: Record
) -> None:
    require_known(asked(arm), RATE, margin, record)
