"""The committed answers of each line, ``records/selection/<line>.json``, and what they are of."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from vllm_forge.host import atomic_path
from vllm_forge.kernels.errors import (
    SelectionChangedError,
    SelectionFileError,
    SelectionStaleError,
)
from vllm_forge.kernels.selection.artifacts import config_hash
from vllm_forge.kernels.selection.model import Answer, Question
from vllm_forge.kernels.selection.mount import inside_hash
from vllm_forge.kernels.selection.questions import line_questions, published_questions
from vllm_forge.patches import read_tree_lock
from vllm_forge.sources import read_lock

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from vllm_forge.matrix import Matrix

FOLDER = Path("records/selection")
COMMAND = "nox -s forge -- kernels select --record --line"
MOST_SHOWN = 40
# A list of plain values in one line: there are many numbers.
PLAIN_LIST = re.compile(r"\[\s+([^\[\]{}]*?)\s+\]")

# Parts that many rows have in common are written once; a row has their place in the list.
SHARED = ("cuda_graphs", "device", "draft", "kv_cache", "linear", "modules", "warnings")

Rows = tuple[tuple[Question, Answer], ...]


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A line's file.

    Attributes:
        made: day, YYYY-MM-DD.
        inputs: name -> hash of what the answers are a function of, beside the questions.
        rows: of the line with its series.
        published: of its release as published.
    """

    line_name: str
    vllm: str
    made: str
    inputs: dict[str, Any]
    rows: Rows
    published: Rows = field(default=())

    @property
    def answers(self) -> dict[str, Answer]:
        """Question's name -> answer of the line with its series."""
        return {question.name: answer for question, answer in self.rows}

    @property
    def published_answers(self) -> dict[str, Answer]:
        """Question's name -> answer of the release as published."""
        return {question.name: answer for question, answer in self.published}

    @property
    def questions(self) -> tuple[Question, ...]:
        """What the line with its series was asked."""
        return tuple(question for question, _ in self.rows)

    def of_device(self, name: str) -> Recorded:
        """Only what was asked for one device: what an image of one SKU can be asked."""
        rows = tuple((q, a) for q, a in self.rows if q.device.name == name)
        return Recorded(
            line_name=self.line_name, vllm=self.vllm, made=self.made, inputs=self.inputs, rows=rows
        )


def path_of(root: Path, line_name: str) -> Path:
    """Where a line's answers are committed."""
    return root / FOLDER / f"{line_name}.json"


def inputs_of(root: Path, matrix: Matrix, line_name: str) -> dict[str, Any]:
    """Hashes of what the answers are a function of.

    Raises:
        LockFileError, ArtifactConfigError.
    """
    line = matrix.line[line_name]
    tree = read_tree_lock(root / line.series, line_name)
    return {
        "lock": read_lock(root, line_name, line, matrix.base).digest,
        "release": tree.base,
        "series": tree.result,
        "questions": inside_hash(),
        "artifacts": {name: config_hash(name) for name in matrix.artifact},
    }


def read_recorded(root: Path, line_name: str) -> Recorded:
    """The committed answers of a line.

    Raises:
        SelectionFileError: missing or malformed.
    """
    path = path_of(root, line_name)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Recorded(
            line_name=data["line"],
            vllm=data["vllm"],
            made=data["made"],
            inputs=data["inputs"],
            rows=_load(data["rows"], data["shared"]),
            published=_load(data["published"], data["shared"]),
        )
    except FileNotFoundError:
        problem = "nothing was recorded of what this line selects"
    except (ValueError, LookupError, TypeError, ValidationError) as error:
        problem = f"not a line's answers: {error!r}"
    raise SelectionFileError(problem, where=str(path), remedy=f"run: {COMMAND} {line_name}")


def write_recorded(root: Path, recorded: Recorded) -> Path:
    """Write a line's answers; equal ones give equal bytes."""
    shared: dict[str, list[Any]] = {name: [] for name in SHARED}
    data = {
        "command": f"{COMMAND} {recorded.line_name}",
        "made": recorded.made,
        "line": recorded.line_name,
        "vllm": recorded.vllm,
        "inputs": recorded.inputs,
        "rows": [_dump(row, shared) for row in recorded.rows],
        "published": [_dump(row, shared) for row in recorded.published],
        "shared": shared,
    }
    text = json.dumps(data, indent=1, sort_keys=True)
    text = PLAIN_LIST.sub(lambda match: f"[{' '.join(match[1].split())}]", text)
    path = path_of(root, recorded.line_name)
    with atomic_path(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")
    return path


def require_fresh(root: Path, matrix: Matrix, line_name: str) -> Recorded:
    """The committed answers, if they are of the inputs and questions of today.

    Raises:
        SelectionFileError: missing or malformed.
        SelectionStaleError: with what changed and the command that asks again.
    """
    recorded = read_recorded(root, line_name)
    now = inputs_of(root, matrix, line_name)
    changed = [f"input {path}" for path, *_ in differences(recorded.inputs, now)]
    for part, rows, questions in (
        ("", recorded.rows, line_questions(matrix, line_name)),
        (" as published", recorded.published, published_questions(matrix)),
    ):
        before = {question.name: question for question, _ in rows}
        after = {question.name: question for question in questions}
        changed += [
            f"question {name}{part}"
            for name in {**before, **after}
            if before.get(name) != after.get(name)
        ]
    if changed:
        raise SelectionStaleError(
            f"line {line_name}: the answers of {recorded.made} are of other inputs: "
            + _some(changed, ", "),
            where=str(path_of(root, line_name)),
            remedy=f"run: {COMMAND} {line_name}   and look at what changed before you commit it",
        )
    return recorded


def require_same(recorded: Recorded, answers: Sequence[Answer], *, published: bool = False) -> None:
    """Raise when an answer is not the recorded one.

    Raises:
        SelectionChangedError: with both values of each field that differs.
    """
    before = recorded.published_answers if published else recorded.answers
    changed = []
    for answer in answers:
        old = before.get(answer.name)
        if old is None:
            changed.append(f"{answer.name}: not recorded")
            continue
        changed += [
            f"{answer.name}: {path}\n"
            f"      {recorded.made}: {_value(old_value)}\n"
            f"      now:        {_value(new_value)}"
            for path, old_value, new_value in differences(
                old.model_dump(mode="json"), answer.model_dump(mode="json")
            )
        ]
    if changed:
        what = f"vLLM {recorded.vllm} as published" if published else f"line {recorded.line_name}"
        raise SelectionChangedError(
            f"{what} selects otherwise than recorded:\n  " + _some(changed, "\n  "),
            where=str(FOLDER / f"{recorded.line_name}.json"),
            remedy=f"find out why; if it must be so, run: {COMMAND} {recorded.line_name}",
        )


def differences(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Path, old and new value of each leaf in which two JSON values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            yield from differences(before.get(key), after.get(key), f"{path}.{key}".lstrip("."))
    elif before != after:
        yield path, before, after


def _load(data: Sequence[Mapping[str, Any]], shared: Mapping[str, Sequence[Any]]) -> Rows:
    def full(part: Mapping[str, Any]) -> dict[str, Any]:
        return {k: shared[k][value] if k in SHARED else value for k, value in part.items()}

    return tuple(
        (
            Question.model_validate(full(row["question"])),
            Answer.model_validate({"name": row["question"]["name"]} | full(row["answer"])),
        )
        for row in data
    )


def _dump(row: tuple[Question, Answer], shared: Mapping[str, list[Any]]) -> dict[str, Any]:
    """A row without what has its default."""

    def place(name: str, value: Any) -> int:
        if value not in shared[name]:
            shared[name].append(value)
        return shared[name].index(value)

    question, answer = (part.model_dump(mode="json", exclude_defaults=True) for part in row)
    del answer["name"]
    return {
        "question": {k: place(k, v) if k in SHARED else v for k, v in question.items()},
        "answer": {k: place(k, v) if k in SHARED else v for k, v in answer.items()},
    }


def _value(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _some(items: Sequence[str], separator: str) -> str:
    more = len(items) - MOST_SHOWN
    shown = [*items[:MOST_SHOWN], *([f"and {more} more"] if more > 0 else [])]
    return separator.join(shown)
