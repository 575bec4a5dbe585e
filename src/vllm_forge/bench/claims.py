"""Published figures as rows of records/bench/claims.toml, and the raw results they rest on."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from vllm_forge.bench.errors import ClaimsFileError
from vllm_forge.host import parse_json, read_data, read_plain
from vllm_forge.matrix import FrozenModel
from vllm_forge.matrix.model import Name, RelativePath, Text

CLAIMS = Path("records/bench/claims.toml")
LARGEST_RAW = 1 << 20
RESTORE = f"restore it: git checkout -- {CLAIMS.parent}"


def _printed(text: str) -> str:
    if not re.fullmatch(r"-?\d+(\.\d+)?", text):
        raise ValueError(f"{text!r} is not a number as it is printed")
    return text


def _quantity(text: str) -> str:
    if not re.fullmatch(r"-?\d+(\.\d+)?(/[1-9]\d*)?", text):
        raise ValueError(f"{text!r} is not a number or a fraction")
    return text


Printed = Annotated[str, AfterValidator(_printed)]  # its last digit is its precision
Quantity = Annotated[str, AfterValidator(_quantity)]
Count = Annotated[int, Field(ge=0, strict=True)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Share(FrozenModel):
    """A share of an arm: ``right`` of ``of``, or ``value`` as printed."""

    arm: Name
    of: int = Field(gt=0, strict=True)
    right: Count | None = None
    value: Printed | None = None

    def count(self) -> int | None:
        """The count; that which rounds or was cut to ``value``; None if no count does."""
        if self.right is not None:
            return self.right
        nearest = round(float(self.value or "nan") * self.of)
        return nearest if agrees(nearest / self.of, self.value or "") else None


class _Claim(FrozenModel):
    """What every row has: its words, and where they are."""

    id: Name
    says: Text
    at: Text = Field(description="section of the card, or a file of its repository")
    group: Literal["quality", "speed", "acceptance", "sweep", "size"]


class Single(_Claim):
    """One share, compared with nothing."""

    kind: Literal["single"]
    share: Share


class Bare(_Claim):
    """A figure that was published without a count, or with one start, and follows from nothing."""

    kind: Literal["bare"]
    value: Printed


class Comparison(_Claim):
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


class Derived(_Claim):
    """A number that follows from others; ``starts`` of each server, where it compares servers."""

    kind: Literal["derived"]
    value: Printed
    rule: Name
    of: tuple[Quantity, ...]
    unit: float | None = Field(default=None, gt=0, description="default: of the last digit")
    starts: Count | None = None
    arms: tuple[Name, ...] = ()


class Range(_Claim):
    """Values that are said to be within bounds; fractions are counts."""

    kind: Literal["range"]
    values: tuple[Quantity, ...] = Field(min_length=1)
    low: float
    high: float


class Series(_Claim):
    """Two rows of values at the same conditions; the first one is said to be larger."""

    kind: Literal["series"]
    first: tuple[Printed, ...] = Field(min_length=2)
    second: tuple[Printed, ...] = Field(min_length=2)
    confounded: Text = Field(description="what else differs")


class Order(_Claim):
    """One number that is said to be larger than another."""

    kind: Literal["order"]
    larger: Quantity
    smaller: Quantity


class Scored(_Claim):
    """Right answers, and how many of them ended by themselves."""

    kind: Literal["scored"]
    share: Share
    stopped: Count = Field(description="the most right answers that were not truncated")


class ColdStart(_Claim):
    """A throughput of few requests, whose first one may include a warm-up."""

    kind: Literal["cold-start"]
    value: Printed
    tokens: int = Field(gt=0)
    seconds: float = Field(gt=0)
    requests: int = Field(gt=0)
    mean_ttft: float = Field(gt=0)
    median_ttft: float = Field(gt=0)


class Batch(FrozenModel):
    """A batch of requests in ``slots``: mean tokens, wall time, median rate of a request."""

    tokens: float
    requests: int
    seconds: float
    rate: float
    slots: int

    @property
    def throughput(self) -> float:
        return self.tokens * self.requests / self.seconds

    @property
    def busy(self) -> float:
        """Mean share of the slots that generate."""
        return self.throughput / (self.slots * self.rate)


class Makespan(_Claim):
    """A ratio of wall times of two batches."""

    kind: Literal["makespan"]
    value: Printed
    first: Batch
    second: Batch


class Speedup(_Claim):
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


class Raw(FrozenModel):
    """A committed file, as its authors published it."""

    file: RelativePath
    of: Text
    sha256: Hash


Claim = Annotated[
    Single
    | Bare
    | Comparison
    | Derived
    | Range
    | Series
    | Order
    | Scored
    | ColdStart
    | Makespan
    | Speedup,
    Field(discriminator="kind"),
]


class ClaimsFile(FrozenModel):
    """claims.toml."""

    card: Text
    revision: Text
    license: Text = Field(description="of the raw results")
    arm: dict[Name, dict[str, Text]]
    serve: dict[Name, Served] = Field(default_factory=dict)
    published: tuple[Published, ...] = ()
    raw: dict[Name, Raw]
    claim: tuple[Claim, ...]


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


def agrees(computed: float, printed: str, unit: float | None = None) -> bool:
    """Whether a number, rounded or cut at its last digit, is printed so."""
    digits = len(printed.partition(".")[2])
    return abs(computed - float(printed)) < (unit or 10.0**-digits) * (1 - 1e-9)


def number(quantity: str) -> float:
    return float(Fraction(quantity))


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
            raise ValueError(f"claim {row.id}: unknown {', '.join(sorted(unknown))}")
    return claims


def read_claims(root: Path) -> ClaimsFile:
    """The rows of a checkout, else ClaimsFileError."""
    return read_data(
        root / CLAIMS, parse_claims, ClaimsFileError, what="list of claims", remedy=RESTORE
    )


def read_run(root: Path, raw: Raw) -> RawRun:
    """Raw results, after a comparison of their hash, else ClaimsFileError."""
    path = root / CLAIMS.parent / raw.file
    try:
        content = read_plain(path, LARGEST_RAW)
        run = _parse_run(parse_json(content))
    except (OSError, ValueError, LookupError, TypeError) as error:
        what = f"invalid raw results: {error!r}"
        raise ClaimsFileError(what, where=str(path), remedy=RESTORE) from None
    if hashlib.sha256(content).hexdigest() != raw.sha256:
        what = f"invalid raw results: SHA-256 does not match {CLAIMS}"
        raise ClaimsFileError(what, where=str(path), remedy=RESTORE)
    return run


def _parse_run(data: Any) -> RawRun:
    """Two programs wrote these files: the later one calls its rows and fields otherwise."""
    rows = data.get("results") or data["details"]
    answers = {
        row["id"]: Answer(
            right=bool(row["correct"] if "correct" in row else row["ok"]),
            stopped=(row["finish"] if "finish" in row else row["finish_reason"]) == "stop",
            tokens=int(row["completion_tokens"]),
        )
        for row in rows
    }
    return RawRun(int(data["meta"]["max_tokens"]), float(data["totals"]["wallclock_s"]), answers)
