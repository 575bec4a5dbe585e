"""One folder for what JIT compilers make, with the key of the stack that it was made for.

Most compilers would notice by themselves that a result is stale, and not all of them do. Folders,
their variables and the key are the plan's.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.gpu.harness.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

KEY = "caches.json"


def open_caches(folder: Path, plan: dict[str, Any]) -> dict[str, str]:
    """Make what is missing; variables for the processes that compile.

    Raises:
        InputError: the folder is of another stack, or not of the suite.
    """
    path, key = folder / KEY, plan["caches"]["key"]
    if folder.is_dir() and any(folder.iterdir()):
        try:
            recorded = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            recorded = f"{type(error).__name__}: {error}"
        if recorded != key:
            raise InputError(
                f"--caches is of another stack, or not of the suite: expected {key}, "
                f"found {recorded}",
                where=str(path),
                remedy="name an empty folder",
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
    for name in plan["caches"]["folders"]:
        (folder / name).mkdir(exist_ok=True)
    return {variable: str(folder / name) for name, variable in plan["caches"]["folders"].items()}


def count_files(folder: Path) -> int:
    """Number of compiled files; those beside the compilers' folders are the suite's."""
    return sum(path.is_file() and path.parent != folder for path in folder.rglob("*"))


def warm_file(folder: Path, tier: str) -> Path:
    """Exists once a green run of the tier left its kernels in the caches."""
    return folder / f"warm-{tier}"
