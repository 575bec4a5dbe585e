"""What can be said of each claim: by totals alone, by raw results, by arithmetic."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from scipy import stats

from vllm_forge.bench import statistics
from vllm_forge.bench.claims import (
    CLAIMS,
    Bare,
    ClaimsFile,
    ColdStart,
    Comparison,
    Derived,
    Makespan,
    Order,
    Range,
    RawRun,
    Scored,
    Series,
    Share,
    Single,
    Speedup,
    agrees,
    number,
    read_claims,
    read_run,
)
from vllm_forge.bench.statistics import ALPHA, Interval

COLD = 0.05  # a warm-up that moves a throughput by this share is named
BUSY = 1.1  # ratio of busy shares from which wall times are not those of decoding
SMALL = 1e-4  # p that is printed with an exponent
STARTS = 5  # that the sign-flip test needs to decide anything at 5 %


class Word(StrEnum):
    """A verdict."""

    CONTRADICTED = "contradicted"
    HOLDS = "holds"
    CONSISTENT = "consistent"
    UNDECIDED = "undecided"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A row of the page; ``p``: of the test with its bound, before and after Holm's correction."""

    word: Word
    method: str
    n: str
    detail: str
    interval: Interval | None = None
    p: float | None = None
    adjusted: float | None = None
    id: str = ""
    says: str = ""
    at: str = ""
    group: str = ""


RULES: Mapping[str, tuple[str, Callable[..., float]]] = {
    "value": ("the number", lambda a: a),
    "ratio": ("ratio", lambda a, b: a / b),
    "points": ("difference in points", lambda a, b: 100 * (a - b)),
    "per-minute": ("number a minute", lambda count, seconds: 60 * count / seconds),
    "percent": ("percent", lambda part, of: 100 * part / of),
    "less-by": ("first less than second, %", lambda a, b: 100 * (1 - a / b)),
    "more-by": ("second more than first, %", lambda a, b: 100 * (b / a - 1)),
}


def judge(root: Path) -> dict[str, Any]:
    """Verdicts on all claims of a checkout, as JSON; ClaimsFileError."""
    claims = read_claims(root)
    runs = {name: read_run(root, raw) for name, raw in claims.raw.items()}
    content = (root / CLAIMS).read_bytes()
    return {
        "schema": "claims/1",
        "claims_sha256": hashlib.sha256(content).hexdigest(),
        "card": claims.card,
        "revision": claims.revision,
        "verdicts": [_as_row(verdict) for verdict in verdicts(claims, runs)],
    }


def verdicts(claims: ClaimsFile, runs: Mapping[str, RawRun]) -> list[Verdict]:
    """One verdict for each claim, in its order."""
    families: defaultdict[str, list[int]] = defaultdict(list)
    rows = []
    for place, row in enumerate(claims.claim):
        match row:
            case Comparison():
                verdict = _comparison(row, claims.arm)
                if verdict.p is not None:
                    families["equal" if row.claims == "equal" else "different"].append(place)
            case Speedup():
                verdict = _speedup(row, runs[row.base], runs[row.run])
            case _:
                verdict = _JUDGES[type(row)](row)
        named = replace(verdict, id=row.id, says=row.says, at=row.at, group=row.group)
        rows.append(named)
    for places in families.values():
        adjusted = statistics.holm([rows[place].p or 0 for place in places])
        for place, value in zip(places, adjusted, strict=True):
            rows[place] = _corrected(rows[place], value)
    return rows


def _comparison(row: Comparison, arms: Mapping[str, Mapping[str, str]]) -> Verdict:
    """Undecided unless the difference is there whatever the pairing, and after the correction."""
    if row.second is None:
        detail = "the reference was not measured"
        return Verdict(word=Word.UNDECIDED, method="none", n="0", detail=detail)
    shares = (row.first, row.second)
    counts = [share.count() for share in shares]
    for share, count in zip(shares, counts, strict=True):
        if count is None:
            return _impossible(share)
    pairs = [(count or 0, share.of) for count, share in zip(counts, shares, strict=True)]
    interval = statistics.share_difference(*pairs)
    p, method, detail, pairing = _difference(row, pairs)
    a, b = (arms[share.arm] for share in shares)
    others = sorted(key for key in {*a, *b} - set(row.varies) if a.get(key) != b.get(key))
    direction = {"equal": 0, "higher": 1, "lower": -1}[row.claims]
    word = Word.HOLDS
    if row.claims == "equal" or direction * interval.value < 0:
        word = Word.CONTRADICTED
    elif others:
        word = Word.UNDECIDED
    if others:
        detail += f"; the arms also differ in {', '.join(others)}"
    if pairing and p >= ALPHA:
        detail += f"; {pairing}"
    return Verdict(
        word=word,
        method=method,
        n=" v ".join(f"{count}/{of}" for count, of in pairs),
        detail=detail,
        interval=Interval(*(100 * end for end in interval)),
        p=p,
    )


def _difference(row: Comparison, pairs: list[tuple[int, int]]) -> tuple[float, str, str, str]:
    """p, method, what it says, and what a lack of pairs leaves open."""
    (first, of), (second, other) = pairs
    if row.flips is not None:
        p = statistics.mcnemar(*row.flips)
        return p, "exact McNemar, published answers", f"flips {row.flips[0]} v {row.flips[1]}", ""
    if not row.same_items or of != other:
        return statistics.fisher(*pairs), "Fisher, Newcombe", "different items", ""
    bounds = statistics.mcnemar_bounds(first, second, of)
    detail = f"McNemar p {_p(bounds.best)} to {_p(bounds.worst)} over all pairings"
    detail += f", Fisher {_p(statistics.fisher(*pairs))}"
    pairing = "not distinguishable whatever the pairing"
    if bounds.limit is not None:
        pairing = f"depends on the pairing: significant if at most {bounds.limit} opposite flips"
    return bounds.worst, "McNemar bounds, Newcombe", detail, pairing


def _corrected(verdict: Verdict, adjusted: float) -> Verdict:
    if adjusted < ALPHA:
        return replace(verdict, adjusted=adjusted)
    detail = verdict.detail
    if verdict.p is not None and verdict.p < ALPHA:
        detail += "; not significant after Holm's correction"
    return replace(verdict, word=Word.UNDECIDED, detail=detail, adjusted=adjusted)


def _impossible(share: Share) -> Verdict:
    detail = f"no count of {share.of} gives {share.value}"
    return Verdict(word=Word.CONTRADICTED, method="arithmetic", n=str(share.of), detail=detail)


def _single(row: Single) -> Verdict:
    count = row.share.count()
    if count is None:
        return _impossible(row.share)
    interval = Interval(*(100 * end for end in statistics.share(count, row.share.of)))
    return Verdict(
        word=Word.CONSISTENT,
        method="Wilson",
        n=f"{count}/{row.share.of}",
        detail=f"95 % interval {interval.low:.1f} to {interval.high:.1f} %; compared with nothing",
    )


def _bare(_: Bare) -> Verdict:
    detail = "neither a count nor repeats were published"
    return Verdict(word=Word.UNDECIDED, method="none", n="1", detail=detail)


def _derived(row: Derived) -> Verdict:
    operands = [number(quantity) for quantity in row.of]
    name, rule = RULES[row.rule]
    computed = rule(*operands)
    detail = f"{name}: {computed:.4g}"
    n = ", ".join(row.of)
    if not agrees(computed, row.value, row.unit):
        if row.rule == "less-by" and agrees(RULES["more-by"][1](*operands), row.value):
            detail += f"; {row.value} % is how much more the second is: percent of the other"
        return Verdict(word=Word.CONTRADICTED, method="arithmetic", n=n, detail=detail)
    if row.starts is not None and row.starts < STARTS:
        detail += f"; {row.starts} start of each server, so restart noise is unknown"
        return Verdict(word=Word.UNDECIDED, method="arithmetic, starts", n=n, detail=detail)
    return Verdict(word=Word.CONSISTENT, method="arithmetic", n=n, detail=detail)


def _range(row: Range) -> Verdict:
    values = [100 * number(text) if "/" in text else float(text) for text in row.values]
    # A bound is rounded, or cut, at its last digit.
    low, high = (10.0 ** -len(f"{bound:g}".partition(".")[2]) for bound in (row.low, row.high))
    outside = [v for v in values if not row.low - low / 2 <= round(v, 9) < row.high + high]
    detail = f"{min(values):.2f} to {max(values):.2f}"
    if all("/" in text for text in row.values) and len(values) > 1:
        counts = [tuple(map(int, text.split("/"))) for text in row.values]
        table = [[right, of - right] for right, of in counts]
        found = stats.chi2_contingency(table, correction=False)
        detail += f"; spread {found.statistic / found.dof:.2f} x binomial (p {_p(found.pvalue)})"
    word = Word.CONTRADICTED if outside else Word.CONSISTENT
    return Verdict(word=word, method="range", n=str(len(values)), detail=detail)


def _series(row: Series) -> Verdict:
    """Never more than undecided: conditions of one server are not repeats."""
    found = stats.ttest_rel(list(map(float, row.first)), list(map(float, row.second)))
    low, high = map(float, found.confidence_interval())
    detail = f"mean difference {(low + high) / 2:.2f} [{low:.2f}, {high:.2f}]"
    detail += f", paired t p {_p(float(found.pvalue))}; the arms also differ in {row.confounded}"
    return Verdict(word=Word.UNDECIDED, method="paired t", n=str(len(row.first)), detail=detail)


def _order(row: Order) -> Verdict:
    right = number(row.larger) > number(row.smaller)
    detail = f"{row.larger} is {'larger' if right else 'not larger'} than {row.smaller}"
    word = Word.CONSISTENT if right else Word.CONTRADICTED
    return Verdict(word=word, method="arithmetic", n="2", detail=detail)


def _scored(row: Scored) -> Verdict:
    right, of = row.share.count(), row.share.of
    if right is None:
        return _impossible(row.share)
    excess = right - row.stopped
    word = Word.CONTRADICTED if excess > 0 else Word.CONSISTENT
    detail = f"{right} right, {row.stopped} of them stopped by themselves"
    if excess > 0:
        detail += f"; truncated answers scored as right: at least {excess}"
    return Verdict(word=word, method="truncation", n=str(of), detail=detail)


def _cold_start(row: ColdStart) -> Verdict:
    extra = row.requests * (row.mean_ttft - row.median_ttft)
    value, warm = row.tokens / row.seconds, row.tokens / (row.seconds - extra)
    if not agrees(value, row.value):
        detail = f"{row.tokens} tokens in {row.seconds:.2f} s are {value:.4g} tok/s"
        word = Word.CONTRADICTED
    else:
        word, detail = Word.UNDECIDED, "1 start, so restart noise is unknown"
        if warm > value * (1 + COLD):
            detail += f"; a cold start is in it: {warm:.1f} tok/s with each TTFT at the median"
    return Verdict(word=word, method="cold start", n=f"{row.requests} requests", detail=detail)


def _makespan(row: Makespan) -> Verdict:
    first, second = row.first, row.second
    wall, tokens = second.seconds / first.seconds, first.throughput / second.throughput
    rate = first.rate / second.rate
    word = Word.CONSISTENT if agrees(wall, row.value) else Word.CONTRADICTED
    detail = f"wall time {wall:.2f}, tokens/s {tokens:.2f}, per request {rate:.2f}"
    if not 1 / BUSY < first.busy / second.busy < BUSY:
        detail += (
            f"; slots are busy {first.busy:.2f} v {second.busy:.2f} of the time: "
            "the ratio is of makespans, not of decoding"
        )
    return Verdict(word=word, method="tokens/s against wall", n="1 run each", detail=detail)


def _speedup(row: Speedup, base: RawRun, run: RawRun) -> Verdict:
    """A speed-up is of tokens/s: a run with a smaller cap ends sooner by doing less."""
    wall, tokens = base.seconds / run.seconds, run.throughput / base.throughput
    cap = min(base.cap, run.cap)
    pairs = [
        (base.answers[item].within(cap), run.answers[item].within(cap)) for item in run.answers
    ]
    flips = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    right = [sum(column) for column in zip(*pairs, strict=True)]
    detail = f"wall time {wall:.2f}, tokens/s {tokens:.2f}"
    if base.cap != run.cap:
        detail += f"; caps differ: {base.cap} v {run.cap} tokens"
    detail += (
        f"; right and stopped within {cap} tokens: {right[0]} v {right[1]}, "
        f"McNemar p {_p(statistics.mcnemar(*flips))}"
    )
    word = Word.UNDECIDED
    unequal = base.cap != run.cap and not agrees(tokens, row.value)
    if unequal or not agrees(wall, row.value):
        word = Word.CONTRADICTED
    else:
        detail += "; 1 start, so restart noise is unknown"
    return Verdict(word=word, method="raw results", n=f"{len(pairs)} items", detail=detail)


_JUDGES: Mapping[type, Callable[[Any], Verdict]] = {
    Single: _single,
    Bare: _bare,
    Derived: _derived,
    Range: _range,
    Series: _series,
    Order: _order,
    Scored: _scored,
    ColdStart: _cold_start,
    Makespan: _makespan,
}


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= SMALL else f"{value:.0e}"


def _as_row(verdict: Verdict) -> dict[str, Any]:
    """Rounded, so that another release of scipy gives the same record."""
    return dict(_fields(verdict))


def _fields(verdict: Verdict) -> Iterator[tuple[str, Any]]:
    for key in ("id", "group", "says", "at", "word", "method", "n", "detail"):
        yield key, str(getattr(verdict, key))
    for key in ("p", "adjusted"):
        value = getattr(verdict, key)
        yield key, None if value is None else float(f"{value:.3g}")
    yield "interval", verdict.interval and [round(end, 2) for end in verdict.interval]
