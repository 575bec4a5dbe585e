"""What goes to a GPU host beside the packages: tests, what judges them, and the sources they need.

``source/`` has what the race suite's positive controls are compiled from. ``variants/<name>/`` has
the Python files that the series changes, as published and with one patch left out: a test lays
them over the installed vLLM to see the error that a patch cures.
"""

from __future__ import annotations

import io
import shutil
import tarfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.matrix import load, serve_arguments
from vllm_forge.patches import Applied, check_line, read_series
from vllm_forge.patches.variants import without
from vllm_forge.patches.wheel import changed_files
from vllm_forge.receipts.suite import FILE
from vllm_forge.sources import read_lock

if TYPE_CHECKING:
    from vllm_forge.matrix import ImageCell, Matrix
    from vllm_forge.sources import SourceRepo

CODE = (
    "matrix.toml", "pyproject.toml", "tests/__init__.py", "tests/gpu", "src/vllm_forge/__init__.py",
    "src/vllm_forge/errors", "src/vllm_forge/checkpoints/__init__.py",
    "src/vllm_forge/checkpoints/codecs", "src/vllm_forge/gputest/__init__.py",
    "src/vllm_forge/gputest/caches.py", "src/vllm_forge/gputest/device.py",
    "src/vllm_forge/receipts/__init__.py", "src/vllm_forge/receipts/packages.py",
    "src/vllm_forge/receipts/suite.py",
)  # fmt: skip
SOURCE, VARIANTS = "source", "variants"
PUBLISHED = "published"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A folder that ``tests.gpu.harness.run`` runs from, and what is tested in it.

    Attributes:
        folder: where it is.
        tree: git tree hash of the patched source.
    """

    folder: Path
    tree: str


def write_bundle(cell: ImageCell, repo: SourceRepo, folder: Path) -> Bundle:
    """Fill ``folder``, which must not exist.

    Args:
        cell: SKU and line.
        repo: has the line's source.
        folder: is made.
    """
    applied = check_line(cell.root, cell.line_name, cell.line, repo)
    folder.mkdir(parents=True)
    skip = shutil.ignore_patterns("__pycache__")
    for name in CODE:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (cell.root / name).is_dir():
            shutil.copytree(cell.root / name, target, ignore=skip)
        else:
            shutil.copyfile(cell.root / name, target)
    _write_source(cell, repo, applied.base, folder / SOURCE)
    _write_variants(cell, repo, applied, folder / VARIANTS)
    return Bundle(folder=folder, tree=applied.result)


def make_plan(cell: ImageCell, tree: str, subject: dict[str, Any]) -> dict[str, Any]:
    """The file that tells the runner what it tests."""
    return {
        "sku": cell.sku_name,
        "device": cell.sku.device,
        "compute_capability": cell.sku.compute_capability,
        "line": cell.line_name,
        "vllm": cell.line.vllm,
        "tree": tree,
        "lock_sha256": read_lock(cell.root, cell.line_name, cell.line, cell.base).digest,
        "subject": subject,
        "presets": _presets(cell, load(cell.root)),
    }


def _presets(cell: ImageCell, matrix: Matrix) -> list[dict[str, Any]]:
    """How the SKU serves: tests of full artifacts start servers like that."""
    rows = []
    for name, preset in matrix.preset.items():
        if preset.sku == cell.sku_name:
            arguments, env = serve_arguments(matrix, name)
            rows.append(
                {
                    "name": name,
                    "artifacts": list(preset.artifacts),
                    "tensor_parallel": preset.tensor_parallel,
                    "speculative_tokens": preset.speculative_tokens,
                    "arguments": arguments,
                    "env": {**cell.sku.env, **env},
                }
            )
    return rows


def _write_source(cell: ImageCell, repo: SourceRepo, base: str, folder: Path) -> None:
    """Parts of the release that the suite's description names."""
    paths = tomllib.loads((cell.root / FILE).read_text(encoding="utf-8"))["release_sources"]
    archive = repo.git("archive", "--format=tar", base, *paths).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")


def _write_variants(cell: ImageCell, repo: SourceRepo, applied: Applied, folder: Path) -> None:
    patches = read_series(cell.root / cell.line.series)
    trees = {PUBLISHED: applied.base}
    for number, patch in enumerate(patches):
        trees[f"without-{patch.name[:4]}"] = without(repo, applied, patches, number).tree
    paths = [file.path for file in changed_files(repo, applied)]
    for name, tree in trees.items():
        for path in paths:
            target = folder / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(repo.git("cat-file", "blob", f"{tree}:{path}").stdout)
