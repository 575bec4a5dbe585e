"""What can be said of each claim: by totals alone, by raw results, by arithmetic."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import singledispatch
from pathlib import Path
from typing import Any

from scipy import stats

from vllm_forge.bench import claims, statistics
from vllm_forge.bench.claims import RULES, Share, Span, follows, number, operand, span
from vllm_forge.bench.errors import ClaimsFileError
from vllm_forge.bench.statistics import ALPHA, Interval
from vllm_forge.host.files import file_digest

COLD = 0.05  # a warm-up that moves a throughput by this share is named
BUSY = 1.1  # ratio of busy shares from which wall times are not those of decoding
SMALL = 1e-4  # p that is printed with an exponent
STARTS = 5  # that the sign-flip test needs to decide anything at 5 %


class Word(StrEnum):
    CONTRADICTED = "contradicted"
    HOLDS = "holds"
    CONSISTENT = "consistent"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Verdict:
    """A row of the page; ``p``: of the test with its bound, before and after Holm's correction."""

    word: Word
    method: str
    n: str
    detail: str
    p: float | None = None
    adjusted: float | None = None
    interval: Interval | None = None

    def as_json(self) -> dict[str, Any]:
        """Rounded, so that another release of scipy gives the same record."""
        numbers = {"p": self.p, "adjusted": self.adjusted}
        rounded = {key: p if p is None else float(f"{p:.3g}") for key, p in numbers.items()}
        interval = self.interval and [round(end, 2) for end in self.interval]
        return {**vars(self), **rounded, "interval": interval}


def judge(path: Path) -> dict[str, Any]:
    """Verdicts on all claims of a file, as JSON; raw results are beside it. ClaimsFileError."""
    file = claims.read_claims(path)
    runs = {name: claims.read_run(path.parent, raw) for name, raw in file.raw.items()}
    names = ("id", "group", "says", "at")
    return {
        "schema": "claims/1",
        "claims_sha256": file_digest(path),
        "card": file.card,
        "revision": file.revision,
        "verdicts": [
            {**{name: getattr(row, name) for name in names}, **verdict.as_json()}
            for row, verdict in zip(file.claim, verdicts(file, runs), strict=True)
        ],
    }


def verdicts(file: claims.ClaimsFile, runs: Mapping[str, claims.RawRun]) -> list[Verdict]:
    """One verdict for each claim, in its order; ClaimsFileError."""
    families: defaultdict[bool, list[int]] = defaultdict(list)
    rows = []
    for place, row in enumerate(file.claim):
        try:
            rows.append(_judge(row, file, runs))
        except (ArithmeticError, ValueError) as error:
            what = f"invalid claim {row.id}: {error}"
            raise ClaimsFileError(what, remedy=claims.REMEDY) from None
        if isinstance(row, claims.Comparison) and rows[place].p is not None:
            families[row.claims == "equal"].append(place)
    for places in families.values():
        adjusted = statistics.holm([rows[place].p or 0 for place in places])
        for place, value in zip(places, adjusted, strict=True):
            rows[place] = _corrected(rows[place], value)
    return rows


@singledispatch
def _judge(
    row: claims.Claim, file: claims.ClaimsFile, runs: Mapping[str, claims.RawRun]
) -> Verdict:
    """By the function for the kind of the claim."""
    raise NotImplementedError(type(row))


@_judge.register
def _comparison(row: claims.Comparison, file: claims.ClaimsFile, _: object) -> Verdict:
    """Undecided unless the difference is there whatever the pairing, and after the correction."""
    if row.second is None:
        return Verdict(Word.UNDECIDED, "none", "0", "the reference was not measured")
    shares = (row.first, row.second)
    for share in shares:
        if not share.counts():
            return _impossible(share)
    n = " v ".join(map(_printed_counts, shares))
    direction = {"equal": 0, "higher": 1, "lower": -1}[row.claims]
    if direction and not _can_be(direction, *shares):
        detail = f"by its own total the first is not {row.claims}"
        return Verdict(Word.CONTRADICTED, "arithmetic", n, detail)
    if max(share.answers for share in shares) > 1:
        detail = "answers of one item are not independent: only scores by item can show it"
        return Verdict(Word.UNDECIDED, "none", n, detail)
    if row.flips is not None and not _possible(row.flips, *shares):
        detail = f"flips {row.flips[0]} v {row.flips[1]} cannot give these totals"
        return Verdict(Word.CONTRADICTED, "arithmetic", n, detail)
    interval = statistics.share_difference(*((share.count() or 0, share.of) for share in shares))
    p, method, detail, pairing = _difference(row, *shares)
    a, b = (file.arm[share.arm] for share in shares)
    others = sorted(key for key in {*a, *b} - set(row.varies) if a.get(key) != b.get(key))
    word = Word.HOLDS
    if row.claims == "equal" or direction * interval.value < 0:
        word = Word.CONTRADICTED
    elif others:
        word = Word.UNDECIDED
    if others:
        detail += f"; the arms also differ in {', '.join(others)}"
    if pairing and p >= ALPHA:
        detail += f"; {pairing}"
    scaled = Interval(*(100 * end for end in interval))
    return Verdict(word, method, n, detail, interval=scaled, p=p)


def _can_be(direction: int, first: Share, second: Share) -> bool:
    """Whether a share may be higher (1) or lower (-1) than another one that was printed so."""
    ends = first.counts()[::-direction][0] / first.all, second.counts()[::direction][0] / second.all
    return direction * (ends[0] - ends[1]) > 0


def _printed_counts(share: Share) -> str:
    counts = share.counts()
    some = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
    return f"{some}/{share.all}"


def _possible(flips: tuple[int, int], first: Share, second: Share) -> bool:
    """Whether two totals can be of answers of which so many flipped."""
    only_first, only_second = flips
    return any(
        a - only_first in range(first.of - sum(flips) + 1)
        and a - only_first + only_second in second.counts()
        for a in first.counts()
    )


def _extremes(first: Share, second: Share) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of the counts that were printed so, those that differ least, and those that differ most."""

    def clamped(share: float, of: Share) -> int:
        counts = of.counts()
        return min(max(round(share * of.of), counts[0]), counts[-1])

    def gap(pair: tuple[int, int]) -> float:
        return abs(pair[0] / first.of - pair[1] / second.of)

    ends = [(a, b) for a in (first.counts()[0], first.counts()[-1])
            for b in (second.counts()[0], second.counts()[-1])]  # fmt: skip
    near = [(clamped(b / second.of, first), b) for _, b in ends]
    near += [(a, clamped(a / first.of, second)) for a, _ in ends]
    return min(near, key=gap), max(ends, key=gap)


def _difference(row: claims.Comparison, first: Share, second: Share) -> tuple[float, str, str, str]:
    """p, method, what it says, and what a lack of pairs leaves open; p is the largest there is."""
    if row.flips is not None:
        p = statistics.mcnemar(*row.flips)
        return p, "exact McNemar, published answers", f"flips {row.flips[0]} v {row.flips[1]}", ""
    near, far = _extremes(first, second)
    p = statistics.fisher((near[0], first.of), (near[1], second.of))
    if not row.same_items or first.of != second.of:
        return p, "Fisher, Newcombe", "different items", ""
    worst = statistics.mcnemar_bounds(*near, first.of)
    best = statistics.mcnemar_bounds(*far, first.of).best
    detail = f"McNemar p {_p(best)} to {_p(worst.worst)} over all pairings, Fisher {_p(p)}"
    pairing = "not distinguishable whatever the pairing"
    if worst.limit is not None:
        pairing = f"depends on the pairing: significant if at most {worst.limit} opposite flips"
    elif best < ALPHA:
        pairing = "depends on the pairing, and on digits that were not printed"
    return worst.worst, "McNemar bounds, Newcombe", detail, pairing


def _corrected(verdict: Verdict, adjusted: float) -> Verdict:
    if adjusted < ALPHA:
        return replace(verdict, adjusted=adjusted)
    detail = verdict.detail
    if verdict.p is not None and verdict.p < ALPHA:
        detail += "; not significant after Holm's correction"
    return replace(verdict, word=Word.UNDECIDED, detail=detail, adjusted=adjusted)


def _impossible(share: Share) -> Verdict:
    detail = f"no count of {share.all} gives {share.value}"
    return Verdict(Word.CONTRADICTED, "arithmetic", str(share.all), detail)


@_judge.register
def _single(row: claims.Single, *_: object) -> Verdict:
    """The items are the sample, however often each was answered."""
    if (count := row.share.count()) is None:
        return _impossible(row.share)
    found = statistics.share(round(count / row.share.answers), row.share.of)
    low, high = 100 * found.low, 100 * found.high
    detail = f"95 % interval {low:.1f} to {high:.1f} %; compared with nothing"
    n = _printed_counts(row.share)
    return Verdict(Word.CONSISTENT, "Wilson", n, detail)


@_judge.register
def _bare(_: claims.Bare, *__: object) -> Verdict:
    return Verdict(Word.UNDECIDED, "none", "1", "neither a count nor repeats were published")


@_judge.register
def _derived(row: claims.Derived, *_: object) -> Verdict:
    rule, n = RULES[row.rule], ", ".join(row.of)
    printed, rounded = span(row.value, row.unit), row.rounded or row.starts is not None
    readings = [  # of whole numbers
        [operand(quantity, whole_is_exact=exact) for quantity in row.of]
        for exact in ([False] if rounded else [True] if row.rounded is False else [True, False])
    ]
    fits = [follows(rule, operands).meets(printed) for operands in readings]
    detail = f"{rule.label}: {rule.compute(*map(number, row.of)):.4g}"
    word, method = Word.CONSISTENT, "arithmetic"
    if not any(fits):
        word, detail = Word.CONTRADICTED, detail + _otherwise(row, readings[0], printed)
    elif not all(fits):
        word = Word.UNDECIDED
        detail += "; it follows if whole numbers were rounded, not if they are counts: "
        detail += "say rounded = true, or false"
    elif row.starts is not None and row.starts < STARTS:
        word, method = Word.UNDECIDED, "arithmetic, starts"
        plural = "" if row.starts == 1 else "s"
        detail += f"; {row.starts} start{plural} of each server, so restart noise is unknown"
    return Verdict(word, method, n, detail)


def _otherwise(row: claims.Derived, operands: list[Span], printed: Span) -> str:
    """The rule that gives the printed number: points for percent, percent of the other."""
    for name, rule in RULES.items():
        if name != row.rule and rule.takes in {None, len(operands)} and all(map(any, operands)):
            try:
                found = follows(rule, operands)
            except (ArithmeticError, ValueError):  # not a share
                continue
            if found.meets(printed):
                return f"; {row.value} is what another rule gives: {rule.label}"
    return ""


@_judge.register
def _range(row: claims.Range, *_: object) -> Verdict:
    values = [100 * number(text) if "/" in text else float(text) for text in row.values]
    outside = [
        value
        for text, value in zip(row.values, values, strict=True)
        if not Span(_rounded(row.low).low, _rounded(row.high).high).meets(Span(value, value))
        # A value of fewer digits than the bounds.
        and ("/" in text or not Span(row.low, row.high).meets(span(text)))
    ]
    detail = f"{min(values):.2f} to {max(values):.2f}"
    counts = [tuple(map(int, text.split("/"))) for text in row.values if text.count("/")]
    table = [[right, of - right] for right, of in counts]
    shares = len(counts) == len(values) > 1 and min(map(min, table)) >= 0
    if shares and all(map(sum, zip(*table, strict=True))):
        found = stats.chi2_contingency(table, correction=False)
        detail += f"; spread {found.statistic / found.dof:.2f} x binomial (p {_p(found.pvalue)})"
    word = Word.CONTRADICTED if outside else Word.CONSISTENT
    return Verdict(word, "range", str(len(values)), detail)


@_judge.register
def _series(row: claims.Series, *_: object) -> Verdict:
    """Never more than undecided: conditions of one server are not repeats."""
    pairs = [list(map(float, values)) for values in (row.first, row.second)]
    if len({round(a - b, 9) for a, b in zip(*pairs, strict=True)}) == 1:
        detail = "the differences do not vary at the digits that were printed"
    else:
        found = stats.ttest_rel(*pairs)
        low, high = map(float, found.confidence_interval())
        detail = f"mean difference {(low + high) / 2:.2f} [{low:.2f}, {high:.2f}]"
        detail += f", paired t p {_p(float(found.pvalue))}"
    detail += f"; the arms also differ in {row.confounded}"
    return Verdict(Word.UNDECIDED, "paired t", str(len(row.first)), detail)


@_judge.register
def _order(row: claims.Order, *_: object) -> Verdict:
    """Undecided where digits that were not printed decide."""
    texts = (row.larger, row.smaller)
    (a, larger), (b, smaller) = ((number(text), operand(text)) for text in texts)
    word, detail = Word.CONTRADICTED, f"{row.larger} is not larger than {row.smaller}"
    if a > b:
        word, detail = Word.CONSISTENT, f"{row.larger} is larger than {row.smaller}"
    elif larger.high > smaller.low and (
        a == b or len({len(text.partition(".")[2]) for text in texts}) > 1
    ):
        word, detail = Word.UNDECIDED, f"{detail} at the digits that were printed"
    return Verdict(word, "arithmetic", "2", detail)


@_judge.register
def _scored(row: claims.Scored, *_: object) -> Verdict:
    if not row.share.counts():
        return _impossible(row.share)
    right = row.share.counts()[0]  # the fewest that were printed so
    excess = right - row.stopped
    word = Word.CONTRADICTED if excess > 0 else Word.CONSISTENT
    detail = f"{right} right, {row.stopped} of them stopped by themselves"
    if excess > 0:
        detail += f"; truncated answers scored as right: at least {excess}"
    return Verdict(word, "truncation", str(row.share.all), detail)


@_judge.register
def _cold_start(row: claims.ColdStart, *_: object) -> Verdict:
    extra = row.requests * (row.mean_ttft - row.median_ttft)
    value, warm = row.tokens / row.seconds, row.tokens / (row.seconds - extra)
    tokens = Span(row.tokens, row.tokens)
    if not follows(RULES["ratio"], [tokens, _rounded(row.seconds)]).meets(span(row.value)):
        detail = f"{row.tokens} tokens in {row.seconds:.2f} s are {value:.4g} tok/s"
        word = Word.CONTRADICTED
    else:
        word, detail = Word.UNDECIDED, "1 start, so restart noise is unknown"
        if warm > value * (1 + COLD):
            detail += f"; a cold start is in it: {warm:.1f} tok/s with each TTFT at the median"
    return Verdict(word, "cold start", f"{row.requests} requests", detail)


@_judge.register
def _makespan(row: claims.Makespan, *_: object) -> Verdict:
    first, second = row.first, row.second
    wall, tokens = second.seconds / first.seconds, first.throughput / second.throughput
    rate = first.rate / second.rate
    ratio = follows(RULES["ratio"], [_rounded(second.seconds), _rounded(first.seconds)])
    word = Word.CONSISTENT if ratio.meets(span(row.value)) else Word.CONTRADICTED
    detail = f"wall time {wall:.2f}, tokens/s {tokens:.2f}, per request {rate:.2f}"
    if not 1 / BUSY < first.busy / second.busy < BUSY:
        detail += f"; slots are busy {first.busy:.2f} v {second.busy:.2f} of the time: "
        detail += "the ratio is of makespans, not of decoding"
    return Verdict(word, "tokens/s against wall", "1 run each", detail)


@_judge.register
def _speedup(row: claims.Speedup, _: object, runs: Mapping[str, claims.RawRun]) -> Verdict:
    """A speed-up is of tokens/s: a run with a smaller cap ends sooner by doing less."""
    base, run = runs[row.base], runs[row.run]
    wall, tokens = base.seconds / run.seconds, run.throughput / base.throughput
    cap = min(base.cap, run.cap)
    if base.answers.keys() != run.answers.keys():
        raise ValueError("the runs answered different items")
    pairs = [[of.answers[item].within(cap) for of in (base, run)] for item in run.answers]
    flips = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    right = [sum(column) for column in zip(*pairs, strict=True)]
    detail = f"wall time {wall:.2f}, tokens/s {tokens:.2f}"
    if base.cap != run.cap:
        detail += f"; caps differ: {base.cap} v {run.cap} tokens"
    detail += f"; right and stopped within {cap} tokens: {right[0]} v {right[1]}, "
    detail += f"McNemar p {_p(statistics.mcnemar(*flips))}"
    word, printed = Word.CONTRADICTED, span(row.value)
    of_wall = base.cap == run.cap and printed.meets(Span(wall, wall))
    if of_wall or printed.meets(Span(tokens, tokens)):
        word = Word.UNDECIDED
        detail += "; 1 start, so restart noise is unknown"
    return Verdict(word, "raw results", f"{len(pairs)} items", detail)


def _rounded(value: float) -> Span:
    """What a number of the rows may have been before it was printed."""
    return span(f"{value:.9f}".rstrip("0").rstrip("."))


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= SMALL else f"{value:.0e}"
