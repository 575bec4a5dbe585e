"""What JIT compilers leave on a GPU host: its folders and key, and its way into kits and images.

Triton, TileLang and others compile kernels when a model first runs; DeepSeek-V4 waits for minutes.
Each keeps its results where an environment variable says. The runner (tests/gpu/harness/caches.py)
writes a key beside them, of the stack that they are for.
"""

from collections.abc import Mapping
from pathlib import Path

from vllm_forge.gputest.errors import JitCacheError
from vllm_forge.host import parse_json, read_plain
from vllm_forge.images.prewarm import Prewarm, require_plain, tree_digest
from vllm_forge.matrix import ImageCell
from vllm_forge.patches import read_tree_lock
from vllm_forge.project import Project

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
    try:
        recorded = parse_json(read_plain(folder / KEY))
        different = [name for name in key if recorded[name] != key[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JitCacheError(
            f"not the caches of a run: {type(error).__name__}: {error}",
            where=str(folder / KEY),
            remedy="take the folder that --caches made",
        ) from None
    if different:
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
