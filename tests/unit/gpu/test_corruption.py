"""Alarms on planted salad, and what they miss; the verdict on tokens does not."""

from __future__ import annotations

import math
import random
import string
from pathlib import Path

import pytest

from tests.gpu.harness.corruption import alarms, corrupted, impossible

# Prose that nobody edits: the text of a licence, in pieces.
LICENSE = (Path(__file__).parents[3] / "LICENSE").read_text()
PROSE = [LICENSE[at : at + 3000] for at in range(0, len(LICENSE) - 1500, 1500)]
FOREIGN = "临去打走出充电приветжизньこんにちは한국"


def salad(rng: random.Random, words: int, foreign: float) -> str:
    letters = string.ascii_letters + "_|#`-.,0123456789"
    return " ".join(
        rng.choice(FOREIGN)
        if rng.random() < foreign
        else "".join(rng.choice(letters) for _ in range(rng.randint(1, 7)))
        for _ in range(words)
    )


@pytest.mark.parametrize("text", PROSE, ids=range(len(PROSE)))
def test_prose_is_quiet(text: str) -> None:
    assert alarms(text) == []


@pytest.mark.parametrize("foreign", [0.0, 0.03])
@pytest.mark.parametrize("seed", range(10))
def test_salad_is_heard_wherever_it_is(seed: int, foreign: float) -> None:
    rng = random.Random(seed)  # noqa: S311
    text = rng.choice(PROSE)
    at = rng.randrange(len(text))
    assert alarms(text[:at] + salad(rng, 200, foreign) + text[at:])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the rate is 接收 3.0.1 and 充电 2.0", "foreign script"),
        ("a broken \ufffd character", "broken characters"),
        ("a bell \x07 rings", "broken characters"),
        ("and then <｜end▁of▁sentence｜> went on", "special token"),  # noqa: RUF001
    ],
)
def test_islands(text: str, words: str) -> None:
    assert words in alarms(text)[0]


def test_script_of_the_prompt_is_expected() -> None:
    assert alarms("充电 means charging", "翻译: 充电") == []
    assert alarms("α + β = γ, and ∑ of x² is 𝑥") == []  # noqa: RUF001


def test_what_text_rules_miss() -> None:
    """A wrong number in good prose: why they are no gate."""
    assert alarms("The answer is 41, because six times seven is 41.") == []


def scores(rng: random.Random, count: int) -> tuple[list[float], list[float]]:
    """Greedy tokens re-scored by other kernels: best, but for near-ties that flip."""
    best = [-rng.expovariate(3) for _ in range(count)]
    given = [top - (rng.uniform(0, 0.3) if rng.random() < 0.01 else 0) for top in best]
    return given, best


def test_clean_sequences_have_no_impossible_token() -> None:
    rng = random.Random(1)  # noqa: S311
    assert not any(impossible(*scores(rng, 4000)) for _ in range(20))


def test_planted_tokens_are_found_where_they_are() -> None:
    rng = random.Random(2)  # noqa: S311
    given, best = scores(rng, 4000)
    for place in range(1000, 1012):
        given[place] = best[place] - rng.uniform(6, 20)
    found = impossible(given, best)
    assert found == tuple(range(1000, 1012))
    assert corrupted(found)


def test_nan_is_impossible() -> None:
    assert impossible([math.nan, -1.0], [-0.1, -1.0]) == (0,)


def test_missing_best_is_impossible() -> None:
    assert impossible([-1.0, -1.0, -1.0], [-math.inf, -2.0, -1.0]) == (0, 1)


def test_one_token_is_not_a_burst() -> None:
    assert not corrupted([])
    assert not corrupted([7])
    assert not corrupted([7, 90])
    assert corrupted([7, 90, 95])
