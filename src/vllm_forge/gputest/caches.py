"""What JIT compilers leave on a GPU host, in one folder that can be taken to the next start.

Triton, TileLang, DeepGEMM, FlashInfer, Inductor and the driver compile kernels when a model first
runs; DeepSeek-V4 waits for minutes. Each compiler keeps its results where an environment variable
says. A key beside them says for which stack they were made: most compilers would find out by
themselves that a result is stale, and not all of them do.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vllm_forge.gputest.errors import JitCacheError

KEY = "caches.json"
TESTERS = ("execnet==", "iniconfig==", "pluggy==", "pytest-", "pytest==")
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


def stack_key(plan: dict[str, Any], packages: str = "") -> dict[str, str]:
    """What compiled kernels are good for: the GPU's architecture, our source, all other packages.

    Args:
        plan: of tests.gpu.harness.run.
        packages: those of an environment, see vllm_forge.receipts.packages. Of an image, the lock
            says them, so that an image with the kernels in it has the same key.
    """
    image = plan["subject"]["kind"] == "image"
    return {
        "compute_capability": plan["compute_capability"],
        "tree": plan["tree"],
        "kind": plan["subject"]["kind"],
        "stack": plan["lock_sha256"] if image else packages_digest(packages),
    }


def packages_digest(packages: str) -> str:
    """SHA-256 in hex of a list of packages, without those that run tests and compile nothing."""
    rows = [row for row in packages.splitlines() if not row.startswith(TESTERS)]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def open_caches(folder: Path, key: dict[str, str]) -> dict[str, str]:
    """Make what is missing; variables for the processes that compile.

    Raises:
        JitCacheError: the folder is of another stack, or not ours.
    """
    if folder.is_dir() and any(folder.iterdir()):
        require_key(folder, key)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / KEY).write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
    for name in FOLDERS:
        (folder / name).mkdir(exist_ok=True)
    return variables(folder)


def variables(folder: Path) -> dict[str, str]:
    """Variable -> where its compiler's results are below ``folder``."""
    return {variable: str(folder / name) for name, variable in FOLDERS.items()}


def require_key(folder: Path, key: dict[str, str]) -> None:
    """Refuse what was compiled for another stack.

    Raises:
        JitCacheError: with the first difference.
    """
    try:
        found = json.loads((folder / KEY).read_text(encoding="utf-8"))
        different = [name for name in key if found[name] != key[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JitCacheError(
            f"these are no caches of the suite: {type(error).__name__}: {error}",
            where=str(folder / KEY),
            remedy="take the folder that --caches made",
        ) from None
    if different:
        name = different[0]
        raise JitCacheError(
            f"these caches were compiled for another stack: {name} is {found[name]}, "
            f"here it is {key[name]}",
            where=str(folder / KEY),
            remedy="let the suite make new ones: run it with an empty --caches folder",
        )


def count_files(folder: Path) -> int:
    """How much is there; 0 of a cold start."""
    return sum(path.is_file() and path.name != KEY for path in folder.rglob("*"))
