"""A good patch, damaged at random: the right tree, or an error of ours; never a third thing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.series import GOOD, SECOND, source_files
from tests.support.trees import own_files, unchanged, write_sdist
from vllm_forge.errors import ForgeError
from vllm_forge.patches import apply_series, read_patch
from vllm_forge.sources import SourceRepo

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Ground:
    repo: SourceRepo
    base: str
    right: str
    both: str
    before: dict[str, bytes]
    patch: Path


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("ground")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VLLM_FORGE_CACHE", str(folder / "cache"))
        repo = SourceRepo(folder / "sources.git")
        base = repo.import_archive("1", write_sdist(folder / "a.tar.gz", source_files()))
    good, second = read_patch(GOOD), read_patch(SECOND)
    right = apply_series(repo, base, [good]).result
    both = apply_series(repo, base, [good, second]).result
    with unchanged(repo, base):  # objects too, once for all examples
        yield Ground(
            repo=repo,
            base=base,
            right=right,
            both=both,
            before=own_files(repo),
            patch=folder / "mutant.patch",
        )


ORIGINAL = GOOD.read_bytes()
LINES = ORIGINAL.splitlines(keepends=True)
HUNKS = [ORIGINAL[found.start() :] for found in re.finditer(rb"^@@ ", ORIGINAL, re.M)]
NUMBERS = [found.span() for found in re.finditer(rb"\d+", ORIGINAL)]
at = st.integers(0, len(ORIGINAL) - 1)
row = st.integers(0, len(LINES) - 1)


def bytes_changed() -> st.SearchStrategy[bytes]:
    return st.tuples(at, st.integers(0, 4), st.binary(max_size=4)).map(
        lambda t: ORIGINAL[: t[0]] + t[2] + ORIGINAL[t[0] + t[1] :]
    )


def bit_flipped() -> st.SearchStrategy[bytes]:
    return st.tuples(at, st.integers(0, 7)).map(
        lambda t: ORIGINAL[: t[0]] + bytes([ORIGINAL[t[0]] ^ 1 << t[1]]) + ORIGINAL[t[0] + 1 :]
    )


def lines_deleted() -> st.SearchStrategy[bytes]:
    return st.sets(row, min_size=1, max_size=3).map(
        lambda gone: b"".join(text for number, text in enumerate(LINES) if number not in gone)
    )


def lines_swapped() -> st.SearchStrategy[bytes]:
    def swap(pair: tuple[int, int]) -> bytes:
        lines = list(LINES)
        lines[pair[0]], lines[pair[1]] = lines[pair[1]], lines[pair[0]]
        return b"".join(lines)

    return st.tuples(row, row).map(swap)


def lines_doubled() -> st.SearchStrategy[bytes]:
    return st.tuples(row, row, st.integers(1, 8)).map(
        lambda t: b"".join([*LINES[: t[0]], *LINES[t[1] : t[1] + t[2]], *LINES[t[0] :]])
    )


def hunk_doubled() -> st.SearchStrategy[bytes]:
    return st.tuples(row, st.sampled_from(HUNKS)).map(
        lambda t: b"".join([*LINES[: t[0]], t[1], *LINES[t[0] :]])
    )


def number_changed() -> st.SearchStrategy[bytes]:
    number = st.one_of(st.integers(-3, 60), st.sampled_from([10**9, 10**20, 2**31, 2**63]))
    return st.tuples(st.sampled_from(NUMBERS), number).map(
        lambda t: ORIGINAL[: t[0][0]] + str(t[1]).encode() + ORIGINAL[t[0][1] :]
    )


def cut_off() -> st.SearchStrategy[bytes]:
    return at.map(lambda end: ORIGINAL[:end])


def line_from_elsewhere() -> st.SearchStrategy[bytes]:
    """Lines that mean something to git or to unidiff, in places where they should not be."""
    lines = st.sampled_from(
        [
            b"\\ No newline at end of file\n", b"---\n", b"--- /dev/null\n", b"+++ /dev/null\n",
            b"+++ b/README.md\n", b"--- a/README.md\n", b"new file mode 100644\n",
            b"deleted file mode 100644\n", b"old mode 100644\n", b"new mode 120000\n",
            b"rename from vllm/scheduler.py\n", b"rename to vllm/cache.py\n",
            b"similarity index 100%\n", b"GIT binary patch\n", b"Binary files a/x and b/x differ\n",
            b"diff --git a/vllm/cache.py b/vllm/cache.py\n", b"index 0000000..1111111 100644\n",
            b"@@ -0,0 +1 @@\n", b"@@ -1 +0,0 @@\n", b"@@@ -1,1 -1,1 +1,1 @@@\n", b"@@ @@\n",
            b"-\n", b"+\n", b" \n", b"\n", b"\r\n", b"\x0c\n", b"\x85\xe2\x80\xa8\n", b"\x00\n",
            b"+a\rb\n", "+a\u2028b\n".encode(), b"--- \n", b"+++ \n", b"--- a/x\ty\n",
            b"Only in x\n", b"@@\n", b"Index: vllm/scheduler.py\n", b"# HG changeset patch\n",
            b"Subproject commit 1\n",
        ]
    )  # fmt: skip
    return st.tuples(row, lines).map(lambda t: b"".join([*LINES[: t[0]], t[1], *LINES[t[0] :]]))


MUTANTS = st.one_of(
    bytes_changed(), bit_flipped(), lines_deleted(), lines_swapped(), lines_doubled(),
    hunk_doubled(), number_changed(), cut_off(), line_from_elsewhere(),
)  # fmt: skip


@given(mutant=MUTANTS)
def test_damaged_patch(ground: Ground, mutant: bytes) -> None:
    ground.patch.write_bytes(mutant)
    try:
        result = apply_series(ground.repo, ground.base, [read_patch(ground.patch)]).result
    except ForgeError as error:
        assert error.exit_code > 1
        assert str(error).strip()
    else:
        assert result == ground.right
    assert own_files(ground.repo) == ground.before


@settings(max_examples=30)
@given(mutant=MUTANTS)
def test_damaged_patch_before_a_good_one(ground: Ground, mutant: bytes) -> None:
    ground.patch.write_bytes(mutant)
    try:
        patches = [read_patch(ground.patch), read_patch(SECOND)]
        result = apply_series(ground.repo, ground.base, patches).result
    except ForgeError:
        pass
    else:
        assert result == ground.both
    assert own_files(ground.repo) == ground.before


@given(mutant=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_file_of_anything(ground: Ground, mutant: bytes) -> None:
    ground.patch.write_bytes(mutant)
    with pytest.raises(ForgeError):
        read_patch(ground.patch)
