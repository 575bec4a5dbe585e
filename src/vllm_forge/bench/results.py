"""A result of a benchmark, format ``bench/1``: a record of one arm, and a row for each answer.

The record is JSON and names its rows, gzipped JSONL beside it, by their hash. It is of one image:
``server.image`` is the digest.
"""

import gzip
import hashlib
import statistics
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from vllm_forge import host
from vllm_forge.bench.errors import ResultFileError
from vllm_forge.errors import first_problem
from vllm_forge.matrix import FrozenModel
from vllm_forge.matrix.model import Flag, Name, Text

T = TypeVar("T")
MOST_STARTS = 16  # 2^16 patterns of signs are enumerated in a moment
LARGEST_ROWS = 256 << 20  # bytes, unpacked; a row has about 200
MOST_ROWS = 1_000_000  # an empty one takes memory, too
REMEDY = "give a record of `bench run`, `serve`, `quality` or `import`, with its rows beside it"

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
MOST_COUNT = 1 << 53  # up to which a float has every integer
Count = Annotated[int, Field(ge=0, le=MOST_COUNT, strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]  # no text, no truth value
Seconds = Annotated[Number, Field(ge=0)]
Least = Annotated[int, Field(gt=0, le=MOST_COUNT, strict=True)]


class Conditions(FrozenModel):
    """What must be equal in arms that are compared."""

    workload: Name
    prompts_sha256: Hash
    template_sha256: Hash
    tokenizer_sha256: Hash
    thinking: Flag
    temperature: Number = Field(ge=0)
    top_p: Number = Field(default=1.0, gt=0, le=1)
    max_tokens: Least
    ignore_eos: Flag = Field(description="each answer then has max_tokens")
    concurrency: Least
    prefix_cache: Flag


class Server(FrozenModel):
    """What was measured."""

    image: Digest
    tree: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    lock_sha256: Hash
    artifact: Text
    argv: tuple[Text, ...]
    gpu: Text
    gpus: Least
    driver: Text
    env_sha256: Hash | None = Field(
        default=None, exclude_if=lambda value: value is None,
        description="of the variables that a session sets: they may select kernels, too",
    )  # fmt: skip
    claimed: Flag = Field(
        default=False, exclude_if=lambda value: not value,
        description="the image is the one that was built here; which one answered was not seen",
    )  # fmt: skip

    @property
    def seen(self) -> str:
        """The digest, and whether it is only claimed."""
        return f"{self.image} (claimed)" if self.claimed else self.image


# What arms may differ in where all of them say so; anything else is refused.
Differences = Annotated[
    tuple[Literal["gpus", "kernels"], ...],
    Field(description="what the arms differ in on purpose", exclude_if=lambda value: not value),
]


class Counters(FrozenModel):
    """vLLM's metrics at one moment."""

    drafts: Count
    draft_tokens: Count
    accepted: Count
    per_position: tuple[Count, ...] = Field(
        default=(), description="accepted, by position within a draft; none without drafts"
    )
    prefix_hits: Count
    tokens: Count = Field(description="generated")


class Drafts(FrozenModel):
    """What a workload predicts of a model whose acceptance is known exactly."""

    drafts: Count
    per_position: tuple[Count, ...] = Field(min_length=1)


class GpuState(FrozenModel):
    """A GPU at one moment, by nvidia-smi; None: it does not say."""

    index: Count
    sm_mhz: Number | None
    memory_mhz: Number | None
    watts: Number | None
    celsius: Number | None
    reasons: Count | None = Field(description="clocks_event_reasons.active, a mask")
    slowed_us: Number | None = Field(
        description="by heat or a lack of power, since the driver's start"
    )


class Window(FrozenModel):
    """What was measured around the answers of a start."""

    seconds: Annotated[Number, Field(gt=0)]
    before: Counters
    after: Counters
    new_files: tuple[Text, ...] = Field(description="of JIT caches, that appeared in the window")
    headroom: Number = Field(description="rate of this client against a null server, over the rate")
    predicted: Drafts | None = Field(default=None, description="by the workload, of all answers")
    gpus_before: tuple[GpuState, ...] = Field(default=(), description="of the host")
    gpus_after: tuple[GpuState, ...] = ()

    @property
    def change(self) -> dict[str, Any]:
        """What was counted in it, by counter; negative where one was reset."""
        before, after = dict(self.before), dict(self.after)
        places = after.pop("per_position"), before.pop("per_position")
        pairs = zip_longest(*places, fillvalue=0)
        counts = {name: after[name] - before[name] for name in after}
        return {**counts, "per_position": tuple(now - then for now, then in pairs)}


class Start(FrozenModel):
    """One start of the server; ``order``: among those of all arms."""

    order: Count
    window: Window | None = Field(default=None, description="none: only the answers are known")
    ready_s: Seconds | None = Field(default=None, description="none: started by another program")
    cached: Count | None = Field(default=None, description="compiled files before the start")
    compiled: Count | None = Field(default=None, description="files that the start added to them")
    kernels: tuple[Text, ...] | None = Field(default=None, description="by the server's log")


class RowsFile(FrozenModel):
    """Rows of a record: a file in its folder."""

    file: FileName
    sha256: Hash
    count: Count


class Setup(FrozenModel):
    """What is measured: the same in all starts of a record."""

    arm: Name
    session: Name = Field(description="of all arms that were run in turns")
    conditions: Conditions
    server: Server
    differs: Differences = ()


class Result(Setup):
    """One arm."""

    format: Literal["bench/1"]
    starts: tuple[Start, ...] = Field(min_length=1)
    rows: RowsFile


class Row(FrozenModel):
    """One answer. ``family``: items that are not independent share it."""

    start: Count = Field(description="index into the record's starts")
    item: Text
    family: Text = ""
    repeat: Count = 0
    finish: Literal["stop", "length", "error"]
    output_tokens: Count
    seconds: Seconds
    ttft: Seconds | None = None
    scores: dict[Name, Flag] = Field(default_factory=dict, description="by scorer")
    fault: str = Field(default="", description="why it is not right by the strictest scorer")
    answer_sha256: Hash | None = Field(default=None, description="of the answer, kept beside this")
    drafted: Count = 0
    accepted: Count = 0
    positions: tuple[Count, ...] = Field(default=(), description="accepted, by position in a draft")

    @property
    def key(self) -> tuple[str, int]:
        return self.item, self.repeat

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first one, as vLLM has it; GuideLLM's includes the first."""
        if self.ttft is None or self.output_tokens < 2:  # noqa: PLR2004 - the first, and others
            return None
        return (self.seconds - self.ttft) / (self.output_tokens - 1)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.accepted > self.drafted:
            raise ValueError("more tokens were accepted than drafted")
        if self.ttft is not None and self.ttft > self.seconds:
            raise ValueError("the first token came after the last one")
        return self


@dataclass(frozen=True)
class Arm:
    """A result with its rows."""

    path: Path
    result: Result
    rows: tuple[Row, ...]

    def of_start(self, index: int) -> list[Row]:
        return [row for row in self.rows if row.start == index]

    def rates(self) -> dict[int, float]:
        """Tokens a second of each start, by its order, in which they were run."""
        rates = {
            start.order: sum(row.output_tokens for row in self.of_start(index))
            / start.window.seconds
            for index, start in enumerate(self.result.starts)
            if start.window
        }
        return dict(sorted(rates.items()))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """``rates``: tokens a second by start; TTFT and TPOT are medians of answers, in seconds."""

    arm: Arm
    rates: dict[int, float]
    ttft: float | None
    tpot: float | None
    acceptance: float | None
    positions: tuple[float, ...]  # accepted of all drafts, by position

    @property
    def name(self) -> str:
        return f"{self.arm.result.arm}, c={self.arm.result.conditions.concurrency}"

    @property
    def rate(self) -> float:
        return statistics.fmean(self.rates.values())

    def figures(self) -> dict[str, str]:
        """One row of a table; what was not measured is "not run"."""
        result, server = self.arm.result, self.arm.result.server
        rate = self.rate if self.rates else None
        noise = statistics.stdev(self.rates.values()) / self.rate if len(self.rates) > 1 else None
        numbers = {
            "tokens/s": (rate, ".1f", 1),
            "of a GPU": (rate, ".1f", 1 / server.gpus),
            "between starts": (noise, ".2%", 1),
            "TTFT, s": (self.ttft, ".3f", 1),
            "TPOT, ms": (self.tpot, ".2f", 1000),
            "accepted": (self.acceptance, ".2%", 1),
        }
        texts = {
            name: "not run" if value is None else f"{value * scale:{form}}"
            for name, (value, form, scale) in numbers.items()
        }
        claimed = " (claimed)" if server.claimed else ""
        return {
            "result": self.name,
            "workload": result.conditions.workload,
            "image": server.image.removeprefix("sha256:")[:12] + claimed,
            "starts": str(len(result.starts)),
            "GPUs": str(server.gpus),
            **texts,
            "by position": " / ".join(f"{share:.2%}" for share in self.positions) or "not run",
        }


def summarize(arm: Arm) -> Summary:
    """Of all starts of a record."""
    ttfts = [row.ttft for row in arm.rows if row.ttft is not None]
    tpots = [row.tpot for row in arm.rows if row.tpot is not None]
    changes = [start.window.change for start in arm.result.starts if start.window]
    drafts, drafted, accepted = (
        sum(change[name] for change in changes) for name in ("drafts", "draft_tokens", "accepted")
    )
    places = zip_longest(*(change["per_position"] for change in changes), fillvalue=0)
    return Summary(
        arm=arm,
        rates=arm.rates(),
        ttft=statistics.median(ttfts) if ttfts else None,
        tpot=statistics.median(tpots) if tpots else None,
        acceptance=accepted / drafted if drafted else None,
        positions=tuple(sum(counts) / drafts for counts in places) if drafts else (),
    )


def read_arm(path: Path) -> Arm:
    """A record and its rows, whose hash is compared; ResultFileError."""
    result: Result = host.read_data(
        path, Result.model_validate, ResultFileError, what="result", remedy=REMEDY
    )
    rows_path = path.with_name(result.rows.file)
    try:
        return Arm(path, result, _read_rows(rows_path, result))
    except (OSError, zlib.error, ValueError) as error:
        what = f"invalid rows of a result: {error}"
        raise ResultFileError(what, where=str(rows_path), remedy=REMEDY) from None


def _read_rows(path: Path, result: Result) -> tuple[Row, ...]:
    packed = host.read_plain(path)
    rows = parse_lines(unpacked(packed), Row.model_validate)
    if hashlib.sha256(packed).hexdigest() != result.rows.sha256:
        # A writer that was killed between both files left rows of one more start.
        rows = [row for row in rows if row.start < len(result.starts)]
        if hashlib.sha256(_pack(rows)).hexdigest() != result.rows.sha256:
            raise ValueError("SHA-256 does not match the record")
    if len(rows) != result.rows.count:
        raise ValueError(f"expected {result.rows.count} rows, found {len(rows)}")
    if any(row.start >= len(result.starts) for row in rows):
        raise ValueError("a row is of a start that the record does not have")
    return tuple(rows)


def write_arm(
    path: Path, setup: Setup, starts: Sequence[Start], rows: Sequence[Row],
    check: Callable[[Arm], None] = lambda arm: None,
) -> None:  # fmt: skip
    """Write the rows, and the record, which names them; the same bytes for the same rows.

    Nothing is written if ``check`` raises, or if the disk has no space for both. The rows appear
    first: if kill -9 leaves the old record, it still reads its own of those with one more start.
    """
    arm, packed = make_arm(path, setup, starts, rows)
    check(arm)
    record = arm.result.model_dump(mode="json")
    with host.atomic_path(path) as aside:
        host.write_json(aside, {"format": record["format"], **record})
        host.write_whole(path.with_name(arm.result.rows.file), packed)


def make_arm(
    path: Path, setup: Setup, starts: Sequence[Start], rows: Sequence[Row]
) -> tuple[Arm, bytes]:
    """A result as `write_arm` would write it to ``path``, and the packed rows."""
    packed = _pack(rows)
    digest = hashlib.sha256(packed).hexdigest()
    entry = RowsFile(file=path.with_suffix(".jsonl.gz").name, sha256=digest, count=len(rows))
    result = Result(format="bench/1", **dict(setup), starts=tuple(starts), rows=entry)
    return Arm(path, result, tuple(rows)), packed


def _pack(rows: Sequence[Row]) -> bytes:
    lines = b"".join(host.canonical(row.model_dump(mode="json")) + b"\n" for row in rows)
    return gzip.compress(lines, mtime=0)


def unpacked(content: bytes) -> bytes:
    """What a gzip file has; ValueError, zlib.error."""
    unpacker = zlib.decompressobj(wbits=31)
    text = unpacker.decompress(content, LARGEST_ROWS)
    if unpacker.unconsumed_tail or unpacker.unused_data or not unpacker.eof:
        raise ValueError(f"not one gzip member of at most {LARGEST_ROWS} bytes")
    return text


def parse_lines(content: bytes, parse: Callable[[Any], T]) -> list[T]:
    """What ``parse`` makes of each line of JSONL; ValueError names the line."""
    if (lines := content.count(b"\n")) > MOST_ROWS:
        raise ValueError(f"{lines} rows, at most {MOST_ROWS} are read")
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            if line.strip():
                rows.append(parse(host.parse_json(line)))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            detail = first_problem(error) if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"line {number}: {detail}") from None
    return rows
