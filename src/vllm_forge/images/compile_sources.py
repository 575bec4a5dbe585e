"""Compile Python's sources inside an image, by its own Python: what ``images.bytecode`` bakes.

Started with ``-I -S``, so that no file of a wheel runs; arguments: folders with sources. Writes a
tar of ``__pycache__`` files, sorted by path, to /media. Same sources, same bytes: marshal sorts
sets, and what it notes as shared depends on one source alone.

A file is bound to its source by a hash, which Python compares at each import, and not by a time:
all files of an image have one time, and a file that somebody mounts over a source counts.
"""

from __future__ import annotations

import importlib.util
import io
import marshal
import multiprocessing
import os
import sys
import tarfile
import warnings
from pathlib import Path

FOLDER = Path("/media")
NAME = "bytecode.tar"
CHECKED_HASH = 0b11  # flags of a .pyc, PEP 552: it has a hash; compare it with the source


def compiled(path: str) -> bytes | None:
    """The .pyc of a source; None for what does not parse, such as a template."""
    source = Path(path).read_bytes()
    try:
        code = compile(source, path, "exec", dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError):
        return None
    head = importlib.util.MAGIC_NUMBER + CHECKED_HASH.to_bytes(4, "little")
    return head + importlib.util.source_hash(source) + marshal.dumps(code)


def sources(*roots: str) -> list[str]:
    """All Python files below these folders, sorted; links are not followed."""
    return sorted(
        os.path.join(folder, name)  # noqa: PTH118 - 30,000 of them
        for root in roots
        for folder, _, names in os.walk(root)
        for name in names
        if name.endswith(".py") and not os.path.islink(os.path.join(folder, name))  # noqa: PTH114, PTH118
    )


def main(*roots: str) -> None:
    """Write the tar."""
    warnings.simplefilter("ignore")  # of sources
    paths = sources(*roots)
    with (
        multiprocessing.get_context("fork").Pool() as pool,
        tarfile.open(FOLDER / NAME, "w") as tar,
    ):
        for path, content in zip(paths, pool.imap(compiled, paths, 16), strict=True):
            if content is not None:
                info = tarfile.TarInfo(importlib.util.cache_from_source(path, optimization=""))
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


if __name__ == "__main__":
    main(*sys.argv[1:])
