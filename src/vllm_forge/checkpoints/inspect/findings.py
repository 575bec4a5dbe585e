"""What an inspection finds: one record per fault, with what it does to whom, and why.

``gate`` is a fault's number in the family's own lists (docs/operate/checkpoints.md has the table).
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Effect(StrEnum):
    """What follows for who serves it; from bad to harmless."""

    REFUSES = "refuses"  # vLLM stops with an error
    CORRUPTS = "corrupts"  # it loads, and computes something else
    LOSES = "loses precision"
    DEPARTS = "departs"  # not what its manifest says
    NOTES = "notes"

    @property
    def breaks(self) -> bool:
        """It does not serve."""
        return self in (Effect.REFUSES, Effect.CORRUPTS)


class Scope(StrEnum):
    """Which model the fault is in."""

    TARGET = "target"
    DRAFT = "draft"


class Finding(BaseModel):
    """One fault.

    Attributes:
        gate: its number, e.g. G05.
        title: the same in a few words, always equal for one gate.
        effect: on lines without a remedy of their own.
        scope: which model.
        what: what was found, with counts and one example.
        remedy: for who makes the checkpoint.
        handled_by: upstream change (as dispositions.toml names it) with which a vLLM copes; where
            a line carries it or its release has it, the finding is a note there.
        before, since: vLLM versions that bound where it bites; "" is no bound.
        in_forward: it shows in the first forward pass, so vLLM's silence in a dry load says nothing
            about it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gate: str
    title: str
    effect: Effect
    scope: Scope = Scope.TARGET
    what: str
    remedy: str = ""
    handled_by: str = ""
    since: str = ""
    before: str = ""
    in_forward: bool = False


DRAFTS = ("mtp.", "model.mtp.")  # vLLM takes the second for nothing, but it means the drafter


def by_scope(names: Iterable[str]) -> Iterator[tuple[Scope, list[str]]]:
    """Stored names by the model that they belong to; a scope without names is left out."""
    names = list(names)
    for scope in Scope:
        found = [name for name in names if name.startswith(DRAFTS) == (scope is Scope.DRAFT)]
        if found:
            yield scope, found


def some(names: Iterable[str], most: int = 3) -> str:
    """A count and examples, for messages: ``12 tensors: layers.N.ffn.gate.bias (x 11), ...``."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(NUMBER.sub("N", name), []).append(name)
    total = sum(map(len, groups.values()))
    rows = sorted(groups.values(), key=len, reverse=True)
    said = [row[0] + (f" and {len(row) - 1} like it" if row[1:] else "") for row in rows[:most]]
    if len(rows) > most:
        said.append("...")
    return f"{total} tensor{'s' if total != 1 else ''}: {', '.join(said)}"
