"""Numbers as they are printed, and what follows from them."""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import product
from typing import NamedTuple

EDGE = 1e-9  # of the last digit


class Span(NamedTuple):
    """What a number may have been before it was printed; of a count, the count alone."""

    low: float
    high: float

    def meets(self, other: "Span") -> bool:
        return self.low <= other.high and other.low <= self.high


def span(printed: str, unit: float | None = None) -> Span:
    """Numbers that round to ``printed``, or are cut to it; or are nearer to it than ``unit``."""
    value, last = float(printed), 10.0 ** -len(printed.partition(".")[2])
    edge = EDGE * (unit or last)
    if unit or not value:
        reach = (unit or last) - edge
        return Span(value - reach, value + reach)
    near, far = last / 2 + edge, last - edge  # towards zero, away from it
    return Span(value - near, value + far) if value > 0 else Span(value - far, value + near)


def number(quantity: str) -> float:
    return float(Fraction(quantity))


def operand(quantity: str, *, whole_is_exact: bool) -> Span:
    """Numbers that are printed so; a fraction is one of counts, and exact."""
    if "/" in quantity or (whole_is_exact and "." not in quantity):
        return Span(number(quantity), number(quantity))
    return span(quantity)


class Rule(NamedTuple):
    """How a number follows from others; ``takes``: how many, None for any."""

    label: str
    takes: int | None
    compute: Callable[..., float]


RULES: Mapping[str, Rule] = {
    "value": Rule("the number", 1, lambda a: a),
    "gib": Rule("GB as GiB", 1, lambda gb: gb * 1e9 / 2**30),
    "ratio": Rule("ratio", 2, lambda a, b: a / b),
    "points": Rule("difference in points", 2, lambda a, b: 100 * (a - b)),
    "per-minute": Rule("number a minute", 2, lambda count, seconds: 60 * count / seconds),
    "percent": Rule("percent", 2, lambda part, of: 100 * part / of),
    "less-by": Rule("first less than second, %", 2, lambda a, b: 100 * (1 - a / b)),
    "more-by": Rule("second more than first, %", 2, lambda a, b: 100 * (b / a - 1)),
    "stderr": Rule("standard error of a share", 2, lambda p, n: math.sqrt(p * (1 - p) / (n - 1))),
    "mean": Rule("mean", None, lambda *values: math.fsum(values) / len(values)),
    "sum": Rule("sum", None, lambda *values: math.fsum(values)),
    "length": Rule("1 + sum", None, lambda *rates: 1 + math.fsum(rates)),
}


def follows(rule: Rule, operands: Sequence[Span]) -> Span:
    """What a rule, monotone in each of its operands, gives of all that they may have been."""
    many = rule.takes is None  # all of them increase with each of their operands
    corners = zip(*operands, strict=True) if many else product(*operands)
    values = [rule.compute(*corner) for corner in corners]
    return Span(min(values), max(values))
