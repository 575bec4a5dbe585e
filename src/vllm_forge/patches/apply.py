"""Patches applied by git to a tree in a throw-away index: exactly, or not at all.

``git apply`` never uses fuzz, but it does move a hunk that fits at another line, and says so
only with ``-v``; that is refused here (git-apply(1)).
"""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Self

from vllm_forge.errors import ForgeError
from vllm_forge.host.errors import CommandFailedError
from vllm_forge.patches import errors
from vllm_forge.patches.header import Patch
from vllm_forge.sources import SourceRepo

MOVED = re.compile(r"^Hunk #(\d+) succeeded at (\d+) \(offset (-?\d+) lines?\)", re.M)
FAILED = re.compile(r"^error: patch failed: (?P<file>.+):(?P<line>\d+)$", re.M)
ABSENT = re.compile(r"^error: (?P<file>.+): (?:does not exist in index|No such file)", re.M)
CORRUPT = re.compile(r"^error: (?:corrupt patch|patch fragment without header)", re.M)
EMPTY = re.compile(r"^error: (?:No valid patches in input|unrecognized input)", re.M)
UNREADABLE = re.compile(r"^error: failed to read ", re.M)  # a blob; the exit code is 1
CANONICAL = (
    "-c", "core.quotePath=true",
    "-c", "diff.algorithm=myers",
    "diff", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--full-index",
    "-U3", "--src-prefix=a/", "--dst-prefix=b/",
)  # fmt: skip


class TreeIndex:
    """A git index of its own, filled with a tree; use it in a ``with`` statement."""

    def __init__(self, repo: SourceRepo, tree: str | None = None) -> None:
        self._repo = repo
        self._tree = tree
        self._folder = tempfile.TemporaryDirectory(prefix="vllm-forge-index-")
        self._env = {"GIT_INDEX_FILE": str(Path(self._folder.name) / "index")}

    def __enter__(self) -> Self:
        try:
            if self._tree is not None:
                self.git("read-tree", self._tree)
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def git(self, *args: str) -> str:
        return self._repo.git(*args, env=self._env).stdout.decode()

    def apply(self, patch: Patch, *options: str) -> subprocess.CompletedProcess[bytes]:
        """``git apply``; -v names moved hunks, nowarn leaves whitespace as it is.

        Raises:
            CommandFailedError: git cannot read or write the repository, which says nothing of
                the patch.
        """
        done = self._repo.git(
            "apply", "--cached", "-v", "--whitespace=nowarn", *options, "-",
            stdin=patch.diff.encode(), env=self._env, check=False,
        )  # fmt: skip
        stderr = done.stderr.decode(errors="replace")
        if UNREADABLE.search(stderr) or (
            done.returncode not in {0, 1} and not (CORRUPT.search(stderr) or EMPTY.search(stderr))
        ):
            raise CommandFailedError(
                f"git apply exited with {done.returncode}: {stderr.strip()}",
                where=str(self._repo.path),
                remedy="give write access and space; if it is damaged, delete it: it is made again",
            )
        return done

    def reverses(self, patch: Patch) -> bool:
        """Whether the tree has the patch's change."""
        return self.apply(patch, "--check", "--reverse").returncode == 0

    def put(self, path: str, mode: str, content: bytes) -> None:
        """Add a file, or replace its content."""
        blob = self._repo.git("hash-object", "-w", "--stdin", stdin=content)
        entry = f"{mode},{blob.stdout.decode().strip()},{path}"
        self.git("update-index", "--add", "--cacheinfo", entry)

    def tree(self) -> str:
        return self.git("write-tree").strip()


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A series applied: tree hashes before the first and after each patch."""

    base: str
    trees: tuple[str, ...]

    @property
    def result(self) -> str:
        """Tree hash after the last patch."""
        return self.trees[-1] if self.trees else self.base


def apply_series(repo: SourceRepo, base: str, patches: Sequence[Patch]) -> Applied:
    """Apply patches in order to the tree ``base``.

    Raises:
        CorruptPatchError, EmptyPatchError: git cannot read the patch.
        AlreadyUpstreamError: the pristine tree has the change.
        AppliedTwiceError: an earlier patch of the series made the change.
        WrongContextError: a hunk's context is not there.
        OffsetError: a hunk fits at another line only.
        NonCanonicalPatchError: it applies, but git would write it in another way.
    """
    trees = [base]
    with TreeIndex(repo, base) as index:
        for patch in patches:
            done = index.apply(patch)
            stderr = done.stderr.decode(errors="replace")
            if done.returncode != 0:
                raise _refusal(repo, base, patch, stderr, index)
            if moved := MOVED.search(stderr):
                raise errors.OffsetError(
                    f"hunk {moved[1]} applies at line {moved[2]}, {moved[3]} lines from where it "
                    "says",
                    where=f"{patch.path} ({', '.join(patch.files)})",
                    remedy="it was made for another tree: look at the new place, then run: "
                    "vllm-forge patch lock --export",
                )
            trees.append(index.tree())
            _require_canonical(repo, patch, *trees[-2:])
    return Applied(base=base, trees=tuple(trees[1:]))


def canonical_diff(repo: SourceRepo, before: str, after: str) -> str:
    """The difference of two trees in the one form that a patch file may have."""
    # Context that is not UTF-8 makes a patch that is not canonical, not a crash.
    return repo.git(*CANONICAL, before, after).stdout.decode(errors="replace")


def _require_canonical(repo: SourceRepo, patch: Patch, before: str, after: str) -> None:
    expected = canonical_diff(repo, before, after)
    if patch.diff != expected:
        rows = zip_longest(patch.diff.splitlines(), expected.splitlines())
        differ = (number for number, (row, canonical) in enumerate(rows, 1) if row != canonical)
        raise errors.NonCanonicalPatchError(
            f"the diff is not in canonical form from its line {next(differ, 'last')} on",
            where=str(patch.path),
            remedy="run: vllm-forge patch lock --export",
        )


def _refusal(
    repo: SourceRepo, base: str, patch: Patch, stderr: str, index: TreeIndex
) -> ForgeError:
    # "while searching for:" is followed by lines of code; the line after those says where.
    lines = [line for line in stderr.splitlines() if line.startswith("error:")]
    first = next((line for line in lines if "while searching for" not in line), stderr.strip())
    where = str(patch.path)
    if CORRUPT.search(stderr):
        return errors.CorruptPatchError(
            f"git cannot read the patch: {first}",
            where=where,
            remedy="export the change again with git",
        )
    if EMPTY.search(stderr):
        return errors.EmptyPatchError("git finds no hunk in the patch", where=where)
    if index.reverses(patch):
        with TreeIndex(repo, base) as pristine:
            if pristine.reverses(patch):
                return errors.AlreadyUpstreamError(
                    f"{patch.name}: the release already has this change",
                    where=where,
                    remedy="drop it: delete the file and its line in the series, and record it as "
                    "retired in dispositions.toml",
                )
        return errors.AppliedTwiceError(
            f"{patch.name}: an earlier patch of the series makes this change",
            where=where,
            remedy="delete one of the two",
        )
    place = FAILED.search(stderr) or ABSENT.search(stderr)
    target = place["file"] if place else ", ".join(patch.files)
    line = f":{place['line']}" if place and "line" in place.groupdict() else ""
    return errors.WrongContextError(
        f"{patch.name} does not fit: {first}",
        where=f"{target}{line} (from {where})",
        remedy="the patch was made for other code: look at it, then write the patch again for "
        "this tree. GNU patch might take it with fuzz; we do not",
    )
