"""Does a generation look corrupted? An alarm on text, and a verdict on tokens.

Text rules see foreign scripts, broken characters, leaked special tokens and letter soup. They miss
short damage and cry at unusual prose, so that they only ever ask for a closer look. The verdict is
on tokens: one that a second pass over the finished sequence finds impossible was not computed by
this model, whatever it looks like.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# Scripts of prose and mathematics in English; others only if the prompt has them.
USUAL = ("LATIN", "GREEK", "DIGIT", "MATHEMATICAL")
SPECIAL = re.compile(r"<[|｜][^>\n]{0,40}[|｜]>")  # noqa: RUF001 - DeepSeek's bars are full-width
WORD = re.compile(r"[A-Za-z]+")
VOWEL = re.compile(r"[aeiouyAEIOUY]")
WINDOW = 600
MOST_ENTROPY = 0.66  # of zlib on 600 characters of prose, about 0.5; of letter soup, above 0.7
GAP = 5.0  # nats below the best token
BURST, SPAN = 2, 32


def alarms(text: str, prompt: str = "") -> list[str]:
    """What looks wrong with a generation; empty: nothing does.

    Args:
        text: as generated, special tokens included.
        prompt: scripts that it has are no surprise.
    """
    known = {_script(letter) for letter in prompt if letter.isalpha()}
    foreign = [c for c in text if c.isalpha() and _script(c) not in {*USUAL, *known}]
    found = []
    if len(foreign) > 1:
        found.append(f"foreign script: {len(foreign)} letters, {', '.join(foreign[:3])}")
    if "\ufffd" in text or any(unicodedata.category(c) == "Cc" and c not in "\n\t\r" for c in text):
        found.append("broken characters")
    if leaked := SPECIAL.search(text):
        found.append(f"special token: {leaked[0]}")
    if (soup := max(map(_soup, _windows(text)), default=0.0)) > 0:
        found.append(f"letter soup: compresses to {soup:.2f}, and words have no vowels")
    return found


def impossible(
    given: Sequence[float], best: Sequence[float], *, gap: float = GAP
) -> tuple[int, ...]:
    """Positions whose greedy token a second pass finds impossible.

    Args:
        given: log probability of each token of the sequence, scored by prefill at concurrency 1.
        best: the greatest log probability at each position.
        gap: nats; kernels and batches differ by far less than this, also at near-ties.
    """
    return tuple(
        place
        for place, (here, top) in enumerate(zip(given, best, strict=True))
        if not 0 <= top - here <= gap  # also for nan, and for a best that is none
    )


def corrupted(places: Sequence[int]) -> bool:
    """Whether impossible tokens come in a burst: two within 32 tokens."""
    return any(
        later - earlier < SPAN for earlier, later in zip(places, places[BURST - 1 :], strict=False)
    )


def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNNAMED").split(" ")[0]


def _windows(text: str) -> list[str]:
    step = WINDOW // 2
    return [text[at : at + WINDOW] for at in range(0, max(1, len(text) - step), step)]


def _soup(window: str) -> float:
    """Compressed share of a window that reads like soup; 0 where it does not."""
    data = window.encode()
    words = [word for word in WORD.findall(window) if len(word) > 3]
    bare = sum(VOWEL.search(word) is None for word in words)
    share = len(zlib.compress(data, 9)) / len(data) if len(data) >= WINDOW // 2 else 0.0
    return share if share > MOST_ENTROPY and bare > 0.05 * len(words) else 0.0
