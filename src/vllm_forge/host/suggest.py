"""What a mistyped word was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggestion(word: str, known: Iterable[str], *, least: float = 0.5, listed: bool = True) -> str:
    """`` (did you mean 'x'?)`` for the nearest known word, ready to follow the wrong one.

    ``least``: similarity from which a word is near, 0 to 1. If none is, ``listed`` lists all.
    """
    names = {name.lstrip("-"): name for name in sorted(known)}  # dashes do not count
    if near := difflib.get_close_matches(word.lstrip("-"), names, n=1, cutoff=least):
        return f" (did you mean {names[near[0]]!r}?)"
    return f" (known: {', '.join(names.values())})" if listed else ""
