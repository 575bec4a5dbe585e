"""Tables and blocks of the generated pages."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from vllm_forge.errors import UsageError


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table without a final newline; integers with thousands separators, ``|`` escaped once."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else re.sub(r"(?<!\\)\|", r"\|", str(value))


def escape(text: str) -> str:
    """Foreign text as text: no markup, no HTML, one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#!&~])", r"\\\1", " ".join(text.split()))


def terminal_table(head: Sequence[str], rows: Iterable[Sequence[str]], **settings: Any) -> Table:
    """A table for a terminal, which folds its cells."""
    grid = Table(**settings)
    for name in head:
        grid.add_column(name, overflow="fold")
    for row in rows:
        grid.add_row(*map(Text, row))  # not markup
    return grid


def put_block(page: str, name: str, content: str, *, where: str) -> str:
    """Replace the text between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``.

    ``where`` is the page's path, for the UsageError if the marks are missing.
    """
    begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
    head, opened, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not opened or not closed:
        raise UsageError(f"missing {begin} ... {end}", where=where, remedy="add both lines")
    return f"{head}{begin}\n{content}\n{end}{tail}"
