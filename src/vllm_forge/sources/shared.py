"""Downloads that hosts share: a folder of files by SHA-256, such as one on NFS.

It has no locks. That of a node that died may stay for ever (NFS 3), or hold on one host only (mount
option local_lock); and none is needed, as a file is written under a name of its own, then renamed:
who comes second replaces it by the same bytes. It has no hard links, as clients and servers may
refuse them. Nothing there is believed: each file is hashed on the way into this host's own cache.
"""

import hashlib
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from vllm_forge.errors import UsageError
from vllm_forge.host import READ_ONLY, atomic_path, console, open_plain

VARIABLE = "VLLM_FORGE_SHARED"
NEW = ".new-"
STALE_S = 86400.0  # after which a writer is dead; clocks of hosts differ by less
CHUNK = 1 << 20


def shared_folder() -> Path | None:
    """The folder that VARIABLE names, which must exist: a mount may be missing."""
    if not (text := os.environ.get(VARIABLE)):
        return None
    if not (folder := Path(text)).is_absolute() or not folder.is_dir():
        what = f"{VARIABLE} is not an absolute path of a directory: {text!r}"
        raise UsageError(what, remedy="mount it, make it, or unset the variable")
    return folder


def _place(folder: Path, sha256: str) -> Path:
    return folder / "downloads" / sha256[:2] / sha256


def take(sha256: str, most: int, target: Path) -> bool:
    """Copy a file from the shared folder, if it is there; ``target`` appears by one rename.

    One that has other bytes than its name says, or more than ``most``, is deleted there.
    """
    if (folder := shared_folder()) is None or not sha256:
        return False
    place, digest = _place(folder, sha256), hashlib.sha256()
    try:
        with open_plain(place) as source, atomic_path(target) as aside, aside.open("xb") as copy:
            while block := source.read(CHUNK):
                if source.tell() > most:
                    raise ValueError("too long")  # noqa: TRY301
                digest.update(block)
                copy.write(block)
            if digest.hexdigest() != sha256:
                raise ValueError("damaged")  # noqa: TRY301
    except FileNotFoundError:
        return False
    except ValueError:
        console.print(f"  not taken: {place} is damaged", style="dim", markup=False)
        with suppress(OSError):  # a folder, read-only there, or another host was first
            place.unlink()
        return False
    except OSError as error:  # a stale handle, a server that is gone: the index has it too
        console.print(f"  not taken from {VARIABLE}: {error}", style="dim", markup=False)
        return False
    return True


def give(path: Path, sha256: str, folder: Path | None) -> None:
    """Have a file, which was hashed just now, in a shared folder; failing that is only said."""
    if folder is None:
        return
    place = _place(folder, sha256)
    try:
        if place.exists():
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        for other in place.parent.glob(f"{NEW}*"):
            with suppress(FileNotFoundError):
                if time.time() - other.stat().st_mtime > STALE_S:
                    other.unlink()
        _write(path, place)
    except OSError as error:
        console.print(f"  not shared in {VARIABLE}: {error}", style="dim", markup=False)


def _write(source: Path, place: Path) -> None:
    """Copy a file under a name that no other host has, and rename it when the server has it."""
    with tempfile.NamedTemporaryFile(prefix=NEW, dir=place.parent, delete=False) as copy:
        aside = Path(copy.name)
        try:
            with source.open("rb") as file:
                shutil.copyfileobj(file, copy, CHUNK)
            copy.flush()
            os.fsync(copy.fileno())
            os.fchmod(copy.fileno(), READ_ONLY)  # not by its name, which may be another file's now
            aside.rename(place)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
