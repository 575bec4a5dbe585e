"""A model whose acceptance is known: counters and tokens must be as computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gpu.harness.bootlog import parse
from tests.gpu.harness.gate import Band, Traffic, judge
from tests.gpu.models import exact_mtp
from tests.gpu.mtp.conftest import MARKS
from tests.gpu.mtp.engines import COUNT, ENGINES, REQUESTS, Ran, RanOf, last

if TYPE_CHECKING:
    from tests.gpu.conftest import Margin, Record

pytestmark = MARKS
TRAFFIC = Traffic(requests=REQUESTS, tokens=REQUESTS * COUNT)
DRAFTING = ["token-1", "token-2", "token-2-graphs", "hidden-1", "hidden-2", "wrong-1", "fraction-1",
            "fraction-2"]  # fmt: skip


def computed(ran: Ran) -> list[exact_mtp.Counts]:
    engine = ran.engine
    return [exact_mtp.expected(engine.draft, last(n), COUNT, engine.k) for n in range(REQUESTS)]


def engines(names: list[str]) -> list[object]:
    return [pytest.param(name, marks=pytest.mark.engines(name)) for name in names]


@pytest.mark.value(10, 10)
@pytest.mark.parametrize("name", engines(["plain", *DRAFTING]))
def test_tokens_are_the_targets(name: str, ran: RanOf) -> None:
    """With any draft, and without: speculation must not change what is generated."""
    found = ran(name)
    assert not found.error, found.error
    assert found.tokens == [exact_mtp.orbit(last(n), COUNT) for n in range(REQUESTS)]


@pytest.mark.value(10, 10)
@pytest.mark.parametrize("name", engines(DRAFTING))
def test_counters_are_as_computed(name: str, ran: RanOf, margin: Margin) -> None:
    found = ran(name)
    assert found.reading is not None, found.error
    sums = computed(found)
    slack = exact_mtp.allowance(REQUESTS)
    k, reading = found.engine.k, found.reading
    margin("drafts", abs(reading.drafts - sum(c.drafts for c in sums)), slack)
    margin("accepted", abs(reading.accepted - sum(c.accepted for c in sums)), k * slack)
    for place, count in enumerate(reading.per_position):
        wanted = sum(c.per_position[place] for c in sums)
        margin(f"position {place}", abs(count - wanted), slack)
    if found.engine.draft in {"token", "hidden"}:
        assert reading.accepted == reading.draft_tokens
    if found.engine.draft == "wrong":
        assert reading.accepted == 0


@pytest.mark.value(10, 10)
@pytest.mark.parametrize("name", engines([name for name in DRAFTING if name != "wrong-1"]))
def test_gate_is_green(name: str, ran: RanOf, record: Record) -> None:
    found = ran(name)
    sums = computed(found)
    rate = sum(c.accepted for c in sums) / sum(c.draft_tokens for c in sums)
    band = Band(
        sku="any", workload="exact", k=found.engine.k, low=rate - 0.01, high=min(1, rate + 0.01)
    )
    verdict = judge(found.reading, TRAFFIC, band)
    record(acceptance=verdict.rate, computed=rate, interval=verdict.interval)
    assert verdict.passed, verdict.problems


@pytest.mark.value(10, 10)
@pytest.mark.engines("token-2-graphs")
def test_graphs_were_captured(ran: RanOf) -> None:
    """The engine that is meant to decode by CUDA graphs does, and for whole steps of k + 1."""
    config = parse(ran("token-2-graphs").log)
    assert config.captured
    assert config.graph_mode not in {None, "NONE"}
    step = ENGINES["token-2-graphs"].k + 1
    assert any(size % step == 0 for size in config.graph_sizes)
