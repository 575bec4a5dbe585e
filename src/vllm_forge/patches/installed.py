"""A series applied to files of an installed distribution, as exactly as to a source tree.

The patches are for the project's source, where the package lies below ``src/``. Of the installed
files only those are taken that the series touches; a full-index diff names their content.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_forge.host import atomic_path
from vllm_forge.patches.apply import Applied, apply_series
from vllm_forge.patches.errors import WrongBaseError
from vllm_forge.sources import SourceRepo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_forge.patches.header import Patch

PREFIX = "src/"


def patch_installed(site: Path, patches: Sequence[Patch]) -> list[Path]:
    """Apply patches to the files below ``site``; return those that changed.

    All patches are tried on a tree of their own first; then the files are replaced one by one.

    Raises:
        WrongBaseError: a file that the series touches is not installed.
        WrongContextError, OffsetError, AlreadyUpstreamError, ...: see apply_series.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-forge-installed-") as folder:
        repo = SourceRepo(Path(folder) / "tree.git")
        repo.git("init", "--quiet", "--bare")
        base = _tree(repo, site, sorted({path for patch in patches for path in patch.files}))
        applied = apply_series(repo, base, patches)
        changed = _contents(repo, applied)
    for path, content in changed.items():
        with atomic_path(site / path) as aside:
            aside.write_bytes(content)
    return [site / path for path in changed]


def _tree(repo: SourceRepo, site: Path, paths: Sequence[str]) -> str:
    env = {"GIT_INDEX_FILE": str(repo.path / "installed-index")}
    for path in paths:
        installed = site / path.removeprefix(PREFIX)
        if not (path.startswith(PREFIX) and installed.is_file()):
            raise WrongBaseError(
                f"the series changes {path}, which is not installed",
                where=str(site),
                remedy="the patch is for another release: see the series' folder",
            )
        content = installed.read_bytes()
        blob = repo.git("hash-object", "-w", "--stdin", stdin=content).stdout.decode().strip()
        repo.git("update-index", "--add", "--cacheinfo", f"100644,{blob},{path}", env=env)
    return repo.git("write-tree", env=env).stdout.decode().strip()


def _contents(repo: SourceRepo, applied: Applied) -> dict[str, bytes]:
    """Path below the environment's packages -> patched content."""
    listing = repo.git(
        "diff-tree", "-r", "-z", "--name-only", applied.base, applied.result
    ).stdout.decode()
    return {
        path.removeprefix(PREFIX): repo.git("cat-file", "blob", f"{applied.result}:{path}").stdout
        for path in filter(None, listing.split("\0"))
    }
