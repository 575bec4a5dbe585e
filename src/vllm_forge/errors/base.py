"""The base of every failure: an exit code of its own; what happened, where, what to do."""

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
