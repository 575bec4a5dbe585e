"""Nothing half-written: write aside, then rename; one writer at a time; disk checked first."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_forge.host.console import console
from vllm_forge.host.errors import BusyError, DiskSpaceError
from vllm_forge.host.mounts import unmount_below

if TYPE_CHECKING:
    from collections.abc import Iterator

GIB = 1 << 30
READ_ONLY = 0o444  # mode of blobs: images share them by hard links


def cache_root() -> Path:
    """Folder for downloads, layers and unpacked trees.

    ``VLLM_FORGE_CACHE`` if set, else ``$XDG_CACHE_HOME/vllm-forge``.
    """
    if chosen := os.environ.get("VLLM_FORGE_CACHE"):
        return Path(chosen).expanduser().resolve()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "vllm-forge"


@contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Yield a fresh path beside ``final`` and rename it there when the block succeeds.

    The path may become a file or a folder. On an exception, or on kill -9, ``final`` is
    untouched; leftovers start with ``.tmp-`` and are removed by the next writer.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    # mkdtemp's eight characters exactly: "x-*" would also find what is being written for "x-y".
    for stale in final.parent.glob(f".tmp-{glob.escape(final.name)}-????????"):
        remove(stale)
    aside = Path(tempfile.mkdtemp(prefix=f".tmp-{final.name}-", dir=final.parent))
    inner = aside / final.name
    try:
        yield inner
        if inner.is_dir() and final.is_dir():
            # rename(2) does not replace a folder that is not empty: move the old one aside first.
            final.rename(aside / ".replaced")
        inner.rename(final)
    finally:
        remove(aside)


def move(source: Path, target: Path) -> None:
    """Rename, or copy and delete where the two are on different file systems."""
    shutil.move(source, target)


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to a file, or a copy where they are on different file systems."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        target.chmod(READ_ONLY)


def remove(path: Path) -> None:
    """Delete a file or a folder with all it holds.

    Raises:
        MountedError: something is mounted in it and cannot be unmounted.
    """
    if path.is_dir() and not path.is_symlink():
        unmount_below(path)  # deleting would go through a mount, or stop halfway at one
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tree_bytes(path: Path) -> int:
    """Bytes on disk below a path, as the file system counts them."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_blocks * 512
    return sum(tree_bytes(Path(entry.path)) for entry in os.scandir(path))


@contextmanager
def exclusive(name: str, *, wait: bool) -> Iterator[None]:
    """Hold the lock ``name`` of this cache; the kernel drops it when the process dies.

    Args:
        name: what is locked, for the file name and the message.
        wait: block until it is free; otherwise a taken lock is an error.

    Raises:
        BusyError: the lock is taken and ``wait`` is false.
    """
    folder = cache_root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            if not wait:
                raise BusyError(
                    f"{name} is being worked on by process {holder}",
                    where=str(path),
                    remedy="wait until it ends, or end it",
                ) from None
            console.print(f"  waiting for process {holder}, which works on {name}", style="dim")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that will hold ``path`` (it need not exist yet)."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def require_disk(needs: dict[Path, int]) -> None:
    """Refuse before the first byte when the disk cannot hold what is to come.

    Args:
        needs: bytes to be written below each path; paths of one file system are added up.

    Raises:
        DiskSpaceError: with the missing amount and the paths.
    """
    by_device: dict[int, list[tuple[Path, int]]] = {}
    for path, size in needs.items():
        existing = path
        while not existing.exists():
            existing = existing.parent
        by_device.setdefault(existing.stat().st_dev, []).append((path, size))
    for items in by_device.values():
        need = sum(size for _, size in items)
        free = min(free_bytes(path) for path, _ in items)
        if need > free:
            raise DiskSpaceError(
                f"about {need / GIB:.1f} GiB are needed and {free / GIB:.1f} GiB are free",
                where=", ".join(str(path) for path, _ in items),
                remedy="free some space, or set VLLM_FORGE_CACHE / --output to a larger disk",
            )
