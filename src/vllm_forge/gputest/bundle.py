"""What goes to a GPU host beside the packages: the suite, its plan, and the sources it needs.

``source/`` has what the race suite's positive controls are compiled from. ``variants/<name>/`` has
the Python files that the series changes, as published and with one patch left out: a test lays
them over the installed vLLM to see the error that a patch cures.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_forge.gputest.caches import FOLDERS, cache_key
from vllm_forge.patches import Applied, check_line, read_series
from vllm_forge.patches.variants import without
from vllm_forge.patches.wheel import changed_files
from vllm_forge.receipts.suite import CODECS_FOLDER, TESTS, plan_tier, read_suite, read_tiers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vllm_forge.matrix import ImageCell
    from vllm_forge.patches import Patch
    from vllm_forge.project import Project
    from vllm_forge.sources import SourceRepo

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


def write_bundle(project: Project, cell: ImageCell, repo: SourceRepo, folder: Path) -> Bundle:
    """Fill ``folder``, which must not exist.

    Args:
        project: the checkout.
        cell: SKU and line.
        repo: has the line's source.
        folder: is made.
    """
    applied = check_line(project, cell.line_name, repo)
    copy_code(project.root, folder)
    _write_source(project.root, repo, applied.base, folder / SOURCE)
    _write_variants(read_series(project.root / cell.line.series), repo, applied, folder / VARIANTS)
    return Bundle(folder=folder, tree=applied.result)


def copy_code(root: Path, folder: Path) -> None:
    """Copy the suite, and what it imports of the project."""
    for name in (TESTS, CODECS_FOLDER):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / name, folder / name, ignore=skip)
    for name in ("tests", "src/vllm_forge", "src/vllm_forge/checkpoints"):
        shutil.copyfile(root / name / "__init__.py", folder / name / "__init__.py")


def make_plan(
    project: Project, cell: ImageCell, tree: str, subject: dict[str, Any]
) -> dict[str, Any]:
    """The file that says to the runner what it tests, and by which tiers.

    Raises:
        SuiteDescriptionError: see plan_tier.
    """
    return {
        "sku": cell.sku_name,
        "device": cell.sku.device,
        "compute_capability": cell.sku.compute_capability,
        "line": cell.line_name,
        "vllm": cell.line.vllm,
        "tree": tree,
        "lock_sha256": project.lock(cell.line_name).digest,
        "subject": subject,
        "caches": {"folders": FOLDERS, "key": cache_key(project, cell, tree)},
        "tiers": {
            name: plan_tier(project, name, cell.sku_name) for name in read_tiers(project.root)
        },
    }


def _write_source(root: Path, repo: SourceRepo, base: str, folder: Path) -> None:
    """Parts of the release that the suite's description names."""
    paths = read_suite(root)["release_sources"]
    archive = repo.git("archive", "--format=tar", base, *paths).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")


def _write_variants(
    patches: Sequence[Patch], repo: SourceRepo, applied: Applied, folder: Path
) -> None:
    trees = {PUBLISHED: applied.base}
    for number, patch in enumerate(patches):
        trees[f"without-{patch.name[:4]}"] = without(repo, applied, patches, number).tree
    paths = [file.path for file in changed_files(repo, applied)]
    for name, tree in trees.items():
        for path in paths:
            target = folder / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(repo.git("cat-file", "blob", f"{tree}:{path}").stdout)
