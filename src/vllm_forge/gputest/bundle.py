"""What goes to a GPU host beside the packages: the suite, its plan, and the sources it needs.

``source/`` has what the race suite's positive controls are compiled from. ``variants/<name>/`` has
the Python files that the series changes, as published and with one patch left out: a test lays
them over the installed vLLM to see the error that a patch cures.

What JIT compilers left there goes into kits and images. Triton, TileLang and others compile kernels
when a model first runs; DeepSeek-V4 waits for minutes. Each keeps its results where an environment
variable says. The runner (tests/gpu/harness/run.py) writes a key beside them, of the stack that
they are for.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_forge.gputest.errors import JitCacheError
from vllm_forge.host import read_data
from vllm_forge.images.prewarm import Prewarm, require_plain, tree_digest
from vllm_forge.matrix import ImageCell
from vllm_forge.patches import Applied, Patch, check_line, read_series, read_tree_lock
from vllm_forge.patches.series import without
from vllm_forge.patches.wheel import changed_files
from vllm_forge.project import Project
from vllm_forge.receipts.errors import ReceiptSubjectError
from vllm_forge.receipts.suite import CODECS_FOLDER, TESTS, plan_tier, read_suite
from vllm_forge.sources import SourceRepo

SOURCE, VARIANTS = "source", "variants"
PUBLISHED = "published"
KEY = "caches.json"
# Folder -> the variable that names it.
FOLDERS = {
    "vllm": "VLLM_CACHE_ROOT",
    "triton": "TRITON_CACHE_DIR",
    "inductor": "TORCHINDUCTOR_CACHE_DIR",
    "deep_gemm": "DG_JIT_CACHE_DIR",
    "flashinfer": "FLASHINFER_WORKSPACE_BASE",
    "tilelang": "TILELANG_CACHE_DIR",
    "cute": "CUTE_DSL_CACHE_DIR",
    "cuda": "CUDA_CACHE_PATH",
    "trtllm": "TRTLLM_DG_CACHE_DIR",
}


@dataclass(frozen=True, kw_only=True)
class SuiteImage:
    """An image that the suite runs in; ``digest`` is the SHA-256 of its manifest, hex."""

    name: str
    digest: str
    labels: Mapping[str, str]


def write_bundle(
    project: Project, cell: ImageCell, image: SuiteImage, folder: Path
) -> dict[str, Any]:
    """Fill ``folder``, which must not exist; returns the plan, which is in its plan.json.

    ReceiptSubjectError: the image is of another SKU, line, lock or tree.
    """
    repo = SourceRepo()
    applied = check_line(project, cell.line_name, repo)
    plan = make_plan(project, cell, applied.result, image)
    copy_code(project.root, folder)
    repo.unpack(applied.base, read_suite(project.root).release_sources, folder / SOURCE)
    _write_variants(read_series(project.root / cell.line.series), repo, applied, folder / VARIANTS)
    (folder / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")
    return plan


def copy_code(root: Path, folder: Path) -> None:
    """Copy the suite, and what it imports of the project."""
    for name in (TESTS, CODECS_FOLDER):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / name, folder / name, ignore=skip)
    for name in ("tests", "src/vllm_forge", "src/vllm_forge/checkpoints"):
        shutil.copyfile(root / name / "__init__.py", folder / name / "__init__.py")


def make_plan(project: Project, cell: ImageCell, tree: str, image: SuiteImage) -> dict[str, Any]:
    """What the runner tests, and by which tiers; refuses an image of another cell, lock or tree."""
    lock = project.lock(cell.line_name).digest
    expected = {
        "sku": cell.sku_name, "line": cell.line_name, "tree": tree, "lock": f"sha256:{lock}"
    }  # fmt: skip
    for name, value in expected.items():
        if (actual := image.labels.get(f"io.vllm-forge.{name}")) != value:
            raise ReceiptSubjectError(
                f"the image's {name} is {actual}, expected {value}",
                where=image.name,
                remedy=f"build {cell.name} again, or name the right --sku, --line and --image",
            )
    return {
        "sku": cell.sku_name,
        "device": cell.sku.device,
        "compute_capability": cell.sku.compute_capability,
        "line": cell.line_name,
        "vllm": cell.line.vllm,
        "tree": tree,
        "lock_sha256": lock,
        "subject": {"name": image.name, "sha256": image.digest},
        "caches": {"folders": FOLDERS, "key": cache_key(project, cell, tree)},
        "tiers": {
            name: plan_tier(project, name, cell.sku_name) for name in read_suite(project.root).tier
        },
    }


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


def cache_key(project: Project, cell: ImageCell, tree: str) -> dict[str, str]:
    """What kernels are compiled for: the GPU's architecture, the source's tree, all packages."""
    return {
        "compute_capability": cell.sku.compute_capability,
        "tree": tree,
        "kind": "image",  # of images that carry kernels, the digest depends on it
        "stack": project.lock(cell.line_name).digest,
    }


def require_key(folder: Path, key: Mapping[str, str]) -> None:
    """Refuse a folder of ``test-gpu --caches`` with links, or with kernels of another stack."""
    recorded = read_data(
        folder / KEY,
        lambda data: {name: data[name] for name in key},
        JitCacheError,
        what="key of the caches of a run",
        remedy="take the folder that --caches made",
    )
    if different := [name for name in key if recorded[name] != key[name]]:
        name = different[0]
        raise JitCacheError(
            f"the caches are of another stack: {name} is {recorded[name]}, expected {key[name]}",
            where=str(folder / KEY),
            remedy="run the suite with an empty --caches folder",
        )
    require_plain(folder)  # a link would bring files of this host into an image or a kit


def prewarm_of(project: Project, cell: ImageCell, folder: Path) -> Prewarm:
    """Kernels for a cell's image: what ``test-gpu --caches`` left in ``folder``, of its stack."""
    tree = read_tree_lock(project.root / cell.line.series, cell.line_name).result
    key = cache_key(project, cell, tree)
    require_key(folder, key)
    return Prewarm(
        folder=folder,
        variables={variable: name for name, variable in FOLDERS.items()},
        key=key,
        digest=tree_digest(folder),
    )
