"""JIT caches that a run on such a host left, into a kit."""

from __future__ import annotations

import io
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_forge.errors import KitError
from vllm_forge.gpu.caches import FOLDERS, KEY

if TYPE_CHECKING:
    from typing import BinaryIO


PACKED = "caches.tar.xz"


def pack_caches(source: Path, content: Path) -> None:
    """Put them into a kit's content; whether they are of this stack is checked on the host.

    Args:
        source: the folder, the tar that a run packed, or that name where it is cut in pieces
            (``caches.tar.xz.00``, ...).
        content: gets ``caches.tar.xz``.

    Raises:
        KitError: it is none of these.
    """
    with tempfile.TemporaryDirectory(dir=content.parent) as work:
        folder = Path(work) / "caches"
        _copy(source, folder)
        with tarfile.open(content / PACKED, "w:xz", preset=1) as tar:
            tar.add(folder, arcname=folder.name)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        pieces = [source] if source.is_file() else sorted(source.parent.glob(f"{source.name}.*"))
        if not pieces:
            raise KitError("no such caches", where=str(source))
        try:
            with tarfile.open(fileobj=_joined(pieces), mode="r:xz") as tar:
                tar.extractall(target.parent, filter="data")
        except (OSError, EOFError, tarfile.TarError) as error:
            raise KitError(f"not the caches of a run: {error}", where=str(source)) from None
    names = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if KEY not in names or names - {KEY, *FOLDERS}:
        raise KitError(
            f"a folder of caches has {KEY} and folders of compilers, this has {sorted(names)}",
            where=str(source),
            remedy=f"compilers: {', '.join(FOLDERS)}",
        )


def _joined(pieces: list[Path]) -> BinaryIO:
    return io.BytesIO(b"".join(piece.read_bytes() for piece in pieces))
