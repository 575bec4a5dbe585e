"""Where code went: a hunk's distinctive words, looked for in the Python files of another tree."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import PurePosixPath

from unidiff.patch import Hunk

from vllm_forge.patches.wheel import python_blobs
from vllm_forge.sources import SourceRepo

WORD = re.compile(rb"[A-Za-z_]\w{4,}")
AROUND = 12  # lines before and after a hunk, beyond its own context
WINDOW = 60  # lines; code that was moved may have been spread a little
FOUND = 0.4  # of the weight of a hunk's words; below that it is other code
REMOVED_COUNTS = 3  # a word of a removed line says more than one of the lines around it
NEAR = 0.1  # of the weight, that a shared folder counts for
EPSILON = 1e-9
COMMON = 0.05  # of the files; a word in more of them says nothing


@dataclass(frozen=True, kw_only=True)
class Place:
    """A line of a tree, and how much of what was looked for is around it (0 to 1)."""

    path: str
    line: int
    share: float


@dataclass
class Words:
    """Where the wanted words stand in the Python files below ``vllm/`` of a tree."""

    files: int = 0
    lines: dict[str, dict[bytes, list[int]]] = field(default_factory=dict)
    count: dict[bytes, int] = field(default_factory=lambda: defaultdict(int))

    def weight(self, word: bytes) -> float:
        """Weight of a word: none when many files have it."""
        files = self.count.get(word, 0)
        if self.files == 0 or files > max(2, COMMON * self.files):
            return 0.0
        return math.log((self.files + 1) / max(files, 1))


def hunk_words(hunk: Hunk, source: Sequence[bytes]) -> dict[bytes, int]:
    """Words of the lines that a hunk replaces and of those around it, and how often each counts.

    ``source``: lines of the file that the patch was made for.
    """
    first = max(0, hunk.source_start - 1 - AROUND)
    last = hunk.source_start - 1 + hunk.source_length + AROUND
    words = dict.fromkeys(WORD.findall(b"\n".join(source[first:last])), 1)
    for line in hunk:
        if line.is_removed:
            words |= dict.fromkeys(WORD.findall(line.value.encode()), REMOVED_COUNTS)
    return words


def read_words(repo: SourceRepo, tree: str, wanted: frozenset[bytes]) -> Words:
    """Find words in all Python files of the package, in one pass."""
    blobs = python_blobs(repo, tree)
    names = "\n".join(blobs.values()).encode()
    stream = repo.git("cat-file", "--batch", stdin=names).stdout
    found = Words(files=len(blobs))
    at = 0
    for path in blobs:
        end = stream.index(b"\n", at)
        size = int(stream[at:end].split()[2])
        content = stream[end + 1 : end + 1 + size]
        at = end + 1 + size + 1
        here = wanted.intersection(WORD.findall(content))
        for word in here:
            found.count[word] += 1
        if here:
            lines = found.lines[path] = {word: [] for word in here}
            for number, line in enumerate(content.splitlines(), 1):
                for word in here.intersection(WORD.findall(line)):
                    lines[word].append(number)
    return found


def locate(
    words: Words, wanted: dict[bytes, int], path: str, copies: Collection[str] = ()
) -> Place | None:
    """Where most of the wanted words are close together; None where too few are.

    The file they were in comes first, then those nearest to it in the tree: code that moves
    seldom moves far.

    Args:
        words: of the tree to look in.
        wanted: the words of a hunk.
        path: the file that the hunk is for.
        copies: files that had much the same code before, to which nothing has moved.
    """
    places = [
        place for place in dense(words, wanted) if place.path == path or place.path not in copies
    ]
    if not places:
        return None
    return max(places, key=lambda place: (place.path == path, _rank(place, path)))


def dense(words: Words, wanted: dict[bytes, int]) -> list[Place]:
    """In each file the stretch with most of the wanted words, where that is enough of them."""
    weights = {word: times * words.weight(word) for word, times in wanted.items()}
    weights = {word: weight for word, weight in weights.items() if weight > 0}
    found = (_densest(name, lines, weights) for name, lines in words.lines.items())
    return [place for place in found if place is not None and place.share >= FOUND]


def _densest(path: str, lines: dict[bytes, list[int]], weights: dict[bytes, float]) -> Place | None:
    """The stretch of a file with the most of the words' weight."""
    total = sum(weights.values())
    here = sorted((number, word) for word in weights for number in lines.get(word, ()))
    best: Place | None = None
    if sum(weights[word] for word in {word for _, word in here}) < FOUND * total:
        return None
    for start, (first, _) in enumerate(here):
        inside = [(number, word) for number, word in here[start:] if number < first + WINDOW]
        share = sum(weights[word] for word in {word for _, word in inside}) / total
        if best is None or share > best.share + EPSILON:
            line = max(inside, key=lambda item: (weights[item[1]], -item[0]))[0]
            best = Place(path=path, line=line, share=share)
    return best


def _rank(place: Place, path: str) -> float:
    """Share, and a bonus for each folder that the two paths have in common."""
    ours, theirs = PurePosixPath(path).parts[:-1], PurePosixPath(place.path).parts[:-1]
    same = takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
    return place.share + NEAR * len(list(same))
