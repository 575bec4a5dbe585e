"""Which compiled kernels an image may carry: those of a GPU run in an image of the same stack."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_forge.gputest.bundle import make_plan
from vllm_forge.gputest.caches import FOLDERS, require_key, stack_key
from vllm_forge.images.prewarm import Prewarm, tree_digest
from vllm_forge.patches import read_tree_lock

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_forge.matrix import ImageCell


def prewarm_of(cell: ImageCell, folder: Path) -> Prewarm:
    """Caches for a cell's image.

    Args:
        cell: SKU and line.
        folder: what ``test-gpu --caches`` left.

    Raises:
        JitCacheError: they are of another GPU architecture, tree or lock, or not of an image.
    """
    tree = read_tree_lock(cell.root / cell.line.series, cell.line_name).result
    key = stack_key(make_plan(cell, tree, {"kind": "image"}))
    require_key(folder, key)
    return Prewarm(
        folder=folder,
        variables={variable: name for name, variable in FOLDERS.items()},
        key=key,
        digest=tree_digest(folder),
    )
