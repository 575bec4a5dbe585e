"""Tables of measurements in pages of the docs, each between two marks of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.errors import UsageError
from vllm_forge.host.files import atomic_path

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table that is made from a result file.

    Attributes:
        page: its page, from the root of the checkout.
        result: the file, likewise.
        begin: mark above the table.
        end: mark below it.
        make: the content of the result file -> the table.
    """

    page: Path
    result: Path
    begin: str
    end: str
    make: Callable[[dict[str, Any]], str]

    def put_into(self, page: str, result: dict[str, Any]) -> str:
        """The page with its table made anew.

        Raises:
            UsageError: the page has no place for it.
        """
        head, begin, rest = page.partition(self.begin)
        _, end, tail = rest.partition(self.end)
        if not begin or not end:
            raise UsageError(f"no {self.begin} ... {self.end}", where=str(self.page))
        return f"{head}{self.begin}\n{self.make(result)}\n{self.end}{tail}"

    def write(self, root: Path) -> None:
        """Make the table in the page from the result file."""
        result = json.loads((root / self.result).read_text(encoding="utf-8"))
        text = (root / self.page).read_text(encoding="utf-8")
        with atomic_path(root / self.page) as aside:
            aside.write_text(self.put_into(text, result), encoding="utf-8")
