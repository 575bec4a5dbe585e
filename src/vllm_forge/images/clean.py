"""What the cache holds that no line of the matrix needs any more."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_forge.host import cache_root, exclusive, remove, tree_bytes
from vllm_forge.images.base import rootfs_key
from vllm_forge.images.content import wheel_groups
from vllm_forge.images.engines import ENGINES
from vllm_forge.images.plan import BuildOptions, resolve
from vllm_forge.images.system import system_key
from vllm_forge.matrix import image_cell
from vllm_forge.patches import read_tree_lock

if TYPE_CHECKING:
    from vllm_forge.matrix import Matrix

# Small, or made again in a minute.
ALWAYS = (
    "work", "bytecode", "buildah", "census", "checkpoints", "inspect", "oracle", "proofs",
    "toolkit",
)  # fmt: skip


def clean(root: Path, matrix: Matrix, *, everything: bool) -> int:
    """Delete what is stale, or everything; return the bytes freed.

    Images in dist/ are not touched: their blobs are links of their own.

    Args:
        root: the checkout.
        matrix: says what is needed.
        everything: also what the next build would have to download again.

    Raises:
        BusyError: a build or a proof is running.
        LockFileError: a line's lock cannot be read, so what it needs is not known.
    """
    cache = cache_root()
    with ExitStack() as held:
        for sku in matrix.sku:
            for line in matrix.line.values():
                held.enter_context(exclusive(f"build-vllm-{line.vllm}-{sku}", wait=False))
        for name in matrix.line:
            held.enter_context(exclusive(f"prove-{name}", wait=False))
            held.enter_context(exclusive(f"oracle-{name}", wait=False))
            held.enter_context(exclusive(f"inspect-{name}", wait=False))
        if everything:
            doomed = [path for path in _children(cache) if path.name != "locks"]
        else:
            needed = _needed(root, matrix)
            doomed = [cache / name for name in ALWAYS if (cache / name).exists()]
            for folder, keys in needed.items():
                doomed += [path for path in _children(cache / folder) if path.name not in keys]
        freed = 0
        for path in doomed:
            freed += tree_bytes(path)
            remove(path)
    return freed


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _needed(root: Path, matrix: Matrix) -> dict[str, set[str]]:
    """Folder of the cache -> names in it that a build of some line would use."""
    needed: dict[str, set[str]] = {
        "layers": set(),
        "patched": set(),
        "rootfs": {rootfs_key(matrix.base)},
        "sdists": set(),
        "systems": set(),
        "wheels": set(),
    }
    for name, line in matrix.line.items():
        cell = image_cell(matrix, root, line.skus[0], name)
        tree = read_tree_lock(root / line.series, name)
        needed["sdists"].add(tree.sha256)
        for make in ENGINES.values():
            plan = resolve(cell, BuildOptions(output=root / "dist"), make())
            needed["systems"].add(system_key(cell, plan.base, plan.engine))
            for sku in line.skus:
                for group in wheel_groups(image_cell(matrix, root, sku, name), plan.lock):
                    needed["layers"].update({group.key, group.slim_key or group.key})
            needed["wheels"].update(wheel.sha256 for wheel in plan.lock.wheels)
            needed["patched"].add(f"{plan.lock.find('vllm').sha256}-{tree.result}")
    return needed
