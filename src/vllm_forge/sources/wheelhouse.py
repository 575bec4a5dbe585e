"""The cache of downloaded wheels, addressed by what the lock says of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_forge.host import cache_root, console, exclusive, gigabytes
from vllm_forge.sources.errors import DistributionNotFoundError, HashMismatchError
from vllm_forge.sources.fetch import Download, download_all
from vllm_forge.sources.index import Index

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_forge.sources.lock import LockedWheel


class Wheelhouse:
    """Folder ``wheels/<sha256>/<filename>`` of the cache."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_root() / "wheels"

    def path(self, wheel: LockedWheel) -> Path:
        """Where the wheel is, or will be."""
        return self.folder / wheel.sha256 / wheel.filename

    def missing(self, wheels: Sequence[LockedWheel]) -> list[LockedWheel]:
        """Those not here in full size."""
        paths = [(self.path(wheel), wheel) for wheel in wheels]
        return [w for path, w in paths if not path.exists() or path.stat().st_size != w.size]

    def bytes_to_fetch(self, wheels: Sequence[LockedWheel]) -> int:
        """Bytes that are still to be downloaded."""
        return sum(wheel.size for wheel in self.missing(wheels))

    def fetch(self, wheels: Sequence[LockedWheel], index: Index | None = None) -> None:
        """Download what is missing; returns at once, and asks no index, when nothing is.

        Raises:
            DistributionNotFoundError: the index does not offer a file of the lock.
        """
        if not self.missing(wheels):
            return
        with exclusive("wheelhouse", wait=True):
            todo = self.missing(wheels)
            if not todo:
                return
            source = index or Index()
            offered = source.files_of(wheel.name for wheel in todo)
            downloads = []
            for wheel in todo:
                urls = [f.url for f in offered[wheel.name] if f.filename == wheel.filename]
                if not urls:
                    raise DistributionNotFoundError(
                        f"the index does not offer {wheel.filename}",
                        where=source.url,
                        remedy="it may have been yanked or your mirror may lack it: use another "
                        "index, or make a new lock",
                    )
                downloads.append(
                    Download(
                        url=urls[0], sha256=wheel.sha256, size=wheel.size, target=self.path(wheel)
                    )
                )
            download_all(source.session, downloads)
            size = gigabytes(sum(item.size for item in downloads))
            console.print(f"  [dim]{len(downloads)} wheels downloaded, {size}[/]")

    def verify(self, wheel: LockedWheel) -> Path:
        """Path of a wheel whose bytes were hashed just now.

        Raises:
            HashMismatchError: the cached file was changed since it was downloaded.
        """
        path = self.path(wheel)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != wheel.sha256:
            raise HashMismatchError(
                f"{wheel.filename} in the cache has sha256 {digest}, the lock says {wheel.sha256}",
                where=str(path),
                remedy="delete that file and build again",
            )
        return path
