"""What must be refused: each by the gate or by the loader, with a diagnosis."""

from __future__ import annotations

import pytest

from tests.gpu.harness.gate import Band, Traffic, judge
from tests.gpu.mtp.conftest import MARKS
from tests.gpu.mtp.engines import COUNT, REQUESTS, Ran, RanOf

pytestmark = [*MARKS, pytest.mark.value(10, 10)]
TRAFFIC = Traffic(requests=REQUESTS, tokens=REQUESTS * COUNT)
BAND = Band(sku="any", workload="exact", k=1, low=0.9, high=1.0)


def problems(ran: Ran) -> str:
    return "\n".join(judge(ran.reading, TRAFFIC, BAND).problems)


@pytest.mark.engines("plain")
def test_no_speculative_config(ran: RanOf) -> None:
    found = ran("plain")
    assert found.tokens
    assert "speculation is off" in problems(found)


@pytest.mark.engines("wrong-1")
def test_head_that_is_never_right(ran: RanOf) -> None:
    found = ran("wrong-1")
    assert found.reading is not None
    assert found.reading.drafts > 200
    assert "every draft was refused" in problems(found)


@pytest.mark.engines("zeroed")
def test_head_of_zeros(ran: RanOf) -> None:
    """It loads, it drafts token 0 for ever, and no orbit has token 0."""
    assert "every draft was refused" in problems(ran("zeroed"))


@pytest.mark.engines("stripped")
def test_checkpoint_without_mtp(ran: RanOf) -> None:
    found = ran("stripped")
    assert not found.tokens
    assert "were not initialized from" in found.error


@pytest.mark.engines("partly-stripped")
def test_checkpoint_with_a_part_of_mtp(ran: RanOf) -> None:
    """The loader of unquantized models misses a tensor that no quantization method owns."""
    found = ran("partly-stripped")
    assert not found.tokens
    assert "were not initialized from" in found.error
    assert "input_proj" in found.error
