"""Python's bytecode of runs in an image's files, which takes longer to make than the checks.

It is code that nothing can be compared with, so it is used again only if it is as it was left.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm_forge.host import remove
from vllm_forge.host.files import folder_stamp, read_sealed, write_sealed


@contextmanager
def kept_bytecode(folder: Path) -> Iterator[None]:
    """Let runs use what earlier ones left in a folder, unless something else changed it since.

    Code of the image writes it, and so does another build that uses it at the same time: what a run
    finds of that is deleted, and Python compiles it again.
    """
    seal, kept = folder.with_name(f"{folder.name}.json"), False
    with suppress(OSError, ValueError):  # of a first run; of a damaged seal
        kept = read_sealed(seal) == {"files": folder_stamp(folder)}
    if not kept:
        remove(folder)
    try:
        yield
    finally:
        seal.unlink(missing_ok=True)
        with suppress(OSError, ValueError):  # no run took place; or it left no plain files
            write_sealed(seal, {"files": folder_stamp(folder)})
