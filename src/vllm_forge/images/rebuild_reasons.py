"""Why a build would do something: inputs that differ from the record of the last build."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_forge.images.errors import BuildRecordError
from vllm_forge.images.plan import hashes

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_forge.images.plan import ImagePlan

SHORT = 12
HEX = set("0123456789abcdef")


@dataclass(frozen=True, kw_only=True)
class Change:
    """An input that differs from the record's, and a sentence per part that changed."""

    name: str
    parts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Reason:
    """What a build of a plan would do, and why.

    ``state`` is ``never built``, ``nothing changed``, ``inputs changed`` or ``damaged``: equal
    inputs, but the image differs from the record, or one of its files was touched.
    """

    state: str
    changes: tuple[Change, ...] = ()


def why_rebuild(plan: ImagePlan) -> Reason:
    """Compare a plan with the record of the last build."""
    record = read_record(plan.record_path)
    if record is None:
        return Reason(state="never built")
    inputs = plan.inputs()
    changes = compare(record["inputs"], hashes(inputs), record.get("details", {}), inputs)
    if changes:
        return Reason(state="inputs changed", changes=changes)
    return Reason(state="nothing changed" if plan.up_to_date() else "damaged")


def read_record(path: Path) -> dict[str, Any] | None:
    """The record that a build left; None where there is none.

    Raises:
        BuildRecordError: the file is not a record of a build.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        record, problem = None, str(error)
    else:
        problem = "it has no table of inputs"
    if isinstance(record, dict) and isinstance(record.get("inputs"), dict):
        return record
    raise BuildRecordError(
        f"not the record of a build: {problem}",
        where=str(path),
        remedy="delete it; the next build writes it again",
    )


def recorded_engine(record: dict[str, Any] | None) -> str | None:
    """The engine that made the system of a recorded build, where it is known."""
    base = ((record or {}).get("stack") or {}).get("base") or {}
    name = base.get("engine")
    return name if isinstance(name, str) else None


def compare(
    old: dict[str, str],
    new: dict[str, str],
    old_details: dict[str, dict[str, Any]],
    new_details: dict[str, dict[str, Any]],
) -> tuple[Change, ...]:
    """Inputs whose hash changed, in the order of a build.

    ``old`` and ``new``: input -> hash, of the record and now. The details: input -> its parts;
    records of older builds have none.
    """
    changes = []
    for name in dict.fromkeys([*new, *old]):
        if old.get(name) != new.get(name):
            parts: tuple[str, ...] = ("the record does not have its parts",)
            if name in old_details:
                parts = differences(old_details[name], new_details.get(name, {}))
            changes.append(Change(name=name, parts=parts))
    return tuple(changes)


def differences(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, ...]:
    """A sentence per part that was added, removed or changed."""
    added = [f"added {name}: {_show(new[name])}" for name in new if name not in old]
    removed = [f"removed {name}: {_show(old[name])}" for name in old if name not in new]
    changed = [
        f"changed {name}: {_show(old[name])} -> {_show(new[name])}"
        for name in new
        if name in old and old[name] != new[name]
    ]
    return (*added, *removed, *changed) or ("order or form only",)


def _show(value: Any) -> str:
    """A value with its hashes cut to 12 digits."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return " ".join(
        word[:SHORT] if len(word) > SHORT and set(word) <= HEX else word for word in text.split(" ")
    )
