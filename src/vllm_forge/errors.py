"""The base of every failure: what happened, where, and what to do.

Exit codes have two parts. The tens are the room that failed, the last digit what it means for a
script or a scheduler. Within a code, the class name tells the failures apart. Unexpected exceptions
exit with 1 and a traceback, wrong usage with 2, a signal with 128 and its number.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path
from typing import ClassVar

# User and password of an index's address are nobody's business in a build log.
CREDENTIALS = re.compile(r"://[^/@\s]+@")
MEANINGS = {
    0: "input refused",
    1: "red verdict",
    2: "undecided",
    3: "fault of the host, its tools or the network",
}


class ForgeError(Exception):
    """Base of all failures that are part of the contract with the user.

    Args:
        what: what happened, one sentence.
        where: the file, line, package or command it happened at.
        remedy: what the reader should do now.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
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


class UsageError(ForgeError):
    """Wrong usage of the command line."""

    exit_code = 2


def exit_codes() -> list[tuple[int, str, str, list[type[ForgeError]]]]:
    """The table of exit codes: (code, rooms, meaning, classes), ascending."""
    for room in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if room.ispkg and importlib.util.find_spec(f"vllm_forge.{room.name}.errors"):
            importlib.import_module(f"vllm_forge.{room.name}.errors")
    classes, pending = [], [ForgeError]
    while pending:
        pending += (kind := pending.pop()).__subclasses__()
        if kind.__module__.startswith("vllm_forge."):
            classes.append(kind)
    rows = []
    for code in sorted({kind.exit_code for kind in classes} - {ForgeError.exit_code}):
        kinds = sorted((k for k in classes if k.exit_code == code), key=lambda k: k.__name__)
        rooms = sorted({kind.__module__.split(".")[1] for kind in kinds})
        meaning = "wrong usage" if code == UsageError.exit_code else MEANINGS[code % 10]
        rows.append((code, ", ".join(rooms), meaning, kinds))
    return rows
