"""A series: the ordered list of a line's patches, exactly the patch files of its folder."""

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
        raise PatchMissingError("no series file", where=str(path))
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
                f"the series lists {name}, which does not exist",
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


def series_text(folder: Path, names: list[str]) -> str:
    """The series file for ``names``; a comment stays above the patch that it is above now."""
    comments: dict[str, list[str]] = {}
    pending: list[str] = []
    for row in (folder / "series").read_text(encoding="utf-8").splitlines():
        if row.startswith("#") or not row.strip():
            pending.append(row)
        else:
            comments[row.strip()], pending = pending, []
    rows = [row for name in names for row in [*comments.get(name, []), name]]
    return "".join(f"{row}\n" for row in [*rows, *pending])
