"""Over each link every token is the known one, and the link is the one that was asked for."""

from __future__ import annotations

import pytest

from tests.gpu.conftest import Margin, Record
from tests.gpu.harness.bootlog import parse
from tests.gpu.harness.device import ranks
from tests.gpu.links.conftest import GROUP, TIERS
from tests.gpu.links.link import LINKS, backends, transports
from tests.gpu.links.servers import ARMS
from tests.gpu.race_server.arms import AskedOf
from tests.gpu.race_server.verdicts import require_known

pytestmark = [pytest.mark.gpu, TIERS, pytest.mark.xdist_group(GROUP), pytest.mark.value(8, 10)]
RATE = 1e-3  # of wrong tokens; what one server must be able to exclude
REFUSED = 0.01  # of the drafts, which are all right
NVLINK = [pytest.mark.sm_90, pytest.mark.sm_100, pytest.mark.sm_103]  # their GPUs have it
# What NCCL takes by itself is known where GPUs have NVLink.
LINKED = [
    pytest.param(name, marks=NVLINK if arm.link == "peer" else ()) for name, arm in ARMS.items()
]


@pytest.mark.parametrize("arm", ARMS)
def test_every_token_is_the_known_one(
    arm: str, asked: AskedOf, margin: Margin, record: Record
) -> None:
    verdict = require_known(asked(arm), RATE, margin, record)
    assert list(verdict.tokens) == list(ARMS[arm].levels)


@pytest.mark.parametrize("arm", LINKED)
def test_sums_took_the_link(arm: str, asked: AskedOf, record: Record) -> None:
    """By NCCL alone, which says what carries its channels."""
    found = asked(arm).log
    record(backends=backends(found), transports=sorted(transports(found)))
    assert backends(found) == ["PYNCCL"]
    assert transports(found) == {LINKS[ARMS[arm].link].transport}


@pytest.mark.parametrize("arm", ARMS)
def test_ran_as_asked(arm: str, asked: AskedOf, record: Record) -> None:
    config = parse(asked(arm).log)
    record(moe=config.moe, graph_mode=config.graph_mode)
    assert config.captured == ARMS[arm].graphs
    assert config.settings["tensor_parallel_size"] == str(ranks())


@pytest.mark.parametrize("arm", [name for name, arm in ARMS.items() if arm.speculate])
def test_drafts_are_taken(arm: str, asked: AskedOf, margin: Margin) -> None:
    reading = asked(arm).reading
    assert reading is not None
    assert reading.drafts > 0
    margin("drafts refused", 1 - reading.accepted / reading.draft_tokens, REFUSED)
