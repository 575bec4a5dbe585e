"""Published figures as rows of records/bench/claims.toml, and the raw results they rest on."""

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from vllm_forge.bench.errors import ClaimsFileError
from vllm_forge.bench.results import Count, Hash
from vllm_forge.errors import problems, suggestion
from vllm_forge.host import parse_json, printable, read_data, read_plain
from vllm_forge.matrix import FrozenModel
from vllm_forge.matrix.model import Name, RelativePath, Text

CLAIMS = Path("records/bench/claims.toml")
LARGEST_RAW = 1 << 20
REMEDY = "correct it: docs/operate/bench-claims.md has the keys; git has the project's own rows"
EDGE = 1e-9  # of the last digit


def _digits(pattern: str) -> BeforeValidator:
    def check(value: object) -> object:
        if isinstance(value, str) and re.fullmatch(pattern, value):
            return value
        expected = "digits in quotes, without separators, units and '+'"
        raise ValueError(f"invalid number {value!r}: expected {expected}")

    return BeforeValidator(check)


# As it is printed; its last digit is its precision.
Printed = Annotated[str, _digits(r"-?[0-9]{1,15}(\.[0-9]{1,15})?")]
Quantity = Annotated[str, _digits(r"-?[0-9]{1,15}(\.[0-9]{1,15})?(/[1-9][0-9]{,15})?")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


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


def operand(quantity: str, *, whole_is_exact: bool = False) -> Span:
    """Numbers that are printed so; a fraction is one of counts, and exact."""
    if "/" in quantity or (whole_is_exact and "." not in quantity):
        return Span(number(quantity), number(quantity))
    return span(quantity)


class Rule(NamedTuple):
    """How a number follows from others; ``takes``: how many, None for any."""

    label: str
    takes: int | None
    compute: Callable[..., float]
    shares: slice = slice(0)  # operands that are shares


def _error(p: float, n: float) -> float:
    """``p``: may be printed 1.0 and be computed with as 1.09."""
    return math.sqrt(max(0, p * (1 - p)) / (n - 1))


RULES: Mapping[str, Rule] = {
    "value": Rule("the number", 1, lambda a: a),
    "gib": Rule("GB as GiB", 1, lambda gb: gb * 1e9 / 2**30),
    "ratio": Rule("ratio", 2, lambda a, b: a / b),
    "difference": Rule("first minus second", 2, lambda a, b: a - b),
    "points": Rule("difference in points", 2, lambda a, b: 100 * (a - b), slice(2)),
    "per-minute": Rule("number a minute", 2, lambda count, seconds: 60 * count / seconds),
    "percent": Rule("percent", 2, lambda part, of: 100 * part / of),
    "less-by": Rule("first less than second, %", 2, lambda a, b: 100 * (1 - a / b)),
    "more-by": Rule("second more than first, %", 2, lambda a, b: 100 * (b / a - 1)),
    "stderr": Rule("standard error of a share", 2, _error, slice(1)),
    "mean": Rule("mean", None, lambda *values: math.fsum(values) / len(values)),
    "sum": Rule("sum", None, lambda *values: math.fsum(values)),
    "length": Rule("1 + sum", None, lambda *rates: 1 + math.fsum(rates), slice(None)),
}


def follows(rule: Rule, operands: Sequence[Span]) -> Span:
    """What a rule gives of all that its operands may have been."""
    many = rule.takes is None  # all of them increase with each of their operands
    # The others are monotone in each of theirs; a standard error, on either side of a half.
    ends = [(*one, *([0.5] if one.low < 0.5 < one.high else ())) for one in operands]  # noqa: PLR2004
    corners = zip(*operands, strict=True) if many else product(*ends)
    values = [rule.compute(*corner) for corner in corners]
    return Span(min(values), max(values))


class Share(FrozenModel):
    """A share of an arm: ``right`` of ``of`` items, or ``value`` as printed, 0 to 1."""

    arm: Name
    of: int = Field(gt=0, le=10**7, strict=True)
    answers: int = Field(
        default=1, gt=0, le=10**4, strict=True, description="of an item, that are averaged"
    )
    right: Count | None = None
    value: Printed | None = None

    @property
    def all(self) -> int:
        """How many answers."""
        return self.of * self.answers

    def counts(self) -> range:
        """The count; those that round, or were cut, to ``value``; empty if no count does."""
        if self.right is not None:
            return range(self.right, self.right + 1)
        low, high = (end * self.all for end in span(self.value or ""))
        return range(max(0, math.ceil(low)), min(self.all, math.floor(high)) + 1)

    def count(self) -> int | None:
        """The count that is nearest to what was printed."""
        if not (counts := self.counts()):
            return None
        nearest = self.right if self.value is None else round(float(self.value) * self.all)
        return min(max(nearest or 0, counts[0]), counts[-1])

    @model_validator(mode="after")
    def _is_a_share(self) -> Self:
        if (self.right is None) == (self.value is None):
            raise ValueError("expected right or value")
        if self.right is not None and self.right > self.all:
            raise ValueError(f"{self.right} of {self.all} cannot be right")
        if self.value is not None and not 0 <= float(self.value) <= 1:
            raise ValueError(f"{self.value} is not a share: write 91.8 % as 0.918")
        return self


class Claim(FrozenModel):
    """What every row has: its words, and where they are."""

    id: Name
    says: Text
    at: Text = Field(description="section of the card, or a file of its repository")
    group: Literal["quality", "speed", "acceptance", "sweep", "size"]


class Single(Claim):
    """One share, compared with nothing."""

    kind: Literal["single"]
    share: Share


class Bare(Claim):
    """A figure that was published without a count, or with one start, and follows from nothing."""

    kind: Literal["bare"]
    value: Printed


class Comparison(Claim):
    """Two shares; ``varies`` are the properties of the arms that the words are about.

    ``flips``: how many items only the first, and only the second arm has right, where the answers
    were published.
    """

    kind: Literal["comparison"]
    claims: Literal["equal", "higher", "lower"]
    first: Share
    second: Share | None = Field(default=None, description="none: it was not measured")
    varies: tuple[str, ...]
    same_items: bool = True
    suite: Name | None = Field(default=None, description="of bench/suites.toml, to be run again")
    flips: tuple[Count, Count] | None = None


class Derived(Claim):
    """A number that follows from others; ``starts`` of each server, where it compares servers.

    Numbers with a decimal point were rounded or cut. Whole ones are ``rounded``, too, or counts.
    """

    kind: Literal["derived"]
    value: Printed
    rule: Name
    of: tuple[Quantity, ...] = Field(min_length=1)
    unit: float | None = Field(default=None, gt=0, description="default: of the last digit")
    rounded: bool | None = Field(default=None, description="whole numbers; of starts, they are")
    starts: Count | None = None
    arms: tuple[Name, ...] = ()

    @model_validator(mode="after")
    def _rule_is_known(self) -> Self:
        if (rule := RULES.get(self.rule)) is None:
            raise ValueError(f"unknown rule {self.rule!r}{suggestion(self.rule, RULES)}")
        if rule.takes not in {None, len(self.of)}:
            raise ValueError(f"rule {self.rule} takes {rule.takes} numbers, not {len(self.of)}")
        if wrong := [text for text in self.of[rule.shares] if abs(number(text)) > 1]:
            raise ValueError(f"{wrong[0]} is not a share: write 91.8 % as 0.918")
        if self.arms and (self.rule != "ratio" or float(self.value) <= 0):
            raise ValueError("arms are of a ratio above 0")
        return self


class Range(Claim):
    """Values that are said to be within bounds; fractions are counts."""

    kind: Literal["range"]
    values: tuple[Quantity, ...] = Field(min_length=1)
    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)


class Series(Claim):
    """Two rows of values at the same conditions; the first one is said to be larger."""

    kind: Literal["series"]
    first: tuple[Printed, ...] = Field(min_length=2)
    second: tuple[Printed, ...] = Field(min_length=2)
    confounded: Text = Field(description="what else differs")

    @model_validator(mode="after")
    def _is_paired(self) -> Self:
        if len(self.first) != len(self.second):
            raise ValueError(f"{len(self.first)} values against {len(self.second)}")
        return self


class Order(Claim):
    """One number that is said to be larger than another."""

    kind: Literal["order"]
    larger: Quantity
    smaller: Quantity


class Scored(Claim):
    """Right answers, and how many of them ended by themselves."""

    kind: Literal["scored"]
    share: Share
    stopped: Count = Field(description="the most right answers that were not truncated")


class ColdStart(Claim):
    """A throughput of few requests, whose first one may include a warm-up."""

    kind: Literal["cold-start"]
    value: Printed
    tokens: int = Field(gt=0)
    seconds: Positive
    requests: int = Field(gt=0)
    mean_ttft: Positive
    median_ttft: Positive

    @model_validator(mode="after")
    def _has_time(self) -> Self:
        if self.requests * (self.mean_ttft - self.median_ttft) >= self.seconds:
            raise ValueError("the first tokens took longer than the run")
        return self


class Batch(FrozenModel):
    """A batch of requests in ``slots``: mean tokens, wall time, median rate of a request."""

    tokens: Positive
    requests: int = Field(gt=0)
    seconds: Positive
    rate: Positive
    slots: int = Field(gt=0)

    @property
    def throughput(self) -> float:
        return self.tokens * self.requests / self.seconds

    @property
    def busy(self) -> float:
        """Mean share of the slots that generate."""
        return self.throughput / (self.slots * self.rate)


class Makespan(Claim):
    """A ratio of wall times of two batches."""

    kind: Literal["makespan"]
    value: Printed
    first: Batch
    second: Batch


class Speedup(Claim):
    """A ratio of wall times of two runs whose raw results are known."""

    kind: Literal["speedup"]
    value: Printed
    base: Name
    run: Name


class Served(FrozenModel):
    """How an arm is served: rows of matrix.toml."""

    preset: Name
    artifact: Name


class Published(FrozenModel):
    """Tokens a second of a served arm, as printed: what a measurement of it is held against."""

    arm: Name
    workload: Name
    concurrency: int = Field(gt=0)
    value: Printed

    @model_validator(mode="after")
    def _is_a_rate(self) -> Self:
        if float(self.value) <= 0:
            raise ValueError(f"{self.value} is not a rate")
        return self


class Raw(FrozenModel):
    """A committed file, as its authors published it."""

    file: RelativePath
    of: Text
    sha256: Hash


KINDS = {get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in Claim.__subclasses__()}


def _parsed(row: Any) -> Claim:
    """A row of its kind; ValueError with its id, by which it is found."""
    if not isinstance(row, dict) or (kind := KINDS.get(str(row.get("kind")))) is None:
        name, known = row.get("kind") if isinstance(row, dict) else row, ", ".join(KINDS)
        raise ValueError(f"unknown kind {name!r}: expected {known}")
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        raise ValueError(f"{row.get('id')}: {problems(error, kind)[0]}") from None


class ClaimsFile(FrozenModel):
    card: Text
    revision: Text
    license: Text = Field(default="unknown", description="of the raw results")
    arm: dict[Name, dict[str, Text]] = Field(default_factory=dict)
    serve: dict[Name, Served] = Field(default_factory=dict)
    published: tuple[Published, ...] = ()
    raw: dict[Name, Raw] = Field(default_factory=dict)
    claim: tuple[Annotated[Claim, BeforeValidator(_parsed)], ...]


@dataclass(frozen=True)
class Answer:
    right: bool
    stopped: bool
    tokens: int

    def within(self, cap: int) -> bool:
        """Whether it is right and ended by itself within ``cap`` tokens."""
        return self.right and self.stopped and self.tokens <= cap


@dataclass(frozen=True)
class RawRun:
    """A run of AIME, from its published JSON."""

    cap: int
    seconds: float
    answers: Mapping[str, Answer]

    @property
    def throughput(self) -> float:
        return sum(answer.tokens for answer in self.answers.values()) / self.seconds


def parse_claims(data: Any) -> ClaimsFile:
    """Rows, with unique ids and known arms and raw results; ValueError."""
    claims = ClaimsFile.model_validate(data)
    ids = [row.id for row in claims.claim]
    if repeated := sorted({name for name in ids if ids.count(name) > 1}):
        raise ValueError(f"duplicate claim {', '.join(repeated)}")
    if unserved := {row.arm for row in claims.published} - claims.serve.keys():
        raise ValueError(f"published: unknown {', '.join(sorted(unserved))}")
    for row in claims.claim:
        shares = [getattr(row, field, None) for field in ("share", "first", "second")]
        arms = {share.arm for share in shares if isinstance(share, Share)}
        arms |= set(getattr(row, "arms", ()))
        runs = {row.base, row.run} if isinstance(row, Speedup) else set()
        if unknown := (arms - set(claims.arm)) | (runs - set(claims.raw)):
            kind = "raw results" if runs else "arm"
            raise ValueError(f"claim {row.id}: unknown {kind} {', '.join(sorted(unknown))}")
    return claims


def read_claims(path: Path) -> ClaimsFile:
    """The rows of a file, else ClaimsFileError."""
    if path.suffix not in {".toml", ".json"}:
        what = f"{printable(path.name)} is not a list of claims"
        remedy = "write the card's figures as rows of TOML: docs/operate/bench-claims.md"
        raise ClaimsFileError(what, where=path, remedy=remedy)
    return read_data(path, parse_claims, ClaimsFileError, what="list of claims", remedy=REMEDY)


def read_run(folder: Path, raw: Raw) -> RawRun:
    """Raw results, after a comparison of their hash, else ClaimsFileError."""
    path = folder / raw.file
    try:
        return _parse_run(read_plain(path, LARGEST_RAW), raw.sha256)
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError
    ) as error:  # fmt: skip
        what = f"invalid raw results: {error!r}"
        raise ClaimsFileError(what, where=path, remedy=REMEDY) from None


def _parse_run(content: bytes, sha256: str) -> RawRun:
    """Two programs wrote these files: the later one calls its rows and fields otherwise."""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("SHA-256 does not match the list of claims")
    data = parse_json(content)
    rows = data.get("results") or data["details"]
    answers = {
        row["id"]: Answer(
            right=bool(row["correct"] if "correct" in row else row["ok"]),
            stopped=(row["finish"] if "finish" in row else row["finish_reason"]) == "stop",
            tokens=int(row["completion_tokens"]),
        )
        for row in rows
    }
    seconds = float(data["totals"]["wallclock_s"])
    if not answers or len(answers) < len(rows) or not 0 < seconds < math.inf:
        raise ValueError("expected answers, each of its own id, and seconds")
    return RawRun(int(data["meta"]["max_tokens"]), seconds, answers)
