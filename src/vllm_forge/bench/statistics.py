"""Tests and intervals for shares, for rates of servers, and for acceptance.

A test of a margin gives two one-sided p-values. ``passes`` is for the hypothesis that the loss is
the margin or more; ``fails`` for the hypothesis that it is the margin or less. A small one rejects
its hypothesis; with too little data both are large, and nothing is decided.

Sources: McNemar, Psychometrika 12 (1947); Tango, Stat. Med. 17 (1998) 891; Newcombe, Stat. Med. 17
(1998) 873; Agresti and Min, Stat. Med. 24 (2005) 729; Hall, J. R. Stat. Soc. B 54 (1992) 221; Holm,
Scand. J. Stat. 6 (1979) 65.
"""

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

LEVEL = 0.95
ALPHA = 1 - LEVEL
EDGE = 1e-9


class Interval(NamedTuple):
    """An estimate, and a confidence interval of level ``LEVEL``."""

    value: float
    low: float
    high: float


class Margin(NamedTuple):
    """A test of a margin; ``units``: how many independent ones the interval is of."""

    difference: Interval
    passes: float
    fails: float
    units: int


class Bounds(NamedTuple):
    """McNemar's p over all pairings that two totals allow.

    ``limit``: the most opposite flips with which p is below ``ALPHA``; None if it never is.
    """

    best: float
    worst: float
    limit: int | None


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p for discordant pairs."""
    flips = only_first + only_second
    return float(stats.binomtest(only_first, flips).pvalue) if flips else 1.0


def mcnemar_bounds(first: int, second: int, of: int) -> Bounds:
    """For two totals of the same items, without knowing which items.

    The difference is fixed; what can vary is how many items flipped the other way. p grows with
    that number, so its bounds are at the least and at the most.
    """
    gap = abs(first - second)
    most = min(first, second, of - max(first, second))

    def p(flips: int) -> float:
        return mcnemar(gap + flips, flips)

    below = bisect.bisect_left(range(most + 1), ALPHA, key=p)
    return Bounds(p(0), p(most), below - 1 if below else None)


def share(right: int, of: int) -> Interval:
    """Wilson's interval of a share."""
    found = stats.binomtest(right, of).proportion_ci(LEVEL, method="wilson")
    return Interval(right / of, float(found.low), float(found.high))


def share_difference(first: tuple[int, int], second: tuple[int, int]) -> Interval:
    """Newcombe's interval for two independent shares; each is (right, of)."""
    a, b = share(*first), share(*second)
    low = math.hypot(a.value - a.low, b.high - b.value)
    high = math.hypot(a.high - a.value, b.value - b.low)
    value = a.value - b.value
    return Interval(value, value - low, value + high)


def fisher(first: tuple[int, int], second: tuple[int, int]) -> float:
    """Exact p for two independent shares."""
    rows = [[right, of - right] for right, of in (first, second)]
    return float(stats.fisher_exact(rows).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order of ``values``."""
    order = np.argsort(values, kind="stable")
    scaled = np.asarray(values)[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return [float(p) for p in adjusted]


def tango(gained: Any, lost: Any, of: Any, difference: Any) -> Any:
    """Tango's score statistic for a paired difference of shares, (gained - lost) / of.

    Standard normal if ``difference`` is the true one. Numbers, or arrays of them.
    """
    b, c = np.asarray(gained, float), np.asarray(lost, float)
    linear = (2 * of - b + c) * difference - b - c
    root = np.sqrt(linear**2 + 8 * of * c * difference * (1 - difference))
    variance = of * ((root - linear) / (2 * of) + difference * (1 - difference))
    excess = b - c - of * difference
    return np.where(excess == 0, 0.0, excess / np.sqrt(np.maximum(variance, 1e-300)))


def paired_shares(gained: int, lost: int, of: int, margin: float) -> Margin:
    """A candidate against a reference on the same items, each answered once; exact for 0 flips."""
    value = (gained - lost) / of
    score = float(tango(gained, lost, of, -margin))

    def bound(end: float, sign: int) -> float:
        z = sign * stats.norm.ppf((1 + LEVEL) / 2)
        inside = end * (1 - EDGE)
        if abs(value - end) < EDGE or (tango(gained, lost, of, inside) - z) * sign < 0:
            return end
        return float(optimize.brentq(lambda d: tango(gained, lost, of, d) - z, inside, value))

    interval = Interval(value, bound(-1, 1), bound(1, -1))
    return Margin(interval, float(stats.norm.sf(score)), float(stats.norm.cdf(score)), of)


def clustered(differences: Sequence[float], sizes: Sequence[int], margin: float) -> Margin:
    """Mean difference of all items; each of -1 to 1 is the mean of a cluster of so many items.

    Student's t with the two pseudo-items of Agresti and Min: without them, items that do not differ
    would have an interval of no width, however few they are.
    """
    weights = np.asarray(sizes, float)
    rows = np.asarray(differences, float) * weights / weights.mean()
    of = len(rows) + 2
    value = float(rows.sum()) / of
    error = math.sqrt(float((rows**2).sum()) + 1 - of * value**2) / of
    freedom = max(_equal_units(weights) - 1, 0.1)  # of one cluster, too, which decides nothing
    found = _student(value, error, len(rows), margin, freedom=freedom)
    interval = Interval(value, max(-1.0, found.difference.low), min(1.0, found.difference.high))
    return found._replace(difference=interval)


def acceptance(
    candidate: Sequence[tuple[float, float]],
    reference: Sequence[tuple[float, float]],
    margin: float,
) -> Margin:
    """Accepted of drafted tokens; each prompt is (accepted, drafted) in both arms.

    The ratio estimator with the prompt as its unit: drafts of a prompt are not independent. Its
    error is the jackknife's, and its degrees of freedom are of as many equal prompts as would weigh
    the same: a few long answers may have most of the drafts. The error is at least that of one
    draft, so that equal arms have an interval, too. A loss of a few prompts makes t too liberal, so
    it must hold if it is corrected for their skewness, too.
    """
    arms = [np.asarray(rows, float) for rows in (candidate, reference)]
    rates = [float(arm[:, 0].sum() / arm[:, 1].sum()) for arm in arms]
    without = [
        (arm[:, 0].sum() - arm[:, 0]) / (arm[:, 1].sum() - arm[:, 1]) for arm in arms
    ]  # each prompt in turn
    prompts, weights = len(candidate), arms[0][:, 1] + arms[1][:, 1]
    changes = without[1] - without[0]
    spread = math.sqrt(prompts - 1) * float(changes.std())
    error = max(spread, 1 / float(arms[1][:, 1].sum()))
    skewness = float(stats.skew(changes)) if spread > EDGE else 0.0
    freedom = _equal_units(weights) - 1
    return _student(rates[0] - rates[1], error, prompts, margin, freedom=freedom, skewness=skewness)


def _equal_units(weights: Any) -> float:
    """How many units of equal weight have the same variance."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def steady(found: Margin, differences: Sequence[float], margin: float) -> Margin:
    """A test that must hold by pairs of starts, too, whose ``differences`` these are."""
    pairs = len(differences)
    error = max(float(np.std(differences, ddof=1)) / math.sqrt(pairs), 1e-12)
    other = _student(math.fsum(differences) / pairs, error, pairs, margin)
    value, low, high = found.difference
    interval = Interval(value, min(low, other.difference.low), max(high, other.difference.high))
    passes, fails = max(found.passes, other.passes), max(found.fails, other.fails)
    return Margin(interval, passes, fails, found.units)


def speed(candidate: Sequence[float], reference: Sequence[float], margin: float) -> Margin:
    """Rates of servers, a pair for each pair of starts; ``margin`` is a share of the reference.

    Student's t on the log ratios. Its p counts only where a test that counts patterns of signs
    agrees, which assumes only symmetry, and needs five pairs to decide anything.
    """
    logs = np.log(np.asarray(candidate, float) / np.asarray(reference, float))
    pairs, limit = len(logs), math.log1p(-margin)
    error = max(float(logs.std(ddof=1)) / math.sqrt(pairs), 1e-12)
    test = _student(float(logs.mean()), error, pairs, -limit)
    checks = [_sign_flip(sign * (logs - limit)) for sign in (1, -1)]
    passes, fails = (
        p if check < ALPHA else max(p, check)
        for p, check in zip((test.passes, test.fails), checks, strict=True)
    )
    return Margin(Interval(*(math.expm1(e) for e in test.difference)), passes, fails, pairs)


def ratio(logs: Sequence[float]) -> Interval:
    """Mean ratio minus 1, from the logarithms of two or more ratios."""
    values = np.asarray(logs, float)
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    test = _student(float(values.mean()), max(error, 1e-12), len(values), 0)
    return Interval(*map(math.expm1, test.difference))


def _sign_flip(values: Any) -> float:
    """One-sided p for a mean above 0, from all patterns of signs."""
    patterns = np.array(list(itertools.product((1, -1), repeat=len(values))))
    sums = patterns @ np.abs(values)
    return float((sums >= values.sum() - 1e-12).mean())


def _student(
    value: float, error: float, units: int, margin: float, *, freedom: float | None = None,
    skewness: float = 0.0,
) -> Margin:  # fmt: skip
    """Student's t; and after Hall's transformation for ``skewness``: what is less certain."""
    freedom = units - 1 if freedom is None else freedom
    reach, score = float(stats.t.ppf((1 + LEVEL) / 2, freedom)), (value + margin) / error
    scores, reaches = [score], [reach, -reach]
    if abs(bend := skewness / math.sqrt(freedom + 1)) > EDGE:
        scores.append(((1 + bend * score / 3) ** 3 - 1) / bend + bend / 6)
        reaches += [
            3 / bend * (float(np.cbrt(1 + bend * (end - bend / 6))) - 1) for end in (reach, -reach)
        ]
    passes = float(stats.t.sf(min(scores), freedom))
    fails = float(stats.t.cdf(max(scores), freedom))
    interval = Interval(value, value - max(reaches) * error, value - min(reaches) * error)
    return Margin(interval, passes, fails, units)
