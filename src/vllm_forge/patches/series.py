"""A series: the ordered list of a line's patches, exactly the files that lie beside it."""

from __future__ import annotations

from pathlib import Path

from vllm_forge.patches.errors import (
    AppliedTwiceError,
    PatchMissingError,
    PatchUnlistedError,
)
from vllm_forge.patches.header import Patch, read_patch


def read_series(folder: Path) -> tuple[Patch, ...]:
    """Parse ``folder/series`` and all its patches.

    Lines that start with # are comments.

    Raises:
        PatchMissingError: the series file, or a patch that it lists, does not exist.
        PatchUnlistedError: a .patch file that the series does not list.
        AppliedTwiceError: a patch is listed twice.
        ForgeError: see read_patch.
    """
    path = folder / "series"
    if not path.is_file():
        raise PatchMissingError("there is no series file", where=str(path))
    names = [
        line.strip()
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    for name in names:
        if names.count(name) > 1:
            raise AppliedTwiceError(
                f"{name} is listed twice", where=str(path), remedy="delete one of the lines"
            )
        if not (folder / name).is_file():
            raise PatchMissingError(
                f"the series lists {name}, which is not there",
                where=str(path),
                remedy="add the file, or delete the line",
            )
    present = {file.name for file in folder.iterdir() if file.suffix in {".patch", ".diff"}}
    if unlisted := sorted(present - set(names)):
        raise PatchUnlistedError(
            f"not in the series: {', '.join(unlisted)}",
            where=str(path),
            remedy="list it where it belongs, or delete the file",
        )
    return tuple(read_patch(folder / name) for name in names)
