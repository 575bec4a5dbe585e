"""JIT caches that a run on such a host left, into a kit."""

from __future__ import annotations

import contextlib
import io
import json
import lzma
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_forge.gputest.caches import FOLDERS, KEY, require_key
from vllm_forge.gputest.errors import KitError

if TYPE_CHECKING:
    from typing import BinaryIO


PACKED = "caches.tar.xz"
CHUNK = 1 << 24


def require_caches(source: Path) -> list[Path]:
    """The folder, the tar or its pieces; before anything is made.

    Raises:
        KitError: there is none.
    """
    if source.exists():
        return [source]
    if pieces := sorted(source.parent.glob(f"{source.name}.[0-9][0-9]")):
        return pieces
    raise KitError(
        "no such caches",
        where=str(source),
        remedy=f"--caches takes a folder, or the {PACKED} that a run of a kit left",
    )


def pack_caches(source: Path, content: Path, key: dict[str, str]) -> str | None:
    """Put them into a kit's content; return where compilers had them, if one of them says so.

    Args:
        source: the folder, the tar that a run packed, or that name where it is cut in pieces
            (``caches.tar.xz.00``, ...).
        content: gets ``caches.tar.xz``.
        key: what of the stack is known here; the host compares its packages, too.

    Raises:
        KitError: it is none of these.
        JitCacheError: they are of another stack.
    """
    with tempfile.TemporaryDirectory(dir=content.parent) as work:
        folder = Path(work) / "caches"
        _copy(source, folder)
        require_key(folder, key)
        with tarfile.open(content / PACKED, "w:xz", preset=1) as tar:
            tar.add(folder, arcname=folder.name)
        return _compiled_at(folder)


def _compiled_at(folder: Path) -> str | None:
    """Triton lists the files of a kernel with absolute paths, and misses those that were moved."""
    for group in sorted((folder / "triton").glob("*/__grp__*.json")):
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            child = next(iter(json.loads(group.read_text())["child_paths"].values()), "")
            return str(Path(child).parents[2])  # of FOLDER/triton/HASH/file
    return None


def _copy(source: Path, target: Path) -> None:
    pieces = require_caches(source)
    try:
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            with (
                lzma.open(_joined(pieces)) as packed,
                tarfile.open(fileobj=packed, mode="r|") as tar,
            ):
                tar.extractall(target.parent, filter="data")
                while packed.read(CHUNK):
                    pass  # to the end, where the check of all that was read stands
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
        raise KitError(
            f"not the caches of a run: {error}",
            where=str(source),
            remedy=f"copy {PACKED}, or all of its pieces, again",
        ) from None
    names = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if KEY not in names or names - {KEY, *FOLDERS}:
        raise KitError(
            f"a folder of caches has {KEY} and folders of compilers, this has {sorted(names)}",
            where=str(source),
            remedy=f"compilers: {', '.join(FOLDERS)}",
        )


def _joined(pieces: list[Path]) -> BinaryIO:
    return io.BytesIO(b"".join(piece.read_bytes() for piece in pieces))
