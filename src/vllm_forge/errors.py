"""The base of every failure: what happened, where, and what to do.

Exit codes have two parts. The tens are the room that failed, the last digit what it means for a
script or a scheduler: 0 input was refused, 1 a red verdict, 2 no verdict (undecided), 3 a fault of
the host, its tools or the network. Within a code, the class name distinguishes them.
Unexpected exceptions exit with 1 and a traceback, wrong usage with 2, a signal with 128 and its
number.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from pydantic import ValidationError

# User and password of an index's address are nobody's business in a build log.
CREDENTIALS = re.compile(r"://[^/@\s]+@")


class ForgeError(Exception):
    """Base of all failures that are part of the contract with the user.

    ``what`` happened, ``where`` (file, line, package or command), and the ``remedy``, imperative.
    """

    exit_code: ClassVar[int] = 1

    def __init_subclass__(cls, *, exit_code: int | None = None) -> None:
        super().__init_subclass__()
        if exit_code is not None:
            cls.exit_code = exit_code

    def __init__(self, what: str, *, where: object = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = str(where)
        self.remedy = remedy

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where:  {self.where}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return CREDENTIALS.sub("://", "\n".join(lines))

    def as_dict(self) -> dict[str, str | int]:
        """For ``--json``: class, exit_code, what, where, remedy; without credentials."""
        texts = {"what": self.what, "where": self.where, "remedy": self.remedy}
        return {
            "class": type(self).__name__,
            "exit_code": self.exit_code,
            **{key: CREDENTIALS.sub("://", text) for key, text in texts.items()},
        }


class UsageError(ForgeError, exit_code=2):
    """Wrong usage of the command line."""


def suggestion(word: str, known: Iterable[str], *, least: float = 0.5, listed: bool = True) -> str:
    """`` (did you mean 'x'?)`` for the nearest known word, ready to follow the wrong one.

    ``least``: similarity from which a word is near, 0 to 1. If none is, ``listed`` lists all.
    """
    names = {name.lstrip("-"): name for name in sorted(known)}  # dashes do not count
    if near := difflib.get_close_matches(word.lstrip("-"), names, n=1, cutoff=least):
        return f" (did you mean {names[near[0]]!r}?)"
    return f" (known: {', '.join(names.values())})" if listed else ""


def shortened(rows: Sequence[str], most: int) -> list[str]:
    """The first rows, at most ``most``; then how many others there are."""
    left = len(rows) - most
    return [*rows[:most], f"and {left} more"] if left > 0 else list(rows)


def problems(error: ValidationError, model: Any = None) -> list[str]:
    """What is wrong with a record, field by field; of a ``model``, unknown keys get suggestions."""
    rows = []
    for item in error.errors(include_url=False, include_input=False):
        place = ".".join(map(str, item["loc"]))
        if model is not None and item["type"] == "extra_forbidden":
            *parents, key = item["loc"]
            rows.append(f"unknown key {place}{suggestion(str(key), _fields_at(model, parents))}")
        else:
            message = item["msg"].removeprefix("Value error, ")  # of a check of our own
            message = message.replace("a valid tuple", "a list")  # as TOML and JSON say
            message = message.partition(" or instance of ")[0]
            rows.append(f"{place}: {message}" if place else message)
    return rows


def first_problem(error: ValueError) -> str:
    """What a ValueError says, also where it is one of a record with several problems."""
    return problems(error)[0] if isinstance(error, ValidationError) else str(error)


def _fields_at(model: Any, loc: list[int | str]) -> list[str]:
    current: Any = model
    for part in loc:
        if field := getattr(current, "model_fields", {}).get(part):
            current = field.annotation
            if type(None) in (options := getattr(current, "__args__", ())):  # Record | None
                current = next(option for option in options if option is not type(None))
        else:  # dict[Name, Record] or tuple[Record, ...]
            arguments = getattr(current, "__args__", ())
            current = next((arg for arg in arguments if hasattr(arg, "model_fields")), None)
    return list(getattr(current, "model_fields", ()))
