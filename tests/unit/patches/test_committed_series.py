"""The committed series on the pinned sources: every line that a patch leans on is needed.

The sources come from the user's cache and are only read; what is changed is written to a
repository of the test's own, which borrows the cache's objects.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from unidiff.patch import PatchSet

from vllm_forge.host import cache_root
from vllm_forge.matrix import load
from vllm_forge.patches import apply_series, read_series, read_tree_lock
from vllm_forge.patches.apply import TreeIndex, tree_index
from vllm_forge.patches.errors import (
    AlreadyUpstreamError,
    AppliedTwiceError,
    WrongContextError,
)
from vllm_forge.sources import SourceRepo

ROOT = Path(__file__).parents[3]
# Found at import: during a test the cache is a temporary one.
CACHE = SourceRepo(cache_root() / "sources.git")
MATRIX = load(ROOT)
CASES = [
    (line, number)
    for line, row in MATRIX.line.items()
    for number in range(len(read_series(ROOT / row.series)))
]


@pytest.fixture
def repo(tmp_path: Path) -> SourceRepo:
    """A repository of its own that reads the cache's objects."""
    made = SourceRepo(tmp_path / "own.git")
    made.git("init", "--quiet", "--bare")
    (made.path / "objects" / "info" / "alternates").write_text(f"{CACHE.path}/objects\n")
    return made


def tree_before(repo: SourceRepo, line: str, number: int) -> str:
    """The tree that patch ``number`` of a line is for."""
    row = MATRIX.line[line]
    if CACHE.tree(row.vllm) is None:
        pytest.skip(f"the source of vLLM {row.vllm} is not cached: `nox -s patches` fetches it")
    base = read_tree_lock(ROOT / row.series, line).base
    earlier = read_series(ROOT / row.series)[:number]
    return apply_series(repo, base, earlier).result


def with_line_changed(index: TreeIndex, path: str, lines: list[bytes], number: int) -> str:
    """The index's tree with one line of one file changed (``number`` counts from 1)."""
    changed = [*lines]
    changed[number - 1] += b"  # changed"
    index.put(path, "100644", b"\n".join(changed))
    return index.tree()


@pytest.mark.parametrize(("line", "number"), CASES)
def test_every_target_line_matters(repo: SourceRepo, line: str, number: int) -> None:
    """A change of any line that a hunk shows or removes is a WrongContextError at its file."""
    patch = read_series(ROOT / MATRIX.line[line].series)[number]
    tree = tree_before(repo, line, number)
    seen = 0
    with tree_index(repo, tree) as index:
        for file in PatchSet(patch.diff):
            content = repo.git("cat-file", "blob", f"{tree}:{file.path}").stdout
            rows = [row.source_line_no for hunk in file for row in hunk]
            for row in (row for row in rows if row is not None):
                changed = with_line_changed(index, file.path, content.split(b"\n"), row)
                with pytest.raises(WrongContextError) as refused:
                    apply_series(repo, changed, [patch])
                assert file.path in refused.value.where
                seen += 1
            index.put(file.path, "100644", content)
    assert seen >= 6


@pytest.mark.parametrize(("line", "number"), CASES)
def test_a_patch_does_not_apply_to_its_own_result(repo: SourceRepo, line: str, number: int) -> None:
    patch = read_series(ROOT / MATRIX.line[line].series)[number]
    tree = tree_before(repo, line, number)
    with pytest.raises(AppliedTwiceError):
        apply_series(repo, tree, [patch, patch])
    with pytest.raises(AlreadyUpstreamError):
        apply_series(repo, apply_series(repo, tree, [patch]).result, [patch])
