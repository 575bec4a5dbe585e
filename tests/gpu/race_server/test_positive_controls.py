"""What must be found: a wrong expert at any concurrency, a stale row only where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gpu.race_server.arms import WRONG_EXPERT, AskedOf
from tests.gpu.race_server.verdicts import blames, judge

if TYPE_CHECKING:
    from tests.gpu.conftest import Record

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.tier("server"),
    pytest.mark.xdist_group("race-server"),
    pytest.mark.value(8, 10),
]


@pytest.mark.parametrize("arm", ["wrong-expert"])
def test_a_wrong_expert_is_found_where_it_is_met(arm: str, asked: AskedOf, record: Record) -> None:
    answers = asked(arm).answers
    record(**judge(answers).record())
    assert blames(WRONG_EXPERT, answers)


@pytest.mark.parametrize("arm", ["stale-row"])
def test_a_stale_row_is_found_under_concurrency_and_not_alone(
    arm: str, asked: AskedOf, record: Record
) -> None:
    verdict = judge(asked(arm).answers)
    record(**verdict.record())
    assert verdict.wrong[1] == 0, verdict.words
    assert all(count for level, count in verdict.wrong.items() if level > 1), verdict.wrong
