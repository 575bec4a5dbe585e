"""What a release does to a patch: it fits, moved, is upstream, conflicts, or its target is gone."""

from __future__ import annotations

import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.version import Version
from unidiff.patch import PatchSet

from vllm_forge.patches.apply import ABSENT, FAILED, MOVED, TreeIndex
from vllm_forge.patches.follow import Words, dense, hunk_words, locate, read_words
from vllm_forge.patches.header import Patch, read_patch
from vllm_forge.sources import SourceRepo

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


# "0.27.1, vllm/models/deepseek_v4/nvidia/ops/o_proj.py:63"
LANDED = re.compile(r"^(?P<version>\d+(?:\.\d+)+), (?P<where>\S+)$")


class Answer(StrEnum):
    """In the order of how much is to be done, least first."""

    APPLIES = "applies"
    OFFSET = "offset"
    UPSTREAM = "upstream"
    CONFLICT = "conflict"
    MOVED = "moved"
    GONE = "gone"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """An answer, and what is to be known with it: lines, a place, who made the change."""

    answer: Answer
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Release:
    """A final release: version, day of its upload, hash and path of its source archive."""

    version: str
    date: str
    sha256: str
    archive: Path


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A line's series: the patches, and the tree that each of them was made for."""

    paths: tuple[Path, ...]
    befores: tuple[str, ...]


def survey(
    repo: SourceRepo, releases: Sequence[Release], subjects: Sequence[Subject]
) -> Iterator[tuple[Release, str, list[list[Verdict]]]]:
    """Each release's tree hash and its verdicts on each series, several releases side by side."""
    words = vocabulary(repo, subjects)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_look_at, repo.path, release, subjects, words) for release in releases]
        for release, job in zip(releases, jobs, strict=True):
            yield (release, *job.result())


def vocabulary(repo: SourceRepo, subjects: Sequence[Subject]) -> frozenset[bytes]:
    """All words that may have to be looked for, so that a tree is read once for all of them."""
    return frozenset(
        word
        for subject in subjects
        for path, before in zip(subject.paths, subject.befores, strict=True)
        for words in _hunks(repo, read_patch(path), before).values()
        for word in words
    )


def _look_at(
    repo_path: Path, release: Release, subjects: Sequence[Subject], known: frozenset[bytes]
) -> tuple[str, list[list[Verdict]]]:
    """Worker process: import the archive if need be, then look at each series."""
    repo = SourceRepo(repo_path)
    tree = repo.tree(release.version) or repo.import_archive(release.version, release.archive)
    return tree, [verdicts(repo, tree, release.version, subject, known) for subject in subjects]


def verdicts(
    repo: SourceRepo, tree: str, version: str, subject: Subject, known: frozenset[bytes]
) -> list[Verdict]:
    """What one tree says of each patch of a series; those that apply are applied for the next.

    Args:
        repo: holds the tree.
        tree: of a release.
        version: of that release.
        subject: the series.
        known: see vocabulary.
    """
    found: dict[int, Verdict] = {}
    failed: dict[int, str] = {}
    patches = [read_patch(path) for path in subject.paths]
    with TreeIndex(repo, tree) as index:
        for number, patch in enumerate(patches):
            done = index.apply(patch)
            stderr = done.stderr.decode(errors="replace")
            if done.returncode == 0:
                found[number] = _applies(patch, version, stderr)
            elif index.reverses(patch):
                found[number] = Verdict(answer=Answer.UPSTREAM, detail="the same change")
            elif (landed := _landed(patch, version)) is not None:
                found[number] = Verdict(answer=Answer.UPSTREAM, detail=landed)
            else:
                failed[number] = stderr
        present = set(index.git("ls-files").splitlines())
    for number, said in failed.items():
        hunks = _hunks(repo, patches[number], subject.befores[number])
        words = _words(repo.path, tree, known)
        earlier = _words(repo.path, subject.befores[0], known)
        found[number] = _follow(_failed(hunks, said), words, earlier, present)
    return [found[number] for number in range(len(patches))]


def _applies(patch: Patch, version: str, said: str) -> Verdict:
    offsets = sorted({int(moved[3]) for moved in MOVED.finditer(said)})
    # Then the header is wrong, or the change went upstream in another place.
    doubt = _landed(patch, version)
    notes = [f"though its header says: {doubt}"] if doubt else []
    if not offsets:
        return Verdict(answer=Answer.APPLIES, detail="".join(notes))
    span = " to ".join(f"{offset:+d}" for offset in sorted({offsets[0], offsets[-1]}))
    return Verdict(answer=Answer.OFFSET, detail=", ".join([f"{span} lines", *notes]))


def _landed(patch: Patch, version: str) -> str | None:
    """What the header says of upstream, when that is in this release."""
    landed = LANDED.match(patch.fields["Applied-Upstream"])
    if landed is None or Version(version) < Version(landed["version"]):
        return None
    return f"since {landed['version']}, {landed['where']}"


def _follow(
    failed: dict[str, dict[bytes, int]], words: Words, earlier: Words, present: set[str]
) -> Verdict:
    """Where the failed hunks' code is now; the worst file of a patch gives the answer."""
    parts: list[tuple[Answer, str]] = []
    for path, wanted in sorted(failed.items()):
        copies = {place.path for place in dense(earlier, wanted)}
        place = locate(words, wanted, path, copies)
        if place is None:
            what = "has no such code" if path in present else "is not there, nor its code elsewhere"
            parts.append((Answer.GONE, f"{path} {what}"))
        elif place.path == path:
            parts.append((Answer.CONFLICT, f"{path}:{place.line}"))
        else:
            parts.append((Answer.MOVED, f"{place.path}:{place.line}"))
    order = list(Answer)
    worst = max((answer for answer, _ in parts), key=order.index)
    return Verdict(answer=worst, detail="; ".join(text for _, text in parts))


def _hunks(repo: SourceRepo, patch: Patch, before: str) -> dict[tuple[str, int], dict[bytes, int]]:
    """The words of each hunk, by file and line; those that remove something come first."""
    found = {}
    for file in PatchSet(patch.diff):
        source = repo.git("cat-file", "blob", f"{before}:{file.path}").stdout.splitlines()
        for hunk in sorted(file, key=lambda hunk: not hunk.removed):
            found[file.path, hunk.source_start] = hunk_words(hunk, source)
    return found


def _failed(
    hunks: dict[tuple[str, int], dict[bytes, int]], said: str
) -> dict[str, dict[bytes, int]]:
    """For each file that git could not patch, the words of the hunk that failed first."""
    failed = {}
    for match in [*FAILED.finditer(said), *ABSENT.finditer(said)]:
        path = match["file"]
        named = (path, int(match.groupdict().get("line") or 0))
        first = next(place for place in hunks if place[0] == path)
        failed[path] = hunks[named if named in hunks else first]
    return failed


@cache
def _words(repo_path: Path, tree: str, wanted: frozenset[bytes]) -> Words:
    return read_words(SourceRepo(repo_path), tree, wanted)
