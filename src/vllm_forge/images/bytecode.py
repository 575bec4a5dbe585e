"""Python's bytecode of runs in an image's files, which takes longer to make than the checks.

It is code that nothing can be compared with, so it is used again only if it is as it was left.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm_forge.host import hash_of, remove
from vllm_forge.host.files import file_digest, read_sealed, walk_plain, write_sealed


@contextmanager
def kept_bytecode(folder: Path) -> Iterator[None]:
    """Let runs use what earlier ones left in a folder, unless something else changed it since.

    Code of the image writes it, and so does another build that uses it at the same time: what a run
    finds of that is deleted, and Python compiles it again.
    """
    seal, kept = folder.with_name(f"{folder.name}.json"), False
    with suppress(OSError, ValueError):  # of a first run; of a damaged seal
        kept = read_sealed(seal) == {"files": _digest(folder) or "unknown"}
    if not kept:
        remove(folder)
    try:
        yield
    finally:
        if folder.is_dir():
            write_sealed(seal, {"files": _digest(folder)})


def _digest(folder: Path) -> str:
    """Hash of a folder's files; empty if it has something else, or is missing."""
    try:
        rows = {name: file_digest(folder / name) for name in walk_plain(folder)}
    except (OSError, ValueError):
        return ""
    return hash_of(rows, sort_keys=True)
