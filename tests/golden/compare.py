"""Golden files: how they are written, and how two of them differ in few lines."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SHOWN = 12  # differences
WIDTH = 160  # characters of a value
DEPTH = 2  # levels with a line for each key
TRIAL = re.compile(r"\bvllm-forge-[0-9a-f]{12}\b")
CHECKS = re.compile(r" /mnt/\w+\.py\b")
SECRET = re.compile(r"(--secret=id=\w+,src=)[^ ]+")


def normalise(value: Any, places: Mapping[str, str]) -> Any:
    """``value`` without names that move: folders, containers of this run, the script of checks."""
    if isinstance(value, dict):
        return {normalise(k, places): normalise(v, places) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [normalise(item, places) for item in value]
    if not isinstance(value, str):
        return value
    for folder, name in places.items():
        value = value.replace(folder, name)
    value = CHECKS.sub(" /mnt/<checks>.py", TRIAL.sub("vllm-forge-<run>", value))
    return SECRET.sub(r"\1<host>", value)


def digest(value: Any) -> str:
    """A long value in short: equal values have equal ones."""
    text = json.dumps(value, sort_keys=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]


def dump(value: Any, depth: int = DEPTH, indent: int = 0) -> str:
    """JSON with sorted keys, indented down to ``depth``."""
    if depth == 0 or not isinstance(value, (dict, list)) or not value:
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    pad = " " * (indent + 1)
    if isinstance(value, list):
        rows = [pad + dump(item, depth - 1, indent + 1) for item in value]
        return "[\n" + ",\n".join(rows) + "\n" + " " * indent + "]"
    rows = [
        f"{pad}{json.dumps(key)}: {dump(value[key], depth - 1, indent + 1)}"
        for key in sorted(value)
    ]
    return "{\n" + ",\n".join(rows) + "\n" + " " * indent + "}"


def differences(golden: Any, now: Any, path: str = "") -> Iterator[str]:
    """A line for each place where they differ."""
    if isinstance(golden, dict) and isinstance(now, dict):
        for key in sorted(golden.keys() | now.keys()):
            place = f"{path} / {key}" if path else key
            if key not in now:
                yield f"{place}: gone, was {_short(golden[key])}"
            elif key not in golden:
                yield f"{place}: new, {_short(now[key])}"
            else:
                yield from differences(golden[key], now[key], place)
    elif isinstance(golden, list) and isinstance(now, list) and len(golden) == len(now):
        for place, (before, after) in enumerate(zip(golden, now, strict=True)):
            yield from differences(before, after, f"{path}[{place}]")
    elif isinstance(golden, list) and isinstance(now, list):
        gone = [item for item in golden if item not in now]
        added = [item for item in now if item not in golden]
        yield f"{path}: {len(golden)} -> {len(now)} items; gone {_short(gone)}; new {_short(added)}"
    elif isinstance(golden, str) and isinstance(now, str) and golden != now:
        yield f"{path}: {_changed_words(golden, now)}"
    elif golden != now:
        yield f"{path}: {_short(golden)} -> {_short(now)}"


def summary(golden: Any, now: Any) -> str:
    """The first differences, one a line; empty without one."""
    lines = list(differences(golden, now))
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([*lines[:SHOWN], *more])


def _changed_words(before: str, after: str) -> str:
    """What differs in a long text, without the words around it."""
    old, new = before.split(" "), after.split(" ")
    changes = [
        f"{_short(' '.join(old[a:b]))} -> {_short(' '.join(new[c:d]))}"
        for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        if tag != "equal"
    ]
    return ", ".join(changes)


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}..."
