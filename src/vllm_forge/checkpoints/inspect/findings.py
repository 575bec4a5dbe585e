"""What an inspection finds: one record per fault, by the rows of checks.toml."""

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

from vllm_forge.matrix import FrozenModel

TABLE: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_name("checks.toml").read_text(encoding="utf-8")
)
FAULTS: dict[str, dict[str, Any]] = TABLE["fault"]
ALIASES: dict[str, str] = TABLE["alias"]
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
MOST_CHARACTERS = 2000  # of a thing that was found
DRAFTS = ("mtp.", "model.mtp.")  # vLLM does not take the second, but it means the drafter


def label(check: str) -> str:
    """An id for messages, with its alias: ``missing-mtp (G01)``."""
    return f"{check} ({ALIASES[check]})" if check in ALIASES else check


class Effect(StrEnum):
    """What a fault leads to when the checkpoint is served; from bad to harmless."""

    REFUSES = "refuses"
    CORRUPTS = "corrupts"
    LOSES = "loses precision"
    DEPARTS = "departs"
    NOTES = "notes"

    @property
    def breaks(self) -> bool:
        return self in (Effect.REFUSES, Effect.CORRUPTS)


class Scope(StrEnum):
    """Which model a fault is in."""

    TARGET = "target"
    DRAFT = "draft"


class Finding(FrozenModel):
    """A row of checks.toml, and ``what`` was found of it: counts and an example."""

    check: str
    title: str
    effect: Effect
    scope: Scope = Scope.TARGET
    what: str
    remedy: str = ""
    handled_by: str = ""
    since: str = ""
    before: str = ""
    in_forward: bool = False

    @property
    def sentence(self) -> str:
        return f"{label(self.check)}: {self.title}: {self.what}"


def finding(fault: str, *found: object, **changes: Any) -> Finding:
    """A finding of a row of checks.toml, whose ``what`` has a place for each thing ``found``.

    ``changes`` replace other fields of the row.
    """
    row = FAULTS[fault]
    shown = (item[:MOST_CHARACTERS] if isinstance(item, str) else item for item in found)
    return Finding.model_validate(row | {"what": row.get("what", "{}").format(*shown)} | changes)


def by_scope(names: Iterable[str]) -> Iterator[tuple[Scope, list[str]]]:
    """Stored names by the model that they belong to; a scope without names is left out."""
    names = list(names)
    for scope, draft in ((Scope.TARGET, False), (Scope.DRAFT, True)):
        if own := [name for name in names if name.startswith(DRAFTS) is draft]:
            yield scope, own


def summarize(names: Iterable[str], most: int = 3) -> str:
    """A count and examples, for messages: ``12 tensors: layers.0.ffn.gate.bias and 11 like it``."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(NUMBER.sub("N", name), []).append(name)
    total = sum(map(len, groups.values()))
    rows = sorted(groups.values(), key=len, reverse=True)
    shown = [row[0] + (f" and {len(row) - 1} like it" if row[1:] else "") for row in rows[:most]]
    shown += ["..."] if len(rows) > most else []
    return f"{total} tensor{'s' if total != 1 else ''}: {', '.join(shown)}"


def scoped(
    fault: str, names: Iterable[str], found: Callable[[list[str]], str] = summarize, **changes: Any
) -> Iterator[Finding]:
    """A finding for each model that has some of the tensors or modules; see ``finding``."""
    for scope, own in by_scope(names):
        yield finding(fault, found(own), scope=scope, **changes)
