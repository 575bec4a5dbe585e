"""Patches applied by git to a tree, not to files: exactly, or not at all.

Everything happens in a throw-away index, so no error can leave a half-patched tree behind.
``git apply`` never uses fuzz, but it does move a hunk that fits at another line, and says so
only with ``-v``; that is refused here (git-apply(1)).
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_forge.patches.errors import (
    AlreadyUpstreamError,
    AppliedTwiceError,
    CorruptPatchError,
    EmptyPatchError,
    NonCanonicalPatchError,
    OffsetError,
    WrongContextError,
)

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence

    from vllm_forge.patches.header import Patch
    from vllm_forge.sources import SourceRepo

MOVED = re.compile(r"^Hunk #(\d+) succeeded at (\d+) \(offset (-?\d+) lines?\)", re.M)
FAILED = re.compile(r"^error: patch failed: (?P<file>.+):(?P<line>\d+)$", re.M)
ABSENT = re.compile(r"^error: (?P<file>.+): (?:does not exist in index|No such file)", re.M)
CANONICAL = (
    "-c", "core.quotePath=true",
    "-c", "diff.algorithm=myers",
    "diff", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--full-index",
    "-U3", "--src-prefix=a/", "--dst-prefix=b/",
)  # fmt: skip


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
    trees: list[str] = []
    with tempfile.TemporaryDirectory(prefix="vllm-forge-index-") as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        current = base
        repo.git("read-tree", current, env=index)
        for patch in patches:
            # -v names moved hunks; nowarn leaves whitespace as it is.
            done = repo.git(
                "apply", "--cached", "-v", "--whitespace=nowarn", "-",
                stdin=patch.diff.encode(), env=index, check=False,
            )  # fmt: skip
            said = done.stderr.decode(errors="replace")
            if done.returncode != 0:
                raise _refusal(repo, base, patch, said, index)
            if moved := MOVED.search(said):
                raise OffsetError(
                    f"hunk {moved[1]} applies at line {moved[2]}, {moved[3]} lines from where it "
                    "says",
                    where=f"{patch.path} ({', '.join(patch.files)})",
                    remedy="it was made for another tree: look at the new place, then export the "
                    "patch again from this line's tree",
                )
            after = repo.git("write-tree", env=index).stdout.decode().strip()
            _require_canonical(repo, patch, current, after)
            trees.append(after)
            current = after
    return Applied(base=base, trees=tuple(trees))


def canonical_diff(repo: SourceRepo, before: str, after: str) -> str:
    """The difference of two trees in the one form that a patch file may have."""
    # Context that is not UTF-8 makes a patch that is not canonical, not a crash.
    return repo.git(*CANONICAL, before, after).stdout.decode(errors="replace")


def _require_canonical(repo: SourceRepo, patch: Patch, before: str, after: str) -> None:
    expected = canonical_diff(repo, before, after)
    if patch.diff != expected:
        wrong = next(
            (
                number
                for number, (ours, theirs) in enumerate(
                    zip(patch.diff.splitlines(), expected.splitlines(), strict=False), 1
                )
                if ours != theirs
            ),
            min(len(patch.diff.splitlines()), len(expected.splitlines())) + 1,
        )
        raise NonCanonicalPatchError(
            f"the diff is not in canonical form, from its line {wrong} on",
            where=str(patch.path),
            remedy="run: nox -s forge -- patch lock --export",
        )


def _refusal(
    repo: SourceRepo, base: str, patch: Patch, said: str, index: dict[str, str]
) -> Exception:
    """The error that best explains why git refused."""
    # "while searching for:" is followed by lines of code; the line after those says where.
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    first = next((line for line in errors if "while searching for" not in line), said.strip())
    if "corrupt patch" in said or "patch fragment without header" in said:
        return CorruptPatchError(
            f"git cannot read the patch: {first}",
            where=str(patch.path),
            remedy="export the change again with git",
        )
    if "No valid patches in input" in said or "unrecognized input" in said:
        return EmptyPatchError("git finds no hunk in the patch", where=str(patch.path))
    if _reverses(repo, patch, index).returncode == 0:
        with tempfile.TemporaryDirectory(prefix="vllm-forge-index-") as folder:
            pristine = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
            repo.git("read-tree", base, env=pristine)
            upstream = _reverses(repo, patch, pristine).returncode == 0
        if upstream:
            return AlreadyUpstreamError(
                f"{patch.name}: the release already has this change",
                where=str(patch.path),
                remedy="drop it: delete the file and its line in the series, and record it as "
                "retired in dispositions.toml",
            )
        return AppliedTwiceError(
            f"{patch.name}: an earlier patch of the series makes this change",
            where=str(patch.path),
            remedy="delete one of the two",
        )
    place = FAILED.search(said) or ABSENT.search(said)
    target = place["file"] if place else ", ".join(patch.files)
    line = f":{place['line']}" if place and "line" in place.groupdict() else ""
    return WrongContextError(
        f"{patch.name} does not fit: {first}",
        where=f"{target}{line} (from {patch.path})",
        remedy="the code there is not what the patch was made for: look at it, then write the "
        "patch again for this tree. GNU patch might take it with fuzz; we do not",
    )


def _reverses(
    repo: SourceRepo, patch: Patch, index: dict[str, str]
) -> subprocess.CompletedProcess[bytes]:
    return repo.git(
        "apply", "--cached", "--check", "--reverse", "--whitespace=nowarn", "-",
        stdin=patch.diff.encode(), env=index, check=False,
    )  # fmt: skip
