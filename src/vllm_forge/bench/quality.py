"""Questions of a workload, asked of a server that is up, and scored: a start of a record.

Answers are kept as they come, in a file beside the record, so a run that was ended is resumed. The
file is of one arm: one image digest, one set of conditions.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from vllm_forge.bench.client import Answer, Prompt, ask_all, read_counters
from vllm_forge.bench.errors import InvalidResultError, ResultFileError
from vllm_forge.bench.measure import add_start, difference, progress, require_same
from vllm_forge.bench.results import Row, Setup, Start, parse_lines, read_arm
from vllm_forge.bench.sandbox import require_sandbox
from vllm_forge.bench.scoring import THOUGHT, score
from vllm_forge.bench.workloads import Loaded
from vllm_forge.errors import first_problem
from vllm_forge.host import canonical, console, exclusive, hash_of, parse_json, read_plain
from vllm_forge.matrix import FrozenModel
from vllm_forge.matrix.model import Text

Key = tuple[str, int]
LARGEST_ANSWERS = 4 << 30  # bytes; 2,000 answers of 64,000 tokens have about 1 GB


class Header(FrozenModel):
    """The first line: what all answers are of."""

    format: Literal["bench-answers/1"] = "bench-answers/1"
    model: Text
    arm: Setup
    license: Text = Field(description="of the workload's data")


@dataclass
class Answers:
    """A file of answers, and what it has."""

    path: Path
    header: Header
    kept: dict[Key, Answer] = field(default_factory=dict)

    def read(self) -> None:
        """Answers of an earlier run; a line that it did not finish is removed."""
        if not os.path.lexists(self.path):
            return
        old, size = read_answers(self.path, self.header)
        if old.header != self.header:
            what = f"the answers are of another {difference(old.header, self.header)}"
            remedy = "give another --output, or what they were begun with"
            raise InvalidResultError(what, where=self.path, remedy=remedy)
        os.truncate(self.path, size)
        self.kept = old.kept


def read_answers(path: Path, begun: Header | None = None) -> tuple[Answers, int]:
    """A file of answers, and the bytes of its whole lines; ResultFileError.

    ``begun``: header of a file that was ended before its first line.
    """
    try:
        content = read_plain(path, LARGEST_ANSWERS)
        whole = content[: content.rfind(b"\n") + 1]
        first, _, rest = whole.partition(b"\n")
        header = begun if begun and not first else Header.model_validate(parse_json(first))
        rows = parse_lines(rest, Answer.model_validate)
        kept = {(row.item, row.repeat): row for row in rows}
        if len(kept) != len(rows):
            raise ValueError(f"duplicate answers: {len(rows) - len(kept)}")  # noqa: TRY301
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        detail = first_problem(error) if isinstance(error, ValueError) else str(error)
        what = "missing file of answers" if missing else f"invalid file of answers: {detail}"
        other = "another --output" if begun else "one of a session, e.g. mtp-c8.answers-0.jsonl"
        raise ResultFileError(what, where=path, remedy=f"give {other}, or restore it") from None
    return Answers(path, header, kept), len(whole)


def answers_path(record: Path, order: int) -> Path:
    """Where the answers of a start are kept."""
    return record.with_suffix(f".answers-{order}.jsonl")


def measure_quality(
    url: str, model: str, loaded: Loaded, setup_now: Callable[[], Setup], output: Path, *,
    order: int,
) -> list[Row]:  # fmt: skip
    """Ask what was not answered yet, score all answers, and add the start to the record.

    ``setup_now``: as this host has it, also asked for at the end. Raises InvalidResultError;
    SandboxError, before the first question, where code cannot be isolated.
    """
    setup, path = setup_now(), answers_path(output, order)
    _require_scorable(loaded, output, setup, order)
    answers = Answers(path, Header(model=model, license=loaded.license, arm=setup))
    with _alone(path, wait=False):
        answers.read()
        ask(url, list(loaded.prompts()), answers)
        now = setup_now()
        if now != setup:
            what = f"this host changed during the run: {difference(setup, now)}"
            remedy = "give another --output, and ask all questions of one image"
            raise InvalidResultError(what, where=path, remedy=remedy)
        return _add(loaded, answers, output, order)


def score_answers(path: Path, loaded: Loaded, output: Path) -> list[Row]:
    """Score the answers that a session kept, and add their start to a record.

    Raises ResultFileError; InvalidResultError: of other questions, or some are missing;
    SandboxError.
    """
    answers, _ = read_answers(path)
    order, setup = _order(path), answers.header.arm
    update = {**loaded.asked(), "workload": loaded.name, "prompts_sha256": loaded.digest}
    asked = setup.model_copy(update={"conditions": setup.conditions.model_copy(update=update)})
    now = Header(model=answers.header.model, license=loaded.license, arm=asked)
    if now != answers.header:
        what = f"the answers are of another {difference(answers.header, now)}"
        remedy = "give the workload and data of the session; for code, also the Python that sent it"
        raise InvalidResultError(what, where=path, remedy=remedy)
    keys = {(prompt.item, prompt.repeat) for prompt in loaded.prompts()}
    if keys != answers.kept.keys():
        what = f"missing answers: {len(keys - answers.kept.keys())} of {len(keys)}"
        raise InvalidResultError(what, where=path, remedy="run the session again")
    _require_scorable(loaded, output, setup, order)
    return _add(loaded, answers, output, order)


def _add(loaded: Loaded, answers: Answers, output: Path, order: int) -> list[Row]:
    """Score answers, and add their start to a record; the rows. InvalidResultError."""
    rows = _rows(loaded, answers)
    with _alone(output):  # another start of the record may end now, too
        old = read_arm(output).rows if output.exists() else ()
        known = {(row.key, row.seconds) for row in old}  # no two answers agree in time
        if any((row.key, row.seconds) in known for row in rows):
            what, remedy = "the record has these answers", "give each start's under its own name"
            raise InvalidResultError(what, where=answers.path, remedy=remedy)
        add_start(output, answers.header.arm, Start(order=order), rows)
    return rows


def _order(path: Path) -> int:
    """The start that the name of a file of answers says; ResultFileError."""
    if (match := re.search(r"\.answers-(0|[1-9][0-9]*)\.jsonl$", path.name)) is None:
        what, remedy = "no start is in the name of the file", "give a session's, under its own name"
        raise ResultFileError(what, where=path, remedy=remedy)
    return int(match[1])


def _alone(path: Path, *, wait: bool = True) -> AbstractContextManager[None]:
    return exclusive(f"bench-{hash_of(str(path.resolve()))[:16]}", wait=wait)


def summary(rows: Sequence[Row]) -> str:
    """Right answers by scorer, and faults by kind."""
    names = sorted({name for row in rows for name in row.scores})
    shares = [(name, sum(row.scores.get(name, False) for row in rows)) for name in names]
    faults = Counter(row.fault.partition(":")[0] for row in rows if row.fault)
    parts = [f"{name} {right} of {len(rows)}" for name, right in shares]
    return "; ".join([*parts, *(f"{count} {fault}" for fault, count in sorted(faults.items()))])


def _require_scorable(loaded: Loaded, output: Path, setup: Setup, order: int) -> None:
    """InvalidResultError: the record has that start, or another setup; SandboxError."""
    if output.exists():
        old = read_arm(output)
        require_same(old, setup)
        if order in {start.order for start in old.result.starts}:
            what, remedy = f"the record has start {order}", "give another --order or --output"
            raise InvalidResultError(what, where=output, remedy=remedy)
    if loaded.row.scorer == "code":
        require_sandbox()


def ask(url: str, prompts: Sequence[Prompt], answers: Answers) -> None:
    """Ask what is left, and keep each answer; InvalidResultError if requests failed."""
    left = [prompt for prompt in prompts if (prompt.item, prompt.repeat) not in answers.kept]
    if not left:
        return
    read_counters(url)  # a server that does not answer is an error of its own
    console.print(f"  {len(prompts) - len(left)} of {len(prompts)} answers are here", style="dim")
    advance, header = progress(len(left)), answers.header
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    answers.path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(answers.path, flags, 0o644), "ab") as file:

        def write(row: FrozenModel) -> None:
            file.write(canonical(row.model_dump(mode="json")) + b"\n")
            file.flush()

        def keep(answer: Answer) -> None:
            if answer.finish != "error":
                answers.kept[answer.item, answer.repeat] = answer
                write(answer)
            advance(answer)

        if os.fstat(file.fileno()).st_size == 0:
            write(header)
        _, asked = ask_all(url, header.model, left, header.arm.conditions, keep)
    if failed := [answer.text for answer in asked if answer.finish == "error"]:
        remedy = f"see the server's log, and run this again: {answers.path} has the others"
        what = f"{len(failed)} failed requests: {failed[0]}"
        raise InvalidResultError(what, where=url, remedy=remedy)


def _rows(loaded: Loaded, answers: Answers) -> list[Row]:
    """A row for each answer, in the order of the items."""
    kept = answers.kept
    thought = any(row.reasoning or THOUGHT in row.text for row in kept.values())
    if thought != loaded.row.thinking:
        what = f"the workload's thinking is {loaded.row.thinking}, but the answers say {thought}"
        remedy = "serve with a chat template that has a switch for thinking"
        raise InvalidResultError(what, where=answers.path, remedy=remedy)
    items = {item.name: item for item in loaded.items}
    advance = progress(len(kept), "answers")
    rows = []
    for prompt in loaded.prompts():
        row, item = kept[prompt.item, prompt.repeat], items[prompt.item]
        found = score(loaded.row, item, row.finish, row.text)
        scores = {"strict": found.strict, "flexible": found.flexible}
        digest = hashlib.sha256(canonical([row.reasoning, row.text])).hexdigest()
        rows.append(
            row.row(family=item.family, scores=scores, fault=found.fault, answer_sha256=digest)
        )
        advance(row)
    return rows
