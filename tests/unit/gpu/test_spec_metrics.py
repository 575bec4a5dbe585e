"""Counters of speculation from golden files; the gate refuses each way not to fire."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu.harness.gate import Band, Traffic, judge, load_bands, wilson
from tests.gpu.harness.spec_metrics import CounterResetError, Reading, read_snapshot, read_text
from vllm_forge.matrix import load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BAND = Band(sku="any", workload="golden", k=2, low=0.80, high=0.96)
CHANGE = Reading(drafts=1000, draft_tokens=2000, accepted=1760, per_position=(940, 820))
TRAFFIC = Traffic(requests=10, tokens=2770)


@pytest.fixture
def golden(root: Path) -> Callable[[str], str]:
    return lambda name: (root / "tests/fixtures/metrics" / name).read_text()


def test_k1(golden: Callable[[str], str]) -> None:
    assert read_text(golden("k1.txt")) == Reading(
        drafts=10, draft_tokens=10, accepted=7, per_position=(7,)
    )


def test_only_what_is_added_counts(golden: Callable[[str], str]) -> None:
    before, after = read_text(golden("k2-before.txt")), read_text(golden("k2-after.txt"))
    assert before is not None
    assert after is not None
    assert after.since(before) == Reading(
        drafts=100, draft_tokens=200, accepted=170, per_position=(90, 80)
    )


def test_drafts_are_not_draft_tokens(golden: Callable[[str], str]) -> None:
    """A search for ``num_draft`` finds both, and times; the first line is neither."""
    text = golden("k2-after.txt")
    found = [row for row in text.splitlines() if "num_draft" in row and row[0] != "#"]
    assert len(found) == 4
    assert any("_created" in row for row in found)
    reading = read_text(text)
    assert reading is not None
    assert reading.draft_tokens == 2 * reading.drafts


def test_times_of_creation_are_not_counters(golden: Callable[[str], str]) -> None:
    rows = golden("k1.txt").splitlines()
    only_times = "\n".join(row for row in rows if "_total" not in row) + "\n"
    assert "_created" in only_times
    assert read_text(only_times) is None


def test_a_gauge_of_the_same_name_is_not_a_counter(golden: Callable[[str], str]) -> None:
    """Only ``_total`` is: a sample without it is of another exporter."""
    text = golden("k1.txt").replace("_total", "").replace(" counter\n", " gauge\n")
    assert "vllm:spec_decode_num_drafts{" in text
    assert read_text(text) is None


def test_engines_add_up(golden: Callable[[str], str]) -> None:
    one = Reading(drafts=2, draft_tokens=4, accepted=3, per_position=(2, 1))
    assert read_text(golden("k2-two-engines.txt")) == Reading(
        drafts=2 * one.drafts, draft_tokens=8, accepted=6, per_position=(4, 2)
    )


def test_no_speculation_is_not_zero(golden: Callable[[str], str]) -> None:
    assert read_text(golden("no-speculation.txt")) is None


def test_a_reset_is_not_a_negative_change(golden: Callable[[str], str]) -> None:
    before, after = read_text(golden("k2-before.txt")), read_text(golden("k2-after.txt"))
    assert before is not None
    assert after is not None
    with pytest.raises(CounterResetError):
        before.since(after)


def test_a_lost_position_is_a_reset(golden: Callable[[str], str]) -> None:
    k1, k2 = read_text(golden("k1.txt")), read_text(golden("k2-before.txt"))
    assert k1 is not None
    assert k2 is not None
    with pytest.raises(CounterResetError):
        k1.since(k2)


def test_a_snapshot_reads_the_same() -> None:
    def counter(name: str, value: int) -> SimpleNamespace:
        return SimpleNamespace(name=f"vllm:spec_decode_num_{name}", labels={}, value=value)

    vector = SimpleNamespace(
        name="vllm:spec_decode_num_accepted_tokens_per_pos", labels={}, values=[940, 820]
    )
    metrics = [counter("drafts", 1000), counter("draft_tokens", 2000), vector]
    assert read_snapshot(metrics) is None
    assert read_snapshot([*metrics, counter("accepted_tokens", 1760)]) == CHANGE


def test_gate_is_green() -> None:
    verdict = judge(CHANGE, TRAFFIC, BAND)
    assert verdict.passed, verdict.problems
    assert verdict.rate == pytest.approx(0.88)
    assert verdict.mean_length == pytest.approx(2.76)
    assert verdict.interval[0] < 0.88 < verdict.interval[1]


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no drafts": ({"drafts": 0, "draft_tokens": 0, "accepted": 0, "per_position": (0, 0)}, {}),
    "every draft was refused": ({"accepted": 0, "per_position": (0, 0)}, {"tokens": 1010}),
    "k was capped": (
        {"draft_tokens": 1000, "accepted": 880, "per_position": (880, 0)},
        {"tokens": 1890},
    ),
    "another k was served": ({"per_position": (1760,)}, {}),
    "later position": ({"per_position": (820, 940)}, {}),
    "positions add up to": ({"per_position": (940, 800)}, {}),
    "position 0 was accepted": ({"per_position": (1010, 750)}, {}),
    "is not within": ({"accepted": 1000, "per_position": (600, 400)}, {"tokens": 2010}),
    "too few": (
        {"drafts": 100, "draft_tokens": 200, "accepted": 176, "per_position": (94, 82)},
        {"tokens": 286},
    ),
    "less often than never": ({"per_position": (330, -30)}, {}),
    "above: are these": ({"accepted": 2100, "per_position": (1000, 1100)}, {}),
    "decoded without MTP": ({}, {"tokens": 9000}),
    "other traffic": ({}, {"tokens": 1500}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_gate_refuses(words: str) -> None:
    counts, traffic = REFUSED[words]
    verdict = judge(
        dataclasses.replace(CHANGE, **counts), dataclasses.replace(TRAFFIC, **traffic), BAND
    )
    assert not verdict.passed
    assert any(words in problem for problem in verdict.problems), verdict.problems


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-1.0"])
def test_invalid_counter_is_not_read(golden: Callable[[str], str], value: str) -> None:
    text = golden("k1.txt")
    sample = next(
        row for row in text.splitlines() if row.startswith("vllm:spec_decode_num_drafts_")
    )
    changed = text.replace(sample, f"{sample.rpartition(' ')[0]} {value}")
    with pytest.raises(ValueError, match="no counter is"):
        read_text(changed)


def test_gate_refuses_absent_counters() -> None:
    verdict = judge(None, TRAFFIC, BAND)
    assert "speculation is off" in verdict.problems[0]
    assert math.isnan(verdict.rate)


def test_bands_are_of_real_skus_and_hold_what_is_published(root: Path) -> None:
    matrix = load(root)
    bands = load_bands()
    for band in bands:
        assert band.sku in matrix.sku
        assert band.published is not None
        assert 0 < band.low < band.published < band.high < 1
        assert band.source
    keys = [(band.sku, band.workload, band.k) for band in bands]
    assert len(set(keys)) == len(keys)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 100)[0] == 0
    assert wilson(100, 100)[1] == 1
    assert wilson(50, 100, z=1.96) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert all(map(math.isnan, (*wilson(0, 0), *wilson(3, 2), *wilson(-1, 2))))
