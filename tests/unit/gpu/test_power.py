"""How many launches a statement about a rate needs."""

from __future__ import annotations

import math
import random

import pytest

from tests.gpu.reference.power import CONFIDENCE, excluded, exclusion


def launches_for(p: float, confidence: float = CONFIDENCE) -> int:
    """The least number of launches that shows a fault of rate p with that probability."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-p))


def test_the_usual_numbers() -> None:
    assert launches_for(1e-6) == 6_907_752
    assert launches_for(1e-4) == 69_075
    assert excluded(10_000_000) == pytest.approx(6.9e-7, rel=0.01)
    assert excluded(0) == 1


@pytest.mark.parametrize("p", [0.3, 1e-3, 1e-7])
def test_the_two_are_each_others_inverse(p: float) -> None:
    n = launches_for(p)
    assert excluded(n) <= p < excluded(n - 1)


def test_by_experiment() -> None:
    rng = random.Random(1)  # noqa: S311 - an experiment that can be repeated
    n = launches_for(0.01, 0.9)
    seen = sum(any(rng.random() < 0.01 for _ in range(n)) for _ in range(1000))
    assert 870 < seen < 930


def test_the_sentence() -> None:
    assert exclusion(1_000_000) == "1,000,000 clean launches exclude p > 6.9e-06 at 99.9 %"


@pytest.mark.parametrize(("launches", "confidence"), [(-1, 0.9), (5, 0), (5, 1)])
def test_invalid_numbers_are_rejected(launches: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence"):
        excluded(launches, confidence)
