"""The full artifact: drafts are taken as often as published, and no token is impossible."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from tests.gpu.harness.corruption import alarms, corrupted, impossible
from tests.gpu.harness.workloads import Reply, load_workloads
from tests.gpu.soak.artifact import Artifact, Asked, bands

if TYPE_CHECKING:
    from _pytest.mark import ParameterSet

    from tests.gpu.conftest import Record
    from tests.gpu.harness.gate import Band
    from tests.gpu.harness.server import Server

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.tier("soak"),
    pytest.mark.xdist_group("artifact"),
    pytest.mark.value(100, 10),  # all alike: the server ends with the module
]
WORKLOADS = load_workloads()
BANDS = bands()
ASKED = [(band, c) for band in BANDS for c in WORKLOADS[band.workload].together]
SAMPLE = 16  # of the answers of a workload at its highest concurrency, the longest


def case(band: Band, *more: int) -> ParameterSet:
    """A parameter that is for the GPU of the band's SKU."""
    name = "-".join([band.sku, band.workload, *(f"c{c}" for c in more)])
    return pytest.param(band, *more, marks=getattr(pytest.mark, BANDS[band]), id=name)


@pytest.mark.parametrize(("band", "together"), [case(band, c) for band, c in ASKED])
def test_acceptance_is_within_its_band(
    band: Band, together: int, artifact: Artifact, record: Record
) -> None:
    k = artifact.preset.speculative_tokens
    if band.k not in {0, k}:
        pytest.skip(f"published for k = {band.k}; preset {artifact.preset.name} has k = {k}")
    asked = ask(artifact, band, together)
    verdict = asked.verdict(dataclasses.replace(band, k=k))
    record(
        **asked.facts, acceptance=verdict.rate, interval=verdict.interval,
        mean_length=verdict.mean_length, published=band.published,
    )  # fmt: skip
    assert verdict.passed, verdict.problems


@pytest.mark.parametrize("band", [case(band) for band in BANDS])
def test_no_token_of_concurrent_answers_is_impossible(
    band: Band, artifact: Artifact, record: Record
) -> None:
    """Scored again when the server is idle. How a text looks only asks for a look."""
    asked = ask(artifact, band, WORKLOADS[band.workload].together[-1])
    longest = sorted(asked.replies, key=lambda reply: -len(reply.came))[:SAMPLE]
    places = [impossible_places(artifact.server, reply) for reply in longest]
    record(
        **asked.facts, scored=[len(reply.came) for reply in longest], impossible=places,
        alarms=[found for reply in asked.replies if (found := alarms(reply.text))],
    )  # fmt: skip
    assert not [found for found in places if corrupted(found)]


def ask(artifact: Artifact, band: Band, together: int) -> Asked:
    """Ask the band's workload, if somebody brought its prompts."""
    try:
        return artifact.ask(WORKLOADS[band.workload], together)
    except FileNotFoundError as error:
        pytest.skip(
            f"no {error.filename}: --workloads DIR brings {band.workload}.jsonl, "
            f"{WORKLOADS[band.workload].prompts}"
        )


def impossible_places(server: Server, reply: Reply) -> tuple[int, ...]:
    """Positions within an answer that scoring it again finds impossible."""
    given, best = server.scores([*reply.prompt, *reply.came])
    start = len(reply.prompt) - 1  # the first token of a sequence has no score
    return impossible(given[start:], best[start:])
