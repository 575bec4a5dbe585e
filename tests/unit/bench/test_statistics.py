"""Type I error, coverage and power against planted truths; exact values; controls that fail."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from vllm_forge.bench import statistics
from vllm_forge.bench.statistics import ALPHA, LEVEL

RUNS = 1500  # of an interval that is computed one by one; se of a share of .05: .0056
MANY = 20_000  # of those that are computed at once
NOMINAL = 3 * math.sqrt(ALPHA * LEVEL / RUNS)
Z = stats.norm.ppf((1 + LEVEL) / 2)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261130)


def flips(
    rng: np.random.Generator, *, of: int, discordant: float, loss: float
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of gained and lost items of many experiments."""
    shares = [(discordant - loss) / 2, (discordant + loss) / 2, 1 - discordant]
    rows = rng.multinomial(of, shares, size=MANY)
    return rows[:, 0], rows[:, 1]


def brute_bounds(first: int, second: int, of: int) -> tuple[float, float]:
    both = range(max(0, first + second - of), min(first, second) + 1)
    values = [statistics.mcnemar(first - shared, second - shared) for shared in both]
    return min(values), max(values)


@pytest.mark.parametrize(("first", "second"), list(product((0, 3, 9, 12), repeat=2)))
def test_bounds_are_those_of_all_pairings(first: int, second: int) -> None:
    found = statistics.mcnemar_bounds(first, second, 12)
    assert (found.best, found.worst) == pytest.approx(brute_bounds(first, second, 12))


def test_holm_corrects_in_the_order_given() -> None:
    assert statistics.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert statistics.holm([]) == []


def test_zero_flips_of_ten_decide_nothing() -> None:
    found = statistics.paired_shares(0, 0, 10, 0.01)
    assert found.passes > ALPHA
    assert found.fails > ALPHA
    assert found.difference.low < -0.2


def test_balanced_flips_of_many_items_pass() -> None:
    found = statistics.paired_shares(1000, 1000, 100_000, 0.01)
    assert found.passes < 1e-6
    assert found.difference.low == pytest.approx(-0.00088, abs=2e-5)


def test_items_without_a_difference_have_an_interval() -> None:
    found = statistics.clustered([0.0] * 30, [1] * 30, 0.01)
    reach = stats.t.ppf((1 + LEVEL) / 2, 29) / 32  # Agresti and Min: two items more, one flip
    assert found.difference == pytest.approx((0, -reach, reach))
    assert found.passes > ALPHA


def test_interval_inverts_the_test() -> None:
    found = statistics.paired_shares(12, 31, 700, 0.01)
    for end, sign in ((found.difference.low, 1), (found.difference.high, -1)):
        assert float(statistics.tango(12, 31, 700, end)) == pytest.approx(sign * Z, abs=1e-6)


@pytest.mark.parametrize(("of", "discordant"), [(300, 0.06), (1319, 0.03), (12_032, 0.08)])
def test_a_loss_at_the_margin_passes_as_rarely_as_promised(
    rng: np.random.Generator, of: int, discordant: float
) -> None:
    gained, lost = flips(rng, of=of, discordant=discordant, loss=0.02)
    scores = statistics.tango(gained, lost, of, -0.02)
    assert (stats.norm.sf(scores) < ALPHA).mean() < ALPHA + 0.01
    assert (stats.norm.cdf(scores) < ALPHA).mean() < ALPHA + 0.01


@pytest.mark.parametrize(
    ("of", "discordant", "loss"), [(50, 0.2, 0.1), (541, 0.08, 0), (1319, 0.03, 0.02)]
)
def test_score_interval_covers_the_truth(
    rng: np.random.Generator, of: int, discordant: float, loss: float
) -> None:
    gained, lost = flips(rng, of=of, discordant=discordant, loss=loss)
    covered = np.abs(statistics.tango(gained, lost, of, -loss)) < Z
    assert LEVEL - 0.012 < covered.mean() < LEVEL + 0.02


def test_planned_number_of_items_has_its_power(rng: np.random.Generator) -> None:
    """2,569 items for 90 % at 3 % discordant and a margin of 1 pp."""
    gained, lost = flips(rng, of=2569, discordant=0.03, loss=0)
    passed = stats.norm.sf(statistics.tango(gained, lost, 2569, -0.01)) < ALPHA
    assert passed.mean() == pytest.approx(0.9, abs=0.015)


def test_mcnemar_rejects_equal_arms_rarely(rng: np.random.Generator) -> None:
    only_first = rng.binomial(30, 0.5, size=RUNS)
    p = np.array([statistics.mcnemar(int(k), 30 - int(k)) for k in range(31)])
    assert (p[only_first] < ALPHA).mean() < ALPHA + NOMINAL


def test_repeats_of_an_item_are_one_unit(rng: np.random.Generator) -> None:
    """60 items with 8 repeats, whose true shares differ by item; the mean difference is 0."""
    covered, naive = 0, 0
    for _ in range(RUNS):
        truth = rng.uniform(0.4, 1, size=(2, 60))
        scores = rng.binomial(8, truth) / 8
        differences = scores[0] - scores[1]
        found = statistics.clustered(list(differences), [1] * 60, 0.01).difference
        covered += found.low < 0 < found.high
        error = math.sqrt(2 * 0.7 * 0.3 / 480)  # as if all answers were independent
        naive += abs(differences.mean()) < Z * error
    assert LEVEL - NOMINAL < covered / RUNS < LEVEL + 0.03
    assert naive / RUNS < LEVEL - 0.05


def test_families_count_by_their_items(rng: np.random.Generator) -> None:
    """The loss of 2 pp is in one family of 1,000 items; 200 items are alone."""
    loss = [-0.02, *[0.0] * 200]
    found = statistics.clustered(loss, [1000, *[1] * 200], 0.01)
    assert found.difference.value == pytest.approx(-20 / 1200, rel=0.02)
    assert found.passes > ALPHA
    alone = statistics.clustered([-0.02], [1000], 0.01)
    assert (alone.difference.low, alone.difference.high) == (-1, 1)
    assert min(alone.passes, alone.fails) > ALPHA
    passed = 0
    for _ in range(RUNS):  # a loss of 1 pp; families of 1 to 50 items vary by 5 pp
        sizes = rng.integers(1, 51, size=400)
        family = rng.normal(-0.01, 0.05, size=400) + rng.normal(0, 0.3, 400) / np.sqrt(sizes)
        passed += statistics.clustered(list(family), list(sizes), 0.01).passes < ALPHA
    assert passed / RUNS < ALPHA + NOMINAL


def test_loss_of_few_prompts_is_not_passed(rng: np.random.Generator) -> None:
    """3 % of 164 prompts lose 33 pp, 1 pp in all; their long drafts have little other noise."""
    passed = 0
    for _ in range(RUNS // 2):
        drafted = 10 * np.maximum(5, rng.lognormal(4, 0.8, size=164).astype(int))
        base, loss = rng.beta(60, 1.5, size=164), 0.01 / 0.03 * (rng.random(164) < 0.03)
        rates = [np.clip(base - loss, 0, 1), base]
        arms = [np.stack([rng.binomial(drafted, rate), drafted], axis=1) for rate in rates]
        found = statistics.acceptance(arms[0].tolist(), arms[1].tolist(), 0.01)
        passed += found.passes < ALPHA
        inside = found.difference.low > -0.01
        assert not (inside and found.passes >= ALPHA)
    assert 2 * passed / RUNS < ALPHA + 1.5 * NOMINAL


def test_acceptance_is_clustered_by_prompt(rng: np.random.Generator) -> None:
    """Both arms have each prompt's own rate, and noise of their own; lengths differ."""
    covered, naive = 0, 0
    for _ in range(RUNS):
        drafted = rng.integers(50, 400, size=60)
        base = rng.beta(8, 3, size=60)
        arms = []
        for _ in range(2):
            rate = np.clip(base + rng.normal(0, 0.08, size=60), 0.01, 0.99)
            arms.append(np.stack([rng.binomial(drafted, rate), drafted], axis=1))
        found = statistics.acceptance(arms[0].tolist(), arms[1].tolist(), 0.02).difference
        covered += found.low < 0 < found.high
        error = math.sqrt(2 * 0.2 / drafted.sum())
        naive += abs(found.value) < Z * error
    assert LEVEL - NOMINAL < covered / RUNS < LEVEL + 0.03
    assert naive / RUNS < LEVEL - 0.1


def test_few_long_answers_are_few_units(rng: np.random.Generator) -> None:
    """20 prompts, whose lengths vary by a factor of e; a tenth of them has most of the drafts."""
    passed = 0
    for _ in range(RUNS):
        drafted = 10 * np.maximum(4, rng.lognormal(4, 1, size=20).astype(int))
        base = rng.beta(20, 5, size=20)
        arms = []
        for loss in (0.01, 0):
            rate = np.clip(base - loss + rng.normal(0, 0.02, size=20), 0.01, 0.99)
            arms.append(np.stack([rng.binomial(drafted, rate), drafted], axis=1))
        found = statistics.acceptance(arms[0].tolist(), arms[1].tolist(), 0.01)
        passed += found.passes < ALPHA
    assert passed / RUNS < ALPHA + NOMINAL


def test_test_of_prompts_must_hold_by_starts(rng: np.random.Generator) -> None:
    """Equal arms; each start moves all of its prompts by 1 %, five pairs of starts."""
    failed, naive = 0, 0
    for _ in range(RUNS):
        move = rng.normal(0, 0.01, size=(2, 5))
        ours, theirs = ([(1000 * (0.7 + rate), 1000.0)] * 60 for rate in move.mean(axis=1))
        by_prompt = statistics.acceptance(ours, theirs, 0.0)
        found = statistics.steady(by_prompt, list(move[0] - move[1]), 0.0)
        failed, naive = failed + (found.fails < ALPHA), naive + (by_prompt.fails < ALPHA)
    assert failed / RUNS < ALPHA + NOMINAL
    assert naive / RUNS > ALPHA + 5 * NOMINAL


def test_equal_acceptance_has_an_interval() -> None:
    rows = [(50.0, 100.0)] * 40
    found = statistics.acceptance(rows, rows, 0.02)
    reach = stats.t.ppf((1 + LEVEL) / 2, 39) / 4000  # of one draft
    assert found.difference == pytest.approx((0, -reach, reach))
    assert found.passes < ALPHA


@pytest.mark.parametrize("ratio", [1.0, 0.95])
def test_speed_is_decided_as_rarely_wrong_as_promised(
    rng: np.random.Generator, ratio: float
) -> None:
    """Starts vary by 3 %; the margin is the true loss, or the true ratio is 1."""
    logs = rng.normal(0, 0.03, size=(RUNS, 2, 6)) + np.array([[[math.log(ratio)], [0]]])
    found = [statistics.speed(pair[0], pair[1], 1 - ratio) for pair in np.exp(logs).tolist()]
    assert sum(row.passes < ALPHA for row in found) / RUNS < ALPHA + NOMINAL
    assert sum(row.fails < ALPHA for row in found) / RUNS < ALPHA + NOMINAL
    covered = sum(row.difference.low < ratio - 1 < row.difference.high for row in found)
    assert abs(covered / RUNS - LEVEL) < NOMINAL


def test_speed_has_power_with_little_noise(rng: np.random.Generator) -> None:
    """5 pairs of starts that vary by 0.4 %, as a server does from c=8; margin 2 %."""
    for ratio, passes in ((1.0, True), (0.95, False)):
        logs = rng.normal(0, 0.004, size=(200, 2, 5)) + np.array([[[math.log(ratio)], [0]]])
        found = [statistics.speed(pair[0], pair[1], 0.02) for pair in np.exp(logs).tolist()]
        assert np.mean([(row.passes if passes else row.fails) < ALPHA for row in found]) > 0.95


@pytest.mark.parametrize("pairs", [2, 4])
def test_few_starts_decide_nothing_however_equal(pairs: int) -> None:
    found = statistics.speed([100.0] * pairs, [100.0] * pairs, 0.02)
    assert min(found.passes, found.fails) > ALPHA


def test_ratio_covers_its_truth(rng: np.random.Generator) -> None:
    drawn = rng.normal(math.log(1.1), 0.1, size=(RUNS, 5))
    found = [statistics.ratio(logs) for logs in drawn]
    assert abs(np.mean([one.low <= 0.1 <= one.high for one in found]) - LEVEL) < NOMINAL
