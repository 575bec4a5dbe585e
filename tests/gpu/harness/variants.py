"""The installed vLLM with other Python files: as published, or with one patch left out.

A package folder of hard links in which a few files are replaced. Put before the site-packages on
PYTHONPATH, it is what ``import vllm`` finds; its native code is the installed one's.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

PACKAGE = "vllm"


def installed() -> Path:
    """Folder of the installed package.

    Raises:
        ModuleNotFoundError: there is none.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"no {PACKAGE} is installed")
    return Path(found.origin).parent


def lay_over(package: Path, files: Path, target: Path) -> Path:
    """Make ``target/vllm`` from an installed package and replacing files; return ``target``.

    Args:
        package: the installed folder; it is not touched.
        files: has ``vllm/...`` with the files that differ; each must be there in the package.
        target: is made.

    Raises:
        FileNotFoundError: a file to be replaced is not in the package.
    """
    shutil.copytree(
        package, target / PACKAGE, copy_function=_link, ignore=shutil.ignore_patterns("__pycache__")
    )
    for path in sorted(files.rglob("*.py")):
        place = target / path.relative_to(files)
        place.unlink()  # a link: writing through it would change the installed file
        shutil.copyfile(path, place)
    return target


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
    return target
