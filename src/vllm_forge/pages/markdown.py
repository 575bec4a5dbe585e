"""Markdown of the generated pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_forge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table without a final newline; integers with thousands separators, ``|`` escaped."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def put_block(page: str, name: str, content: str, *, where: str) -> str:
    """The page with the text between two marks replaced.

    The marks are the lines ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``.

    Args:
        page: a page written by hand.
        name: the block's.
        content: its new text.
        where: the page's path, for the error.

    Raises:
        UsageError: the marks are missing.
    """
    begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
    head, found, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise UsageError(f"missing {begin} ... {end}", where=where, remedy="add both lines")
    return f"{head}{begin}\n{content}\n{end}{tail}"
