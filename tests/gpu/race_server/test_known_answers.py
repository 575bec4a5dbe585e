"""Concurrent decode: every token is the known one, on every way that a step can take."""

from __future__ import annotations

import pytest

from tests.gpu.conftest import PARALLEL, Margin, Record
from tests.gpu.harness.bootlog import parse
from tests.gpu.harness.device import ranks
from tests.gpu.models.known_answers import LENGTHS
from tests.gpu.race_server.arms import ARMS, AskedOf
from tests.gpu.race_server.verdicts import finds_planted, is_clean, require_known

pytestmark = [pytest.mark.gpu, pytest.mark.tier("server"), pytest.mark.xdist_group("race-server")]
CLEAN = [
    pytest.param(name, marks=PARALLEL if arm.parallel else ())
    for name, arm in ARMS.items()
    if arm.clean
]
SCORED = [case for case in CLEAN if ARMS[str(case.values[0])].scored]
SPECULATING = [case for case in CLEAN if ARMS[str(case.values[0])].speculate]
RATE = 1e-3  # of wrong tokens; what one server must be able to exclude
PREFILLS = 3  # that arrive while others decode, per concurrency
REFUSED = 0.01  # of the drafts, which are all right


@pytest.mark.value(8, 10)
@pytest.mark.parametrize("arm", CLEAN)
def test_every_token_is_the_known_one(
    arm: str, asked: AskedOf, margin: Margin, record: Record
) -> None:
    verdict = require_known(asked(arm), RATE, margin, record)
    assert list(verdict.tokens) == list(ARMS[arm].levels)
    assert all(count >= PREFILLS for count in verdict.prefills.values()), verdict.prefills
    longest = max(len(answer.prompt) for answer in asked(arm).answers)
    assert longest >= LENGTHS[-1]


@pytest.mark.value(8, 10)
@pytest.mark.parametrize("arm", CLEAN)
def test_ran_as_asked(arm: str, asked: AskedOf, record: Record) -> None:
    """Graphs where they are meant, and the experts' format; which backend, the record says."""
    config = parse(asked(arm).log)
    wanted = "NvFp4" if ARMS[arm].scheme.activations else "WNA16"
    record(moe=config.moe, graph_mode=config.graph_mode, attention=config.attention)
    assert config.captured == ARMS[arm].graphs
    assert config.settings["tensor_parallel_size"] == str(ranks())
    assert any(row.startswith(f"{wanted}: ") for row in config.moe), config.moe


@pytest.mark.value(8, 10)
@pytest.mark.parametrize("arm", SPECULATING)
def test_drafts_are_taken_under_load(arm: str, asked: AskedOf, margin: Margin) -> None:
    """The head proposes the known token, so that steps verify two per request."""
    reading = asked(arm).reading
    assert reading is not None
    assert reading.drafts > 0
    margin("drafts refused", 1 - reading.accepted / reading.draft_tokens, REFUSED)


@pytest.mark.value(8, 10)
@pytest.mark.parametrize("arm", SCORED)
def test_scoring_again_is_green_and_finds_a_planted_token(
    arm: str, asked: AskedOf, record: Record
) -> None:
    """The gate for models whose answers nobody knows, on one whose answers are known."""
    found = asked(arm)
    record(scored=[len(given) for given, _ in found.scored])
    assert is_clean(found.scored)
    assert finds_planted(found.planted)
