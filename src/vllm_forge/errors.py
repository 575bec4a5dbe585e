"""The base of every failure: what happened, where, and what to do.

Exit codes have two parts. The tens are the room that failed, the last digit what it means for a
script or a scheduler: 0 input was refused, 1 a red verdict, 2 no verdict (undecided), 3 a fault of
the host, its tools or the network. Within a code, the class name distinguishes them.
Unexpected exceptions exit with 1 and a traceback, wrong usage with 2, a signal with 128 and its
number.
"""

from __future__ import annotations

import re
from typing import ClassVar

# User and password of an index's address are nobody's business in a build log.
CREDENTIALS = re.compile(r"://[^/@\s]+@")


class ForgeError(Exception):
    """Base of all failures that are part of the contract with the user.

    Args:
        what: what happened, one sentence.
        where: the file, line, package or command it happened at.
        remedy: what the reader should do now.
    """

    exit_code: ClassVar[int] = 1

    def __init_subclass__(cls, *, exit_code: int | None = None) -> None:
        super().__init_subclass__()
        if exit_code is not None:
            cls.exit_code = exit_code

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


class UsageError(ForgeError, exit_code=2):
    """Wrong usage of the command line."""
