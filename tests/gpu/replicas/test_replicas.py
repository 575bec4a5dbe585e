"""Replicas do not disturb each other: each answers right, on GPUs of its own, at the same time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gpu.conftest import Margin, Record
from tests.gpu.harness.bootlog import parse
from tests.gpu.harness.device import ranks
from tests.gpu.links.link import LINKS, transports
from tests.gpu.race_server.verdicts import require_known
from tests.gpu.replicas.pair import ARM, REPLICAS, Replica

if TYPE_CHECKING:
    from collections.abc import Callable

    Read = Callable[[int], Replica]

pytestmark = [
    pytest.mark.gpu, pytest.mark.tier("replicas2", "replicas4"), pytest.mark.xdist_group("pair"),
    pytest.mark.value(8, 10),
]  # fmt: skip
RATE = 1e-3  # of wrong tokens; what one server must be able to exclude
LEAST_MIB = 512  # a context of CUDA and the KV cache of 256 MiB are more


@pytest.mark.parametrize("number", REPLICAS)
def test_every_token_is_the_known_one(
    number: int, replica: Read, margin: Margin, record: Record
) -> None:
    verdict = require_known(replica(number).asked, RATE, margin, record)
    assert list(verdict.tokens) == list(ARM.levels)


@pytest.mark.parametrize("number", REPLICAS)
def test_each_has_gpus_of_its_own(number: int, replica: Read, record: Record) -> None:
    found = replica(number)
    record(grown_mib=found.grown, transports=sorted(transports(found.asked.log)))
    assert len(found.grown) * len(REPLICAS) == ranks()
    assert all(grown >= LEAST_MIB for grown in found.grown.values()), found.grown
    config = parse(found.asked.log)
    assert config.settings["tensor_parallel_size"] == str(len(found.grown))
    assert config.captured
    assert transports(found.asked.log) <= {LINKS["pcie"].transport}


def test_both_answer_at_the_same_time(replica: Read) -> None:
    answers = [replica(number).asked.answers for number in REPLICAS]
    begun = max(min(answer.began for answer in rows) for rows in answers)
    ended = min(max(answer.ended for answer in rows) for rows in answers)
    assert begun < ended
