"""Tiny source archives and the git trees that come of them."""

from __future__ import annotations

import io
import tarfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_forge.patches.apply import SEPARATOR, canonical_diff

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from vllm_forge.sources import SourceRepo

TOP = "vllm-9.9.1"

HEADER = """\
Description: a change made by a unit test
 with a second line
Origin: vendor, written for vllm-forge
Bug: https://example.org/1
Forwarded: not-needed
Applied-Upstream: no
Author: vllm-forge founders
Last-Update: 2026-11-24
Skus: all
Proves: tests/unit/test_nothing.py::test_nothing
Drop-When: the test is gone
"""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A member of a source archive."""

    path: str
    content: bytes = b""
    mode: int = 0o644
    kind: bytes = tarfile.REGTYPE
    link: str = ""


def write_tar(path: Path, items: Iterable[Item]) -> Path:
    """A .tar.gz of exactly these members, paths as given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        for item in items:
            info = tarfile.TarInfo(item.path)
            info.type, info.mode, info.linkname = item.kind, item.mode, item.link
            info.size = len(item.content)
            tar.addfile(info, io.BytesIO(item.content))
    return path


def write_sdist(path: Path, files: Mapping[str, bytes], *, top: str = TOP) -> Path:
    """A source archive with one folder at its top."""
    return write_tar(
        path, (Item(path=f"{top}/{name}", content=content) for name, content in files.items())
    )


def changed_tree(
    repo: SourceRepo, base: str, changes: Mapping[str, bytes | None], index: Path
) -> str:
    """The tree ``base`` with other contents for some paths; None deletes one."""
    env = {"GIT_INDEX_FILE": str(index)}
    repo.git("read-tree", base, env=env)
    for path, content in changes.items():
        if content is None:
            gone = f"0 {'0' * 40}\t{path}\n".encode()
            repo.git("update-index", "--index-info", stdin=gone, env=env)
            continue
        blob = repo.git("hash-object", "-w", "--stdin", stdin=content).stdout.decode().strip()
        repo.git("update-index", "--add", "--cacheinfo", f"100644,{blob},{path}", env=env)
    return repo.git("write-tree", env=env).stdout.decode().strip()


def patch_text(
    repo: SourceRepo, base: str, changes: Mapping[str, bytes | None], index: Path
) -> str:
    """A canonical patch that makes these changes to ``base``."""
    after = changed_tree(repo, base, changes, index)
    return HEADER + SEPARATOR + canonical_diff(repo, base, after)


@dataclass(frozen=True)
class State:
    """All that a refused patch must leave alone."""

    refs: bytes
    config: bytes
    index_there: bool
    base: bytes


def state(repo: SourceRepo, base: str) -> State:
    return State(
        refs=repo.git("for-each-ref").stdout,
        config=(repo.path / "config").read_bytes(),
        index_there=(repo.path / "index").exists(),
        base=repo.git("ls-tree", "-r", base).stdout,
    )


def own_files(repo: SourceRepo) -> dict[str, bytes]:
    """Path -> content of refs, configuration and index: all but objects, without a git process."""
    return {
        path.relative_to(repo.path).as_posix(): path.read_bytes()
        for path in repo.path.rglob("*")
        if path.is_file() and "objects" not in path.parts
    }


@contextmanager
def unchanged(repo: SourceRepo, base: str) -> Iterator[None]:
    """Assert that the block leaves refs, configuration, index and base tree as they are."""
    before = state(repo, base)
    yield
    assert state(repo, base) == before
    assert not repo.git("fsck", "--strict", "--no-dangling").stdout
