"""One start of a server, measured: warm-up, window, counters, caches, the client's headroom."""

import hashlib
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from vllm_forge.bench.client import Answer, Prompt, ask_all, read_counters
from vllm_forge.bench.errors import InvalidResultError, WorkloadFileError
from vllm_forge.bench.hardware import gpu_states
from vllm_forge.bench.results import (
    LARGEST_ROWS,
    Arm,
    Conditions,
    Count,
    Drafts,
    Row,
    Setup,
    Start,
    Window,
    parse_lines,
    read_arm,
    write_arm,
)
from vllm_forge.bench.validity import require_valid
from vllm_forge.host import Probe, console, printable, read_plain
from vllm_forge.host.console import PROGRESS_S
from vllm_forge.matrix import FrozenModel, flags
from vllm_forge.matrix.model import Text

T = TypeVar("T")
TokenId = Annotated[int, Field(ge=0, lt=1 << 31, strict=True)]
SELF_TEST = 4  # requests for each slot, in the test of the client


class Message(FrozenModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str


class PromptRow(FrozenModel):
    """A line of a workload."""

    item: Text = Field(min_length=1)
    prompt: str | list[TokenId] = ""
    messages: tuple[Message, ...] = ()
    predicted: dict[int, Drafts] = Field(default_factory=dict)
    repeat: Count = 0

    @model_validator(mode="after")
    def _asks_once(self) -> Self:
        if bool(self.prompt) == bool(self.messages):
            raise ValueError("expected either a prompt or messages, and not empty")
        return self


def read_lines(path: Path, parse: Callable[[bytes], T], *, what: str, remedy: str) -> T:
    """What ``parse`` makes of a file of JSONL; WorkloadFileError."""
    try:
        return parse(read_plain(path, LARGEST_ROWS))
    except (OSError, ValueError, zlib.error) as error:
        problem = "file not found" if isinstance(error, FileNotFoundError) else str(error)
        raise WorkloadFileError(f"invalid {what}: {problem}", where=path, remedy=remedy) from None


def read_workload(path: Path) -> tuple[list[Prompt], str]:
    """Prompts of JSONL (``item``, and ``prompt`` or ``messages``), and the file's hash."""

    def parse(content: bytes) -> tuple[list[Prompt], str]:
        prompts = parse_lines(content, _prompt)
        if len({(row.item, row.repeat) for row in prompts}) < len(prompts):
            raise ValueError("two rows have one item")
        if not prompts:
            raise ValueError("it is empty")
        return prompts, hashlib.sha256(content).hexdigest()

    remedy = (
        'give JSONL with "item" and "prompt" (TEXT or [TOKEN ID, ...]) or "messages" in each line'
    )
    return read_lines(path, parse, what="workload", remedy=remedy)


def _prompt(line: Any) -> Prompt:
    row = PromptRow.model_validate(line)
    chat = [message.model_dump() for message in row.messages]
    return Prompt(printable(row.item), row.prompt or chat, row.predicted, row.repeat)


def _predicted(prompts: Sequence[Prompt], argv: Sequence[str]) -> Drafts | None:
    """The sum over prompts, for as many drafted tokens as the server's arguments say."""
    _, k = flags.speculation(argv)
    rows = [prompt.predicted.get(k) for prompt in prompts]
    known = [row for row in rows if row is not None]
    if not known or len(known) < len(rows):
        return None
    places = zip(*(row.per_position for row in known), strict=True)
    return Drafts(drafts=sum(row.drafts for row in known), per_position=tuple(map(sum, places)))


def read_answers(path: Path, items: Collection[str]) -> list[Row]:
    """Scored answers of another harness, JSONL of `Row`; WorkloadFileError if items are unknown."""

    def parse(content: bytes) -> list[Row]:
        rows = parse_lines(content, Row.model_validate)
        if unknown := sorted({row.item for row in rows} - set(items)):
            raise ValueError(f"items that the workload lacks: {unknown[:3]}")
        if not rows or any(row.start for row in rows):
            raise ValueError("expected start 0")
        return rows

    keys = "start, item, finish, output_tokens, seconds, scores"  # of no other tool
    remedy = f"convert it to JSONL with {keys} in each line: docs/operate/bench.md"
    return read_lines(path, parse, what="answers", remedy=remedy)


def client_rate(conditions: Conditions, prompts: Sequence[Prompt]) -> float:
    """Tokens a second of this client against a server that answers at once."""
    argv = [sys.executable, "-m", "vllm_forge.bench.null_server"]  # ends with its standard input
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        port = process.stdout.readline().strip() if process.stdout else ""
        some = prompts[: SELF_TEST * conditions.concurrency]
        seconds, answers = ask_all(f"http://127.0.0.1:{port}", "null", some, conditions)
    return sum(answer.tokens for answer in answers) / seconds


def measure(
    url: str, model: str, setup: Setup, prompts: Sequence[Prompt], *, warm: int, order: int,
    caches: Sequence[Path], probe: Probe,
) -> tuple[Start, list[Row]]:  # fmt: skip
    """Warm up with the first ``warm`` prompts, which are not measured, then ask the others.

    A prompt that is both warmed up and measured would hit the prefix cache.
    """
    conditions = setup.conditions
    ask_all(url, model, prompts[:warm], conditions)
    measured, gpus = prompts[warm:], gpu_states(probe)
    files, before = _files(caches), read_counters(url)
    seconds, answers = ask_all(url, model, measured, conditions, progress(len(measured)))
    gpus_after, tokens = gpu_states(probe), sum(answer.tokens for answer in answers)
    after = read_counters(url, before.tokens, tokens)
    window = Window(
        seconds=seconds, before=before, after=after, gpus_before=gpus, gpus_after=gpus_after,
        new_files=tuple(printable(name) for name in sorted(_files(caches) - files)),
        headroom=client_rate(conditions, measured) * seconds / tokens if tokens else 0.0,
        predicted=_predicted(measured, setup.server.argv),
    )  # fmt: skip
    return Start(order=order, window=window), [_row(answer, window) for answer in answers]


def add_start(path: Path, setup: Setup, start: Start, rows: Sequence[Row]) -> None:
    """Add a start to a record, or make it; InvalidResultError, and nothing written, for faults."""
    starts, kept = [start], list(rows)
    if path.exists():
        old = read_arm(path)
        require_same(old, setup)
        number = len(old.result.starts)
        starts = [*old.result.starts, start]
        kept = [*old.rows, *(row.model_copy(update={"start": number}) for row in rows)]
    write_arm(path, setup, starts, kept, check=require_valid)


def require_same(old: Arm, setup: Setup) -> None:
    """InvalidResultError unless a record is of the same setup."""
    known = Setup.model_validate({name: getattr(old.result, name) for name, _ in setup})
    if known != setup:
        what = f"the record is of another {difference(known, setup)}"
        remedy = "measure all starts of a record alike, or give another --output"
        raise InvalidResultError(what, where=old.path, remedy=remedy)


def difference(old: FrozenModel, new: FrozenModel, place: str = "") -> str:
    """The first part that differs, with both values."""
    rows = zip(old, new, strict=True)
    name, before, now = next((*one, other) for one, (_, other) in rows if one[1] != other)
    if isinstance(before, FrozenModel):
        return difference(before, now, "" if name == "arm" else f"{name}.")
    return f"{place}{name}: {before!r}, now {now!r}"


def _row(answer: Answer, window: Window) -> Row:
    drafts = window.change["drafts"]
    depth = window.change["draft_tokens"] // drafts if drafts > 0 else 0
    steps = answer.chunks[1:]  # the first token is the prompt's
    accepted = answer.tokens - len(answer.chunks) if depth else 0
    return answer.row(
        # A chunk of several steps has more tokens than its drafts: validity compares the counters.
        drafted=max(depth * len(steps), accepted),
        accepted=accepted,
        positions=tuple(sum(size > place + 1 for size in steps) for place in range(depth)),
    )


def count_compiled(caches: Sequence[Path]) -> int:
    """Files of JIT compilers; those beside the compilers' folders are of others."""
    names = _files(caches)
    return sum(Path(name).parent not in caches for name in names)


def _files(folders: Sequence[Path]) -> set[str]:
    """Without those of a folder that disappears meanwhile."""
    places = (place for folder in folders for place in os.walk(folder))
    return {os.path.join(place, name) for place, _, names in places for name in names}  # noqa: PTH118


def progress(total: int, unit: str = "requests") -> Callable[[object], None]:
    """A function to call after each: it shows what is done, and the time left, now and then."""
    begin = shown = time.monotonic()
    done = 0

    def advance(_: object) -> None:
        nonlocal shown, done
        done += 1
        now = time.monotonic()
        if now - shown >= PROGRESS_S:
            shown = now
            left = (total - done) * (now - begin) / done
            console.print(f"  {done} of {total} {unit}, {left:.0f} s left", style="dim")

    return advance
