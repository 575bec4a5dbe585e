"""Workloads: rows of workloads.toml or of a user's file, with their data, as items to ask."""

import hashlib
import importlib.metadata
import json
import platform
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, TypeAdapter, model_validator

from vllm_forge.bench.client import Prompt
from vllm_forge.bench.errors import EXTRA, LibraryMissingError, WorkloadFileError
from vllm_forge.bench.measure import read_lines
from vllm_forge.bench.results import Drafts, Hash, parse_lines, unpacked
from vllm_forge.errors import UsageError
from vllm_forge.host import hash_of, printable, read_data, suggestion
from vllm_forge.matrix import FrozenModel
from vllm_forge.matrix.model import Name, Text

ROWS = Path(__file__).with_name("workloads.toml")
NUMBER = re.compile(r"\s*[-+]?[\d,.]+(/\d+)?\s*")
MOST_DRAFTED = 8  # tokens; for which synthetic acceptance is predicted


class Package(FrozenModel):
    """A Python package that ships the data."""

    name: Name
    file: Text
    license: Text


class Keys(FrozenModel):
    """What the data calls each part of an item; ``item``: default, its number."""

    prompt: Text
    item: Text = ""
    answer: Text = ""
    test: Text = ""
    entry: Text = ""
    family: Text = ""


class RandomPrompts(FrozenModel):
    """Token ids, uniform in ``vocabulary``; ``acceptance_length``: tokens of each step."""

    items: int = Field(gt=0)
    tokens: int = Field(gt=0)
    vocabulary: tuple[int, int]
    seed: int
    acceptance_length: int = Field(ge=1, le=MOST_DRAFTED + 1)


class Workload(FrozenModel):
    """A row. ``form``: pattern of a number in the right form; its first group is the number."""

    scorer: Literal["code", "number", "exact", "none"]
    package: Package | None = None
    sha256: Hash | None = Field(default=None, description="of the data")
    random: RandomPrompts | None = None
    keys: Keys | None = None
    template: str = Field(default="{prompt}", description="the user's message; {prompt} of an item")
    form: str = ""
    thinking: bool
    temperature: float = Field(ge=0)
    top_p: float = Field(gt=0, le=1)
    max_tokens: int = Field(gt=0)
    repeats: int = Field(gt=0)

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        needs = {"code": ("test", "entry"), "number": ("answer",), "exact": ("answer",), "none": ()}
        if (self.keys is None) == (self.random is None):
            raise ValueError("expected either keys or random")
        if missing := [key for key in needs[self.scorer] if not getattr(self.keys, key)]:
            raise ValueError(f"scorer {self.scorer} needs keys.{missing[0]}")
        try:
            groups = re.compile(self.form).groups
        except re.error as error:
            raise ValueError(f"invalid form: {error}") from None
        if not bool(self.form) == (self.scorer == "number") == groups:
            raise ValueError("expected a form with one group for the scorer number, and no other")
        if self.repeats > 1 and self.temperature == 0:
            raise ValueError("repeats need a temperature")
        self.template.format(prompt="")
        return self


@dataclass(frozen=True)
class Item:
    """A question; ``answer``, ``test`` and ``entry``: what its scorer needs."""

    name: str
    prompt: str
    family: str = ""
    answer: str = ""
    test: str = ""
    entry: str = ""


@dataclass(frozen=True)
class Source:
    """Data that a user brings: its path, the hash that it must have, and its license."""

    path: Path
    sha256: str
    license: str


@dataclass(frozen=True)
class Loaded:
    """A workload with its items; ``digest``: of all that must be equal in arms."""

    name: str
    row: Workload
    items: tuple[Item, ...]
    license: str
    digest: str

    def asked(self) -> dict[str, Any]:
        """Conditions of a record; a server is asked once or often."""
        names = ("thinking", "temperature", "top_p", "max_tokens")
        return {**{name: getattr(self.row, name) for name in names}, "prefix_cache": True}

    def prompts(self) -> Iterator[Prompt]:
        """Each item as a chat, once for each repeat."""
        for repeat in range(self.row.repeats):
            for item in self.items:
                text = self.row.template.strip("\n").format(prompt=item.prompt)
                yield Prompt(item.name, [{"role": "user", "content": text}], repeat=repeat)


def read_workloads(path: Path = ROWS) -> dict[str, Workload]:
    """All rows of a file; WorkloadFileError."""
    return read_data(
        path, TypeAdapter(dict[str, Workload]).validate_python, WorkloadFileError,
        what="workloads", remedy=f"write it as the rows of {ROWS} are",
    )  # fmt: skip


def load(name: str, brought: Source | None = None, path: Path = ROWS) -> Loaded:
    """A workload by its name; UsageError, WorkloadFileError."""
    rows = read_workloads(path)
    if name not in rows:
        what = f"unknown workload {name!r}{suggestion(name, rows)}"
        raise UsageError(what, where=path, remedy="give another --workload")
    row = rows[name]
    if row.random is not None:
        return Loaded(name, row, (), "none", hash_of(row.model_dump(), sort_keys=True))
    source = _source(name, row, brought)

    def parse(content: bytes) -> tuple[Item, ...]:
        if (digest := hashlib.sha256(content).hexdigest()) != source.sha256:
            raise ValueError(f"the data's SHA-256 is {digest}, expected {source.sha256}")
        data = unpacked(content) if source.path.suffix == ".gz" else content
        rows = enumerate(parse_lines(data, lambda line: _item(row, line)), 1)
        items = tuple(item if item.name else replace(item, name=f"{n}") for n, item in rows)
        if len({item.name for item in items}) < len(items):
            raise ValueError("two items have one name")
        if not items:
            raise ValueError("it is empty")
        return items

    keys = row.keys or Keys(prompt="")
    names = ", ".join(filter(None, keys.model_dump().values()))
    remedy = f"bring the data that the hash is of, JSONL with {names} in each line"
    items = read_lines(source.path, parse, what=f"data of workload {name}", remedy=remedy)
    parts = {"row": row.model_dump(), "data": source.sha256}
    if row.scorer == "code":
        parts["python"] = platform.python_version()  # which the programs are run by
    return Loaded(name, row, items, source.license, hash_of(parts, sort_keys=True))


def random_prompts(row: Workload) -> Iterator[dict[str, Any]]:
    """Prompts as lines of a file, with the drafts that the synthetic acceptance predicts."""
    assert row.random is not None  # noqa: S101
    length = row.random.acceptance_length
    drafts = -(-(row.max_tokens - 1) // length)  # the first token comes without a draft
    predicted = {
        k: Drafts(
            drafts=drafts, per_position=(drafts,) * (length - 1) + (0,) * (k - length + 1)
        ).model_dump()
        for k in range(max(1, length - 1), MOST_DRAFTED + 1)
    }
    source = random.Random(row.random.seed)  # noqa: S311 - not a secret
    low, high = row.random.vocabulary
    for number in range(row.random.items):
        ids = [source.randrange(low, high) for _ in range(row.random.tokens)]
        yield {"item": f"random-{number}", "prompt": ids, "predicted": predicted}


def lines(loaded: Loaded, *, repeats: bool = False) -> bytes:
    """The prompts as JSONL: each once, for `bench serve`; with ``repeats``, for sessions."""
    rows: Iterator[dict[str, Any]] = (
        {"item": prompt.item, "messages": prompt.content, "repeat": prompt.repeat}
        for prompt in loaded.prompts()
        if repeats or prompt.repeat == 0
    )
    if loaded.row.random is not None:
        rows = random_prompts(loaded.row)
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _source(name: str, row: Workload, source: Source | None) -> Source:
    """Of a package, or what the user brings; WorkloadFileError."""
    if source is not None:
        if row.sha256 not in (None, source.sha256):
            what = f"--sha256 is not that of workload {name}: {row.sha256}"
            raise WorkloadFileError(what, where=source.path, remedy="bring the data that it names")
        return source
    if (package := row.package) is None or row.sha256 is None:
        what = f"workload {name} ships without data"
        remedy = "bring it: --data FILE.jsonl --sha256 HASH --license NAME"
        raise WorkloadFileError(what, remedy=remedy)
    try:
        distribution = importlib.metadata.distribution(package.name)
    except importlib.metadata.PackageNotFoundError:
        what = f"missing {package.name}, which ships the data"
        raise LibraryMissingError(what, remedy=EXTRA) from None
    path = Path(str(distribution.locate_file(package.file)))
    return Source(path, row.sha256, package.license)


def exact_number(text: str) -> Fraction | None:
    """None if it is not a number, or has thousands of digits."""
    try:
        return Fraction(text.replace(",", "")) if NUMBER.fullmatch(text) else None
    except (ValueError, ZeroDivisionError):
        return None


def expected_number(row: Workload, answer: str) -> Fraction:
    """Of an item's answer, which may be in the form; ValueError."""
    text = (re.findall(row.form, answer) or [answer])[-1]
    if (value := exact_number(text)) is None:
        raise ValueError(f"the answer is not a number: {printable(text[:40])}")
    return value


def _item(row: Workload, line: dict[str, Any]) -> Item:
    keys = row.keys or Keys(prompt="")
    parts = {part: line[key] for part, key in keys.model_dump().items() if key}
    name = printable(str(parts.pop("item", "")))
    parts = {part: str(value) if isinstance(value, int) else value for part, value in parts.items()}
    if "\n" in name:
        raise ValueError("item is not one line")
    if wrong := [part for part, value in parts.items() if not isinstance(value, str)]:
        raise ValueError(f"{wrong[0]} is not a text")
    if row.scorer == "number":
        expected_number(row, parts["answer"])
    return Item(name, **parts)
