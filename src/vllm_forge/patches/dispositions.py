"""What was decided about every upstream change that users of these images are advised to apply."""

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, ValidationError, model_validator

from vllm_forge.errors import problems
from vllm_forge.host import read_data
from vllm_forge.matrix import FrozenModel
from vllm_forge.patches.errors import DispositionError

FILE = "dispositions.toml"  # beside the folders of the lines
ALL = "all"
NEEDS = {"carried": ("patch",), "retired": ("landed", "where"), "refused": ("proof",)}
# Evidence of a decision; a test checks each.
GROUNDS = ("patch", "where", "proof", "not_served", "no_preset", "undecided")


class Decision(FrozenModel):
    """About one line, or all. The head of the file says what each field means."""

    model_config = ConfigDict(str_min_length=1)

    status: Literal["carried", "retired", "refused", "not-applicable"]
    reason: str
    patch: str | None = None
    landed: str | None = None
    where: str | None = None
    proof: str | None = None
    not_served: str | None = None
    no_preset: str | None = None
    undecided: str | None = None
    skus: tuple[str, ...] = ()  # that an undecided change is about; (): all of the line

    @model_validator(mode="after")
    def _evidence(self) -> Self:
        missing = [name for name in NEEDS.get(self.status, ()) if getattr(self, name) is None]
        if missing:
            raise ValueError(f"{self.status} needs {' and '.join(missing)}")
        if all(getattr(self, name) is None for name in GROUNDS):
            raise ValueError(f"needs evidence: one of {', '.join(GROUNDS)}")
        if self.skus and self.undecided is None:
            raise ValueError("skus is for what is undecided")
        return self


class Disposition(FrozenModel):
    model_config = ConfigDict(str_min_length=1)

    about: str
    title: str
    upstream: str
    on: dict[str, Decision]


class _File(FrozenModel):
    schema_version: Literal[1]
    disposition: tuple[Disposition, ...]


def read_dispositions(folder: Path) -> tuple[Disposition, ...]:
    """Parse ``folder/dispositions.toml``; DispositionError if it is missing or invalid."""
    remedy = "its head says what an entry has"
    return read_data(folder / FILE, _entries, DispositionError, what=FILE, remedy=remedy)


def _entries(data: Any) -> tuple[Disposition, ...]:
    try:
        return _File.model_validate(data).disposition
    except ValidationError as error:
        text = "\n".join(problems(error, _File))

    def name(place: re.Match[str]) -> str:
        entry, number = data["disposition"][int(place[1])], int(place[1]) + 1
        about = entry.get("about") if isinstance(entry, dict) else None
        return about or f"disposition {number}"

    raise ValueError(re.sub(r"\bdisposition\.(\d+)", name, text))


def decisions(entries: tuple[Disposition, ...], line: str) -> tuple[tuple[str, Decision], ...]:
    """What each entry is about, and its decision for a line, else DispositionError."""
    rows = []
    for entry in entries:
        decision = entry.on.get(line) or entry.on.get(ALL)
        if decision is None:
            what = f"nothing is decided for line {line}"
            remedy = f'add [disposition.on."{line}"], or [disposition.on.{ALL}]'
            raise DispositionError(what, where=f"{FILE}: {entry.about}", remedy=remedy)
        rows.append((entry.about, decision))
    return tuple(rows)


def known_issues(
    entries: tuple[Disposition, ...], line: str, sku: str
) -> tuple[tuple[Disposition, Decision], ...]:
    """Entries that are undecided on a line, as far as they are about a SKU."""
    rows = ((entry, entry.on.get(line) or entry.on.get(ALL)) for entry in entries)
    return tuple(
        (entry, decision)
        for entry, decision in rows
        if decision and decision.undecided and (not decision.skus or sku in decision.skus)
    )
