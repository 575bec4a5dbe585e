"""The recorded answers of each line, records/selection/<line>.json, and their inputs."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from vllm_forge.errors import shortened
from vllm_forge.host import read_data, write_whole
from vllm_forge.kernels.errors import SelectionChangedError, SelectionFileError, SelectionStaleError
from vllm_forge.kernels.selection.questions import (
    Answer,
    Question,
    config_hash,
    grid_questions,
    inside_hash,
    line_questions,
    probe_questions,
)
from vllm_forge.patches import read_tree_lock
from vllm_forge.project import Project

COMMAND = "nox -s forge -- kernels select --record --line"
MOST_SHOWN = 40
MOST_NAMED = 5  # in one line
# A list of plain values in one line: there are many numbers.
PLAIN_LIST = re.compile(r"\[\s+([^\[\]{}]*?)\s+\]")

# Parts that many rows share are written once; a row has their index.
SHARED = ("cuda_graphs", "device", "draft", "kv_cache", "linear", "modules", "warnings")

Rows = tuple[tuple[Question, Answer], ...]
PARTS = ("rows", "published", "probes")


@dataclass(frozen=True, kw_only=True)
class SelectionRecord:
    """A line's file."""

    line_name: str
    vllm: str
    made: str
    inputs: dict[str, Any]  # name -> hash; they and the questions determine the answers
    rows: Rows  # of the line with its series
    published: Rows = ()  # of its release as published
    probes: Rows = ()  # of the line, to deployments that no preset has

    @property
    def answers(self) -> dict[str, Answer]:
        return {question.name: answer for question, answer in (*self.rows, *self.probes)}

    @property
    def published_answers(self) -> dict[str, Answer]:
        return {question.name: answer for question, answer in self.published}

    def of_device(self, name: str) -> Self:
        """The rows for one device, without those of the release as published."""
        rows = tuple(row for row in self.rows if row[0].device.name == name)
        return replace(self, rows=rows, published=(), probes=())


def selection_path(records: Path, line_name: str) -> Path:
    return records / "selection" / f"{line_name}.json"


def selection_inputs(project: Project, line_name: str) -> dict[str, Any]:
    line = project.matrix.line[line_name]
    tree = read_tree_lock(project.root / line.series, line_name)
    return {
        "lock": project.lock(line_name).digest,
        "release": tree.base,
        "series": tree.result,
        "questions": inside_hash(),
        "artifacts": {
            name: config_hash(name)
            for name, artifact in project.matrix.artifact.items()
            if artifact.unasked is None
        },
    }


def read_selection(records: Path, line_name: str) -> SelectionRecord:
    """The recorded answers of a line; SelectionFileError if missing or malformed."""
    return read_data(
        selection_path(records, line_name),
        lambda data: SelectionRecord(
            line_name=data["line"],
            **{name: data[name] for name in ("vllm", "made", "inputs")}
            | {part: _load(data[part], data["shared"]) for part in PARTS},
        ),
        SelectionFileError,
        what=f"kernel selection of line {line_name}",
        remedy=f"run: {COMMAND} {line_name}",
    )


def write_selection(records: Path, recorded: SelectionRecord) -> Path:
    """Write a line's answers; equal answers give equal bytes."""
    shared: dict[str, list[Any]] = {name: [] for name in SHARED}
    data = {
        "made": recorded.made,
        "line": recorded.line_name,
        "vllm": recorded.vllm,
        "inputs": recorded.inputs,
        **{part: [_dump(row, shared) for row in getattr(recorded, part)] for part in PARTS},
        "shared": shared,
    }
    text = json.dumps(data, indent=1, sort_keys=True)
    text = PLAIN_LIST.sub(lambda match: f"[{' '.join(match[1].split())}]", text)
    path = selection_path(records, recorded.line_name)
    write_whole(path, text + "\n")
    return path


def require_fresh(project: Project, line_name: str) -> SelectionRecord:
    """The recorded answers; SelectionStaleError if inputs or questions of the checkout differ."""
    recorded = read_selection(project.records, line_name)
    now = selection_inputs(project, line_name)
    changed = [f"input {path}" for path, *_ in differences(recorded.inputs, now)]
    for part, rows, questions in (
        ("", recorded.rows, line_questions(project.matrix, line_name)),
        (" as published", recorded.published, grid_questions(project.matrix)),
        ("", recorded.probes, probe_questions(project.matrix, line_name)),
    ):
        before = {question.name: question for question, _ in rows}
        after = {question.name: question for question in questions}
        changed += [f"question {name}{part}" for name, *_ in differences(before, after)]
    if changed:
        raise SelectionStaleError(
            f"line {line_name}: inputs changed since kernel selection was recorded on "
            f"{recorded.made}: {', '.join(shortened(changed, MOST_NAMED))}",
            where=str(selection_path(project.records, line_name)),
            remedy=f"run: {COMMAND} {line_name}   and review the changes before you commit them",
        )
    return recorded


def require_same(recorded: SelectionRecord, asked: SelectionRecord) -> None:
    """SelectionChangedError, with both values of each field, if answers are not as recorded."""
    changed = [
        f"{name}{note}: {path}\n"
        f"      {recorded.made}: {json.dumps(old, sort_keys=True)}\n"
        f"      now:        {json.dumps(new, sort_keys=True)}"
        for note, before, after in (
            ("", recorded.answers, asked.answers),
            (", as published", recorded.published_answers, asked.published_answers),
        )
        for name, answer in after.items()
        for path, old, new in differences(
            before[name].model_dump(mode="json") if name in before else "not recorded",
            answer.model_dump(mode="json"),
        )
    ]
    if changed:
        shown = "\n  ".join(shortened(changed, MOST_SHOWN))
        raise SelectionChangedError(
            f"line {recorded.line_name}: kernel selection changed since it was recorded:\n"
            f"  {shown}",
            where=f"records/selection/{recorded.line_name}.json",
            remedy=f"find the cause; if the change is right, run: {COMMAND} {recorded.line_name}",
        )


def differences(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Path, old and new value of each leaf in which two values differ, through their dicts."""
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
    """A row without fields that have their defaults."""

    def place(name: str, value: Any) -> int:
        if value not in shared[name]:
            shared[name].append(value)
        return shared[name].index(value)

    dumps = (part.model_dump(mode="json", exclude_defaults=True) for part in row)
    question, answer = (
        {k: place(k, v) if k in SHARED else v for k, v in dump.items()} for dump in dumps
    )
    del answer["name"]
    return {"question": question, "answer": answer}
