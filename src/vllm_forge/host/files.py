"""Files of this host: atomic writes, locks, free disk, mounts."""

import errno
import fcntl
import glob
import hashlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import ValidationError

from vllm_forge.errors import ForgeError, problems
from vllm_forge.host import errors
from vllm_forge.host.console import console

T = TypeVar("T")
SHOWN = 200  # characters of a key
SURROGATES = re.compile(r"\\u[dD][89a-fA-F]")  # JSON writes some characters as a pair of them
MOST_BYTES = 1 << 26  # of a record; the largest is about 2 MB
GIB = 1 << 30
MOUNT_TABLE = Path("/proc/self/mountinfo")
ORPHANS_S = 30  # in which what a killed command started has ended
READ_ONLY = 0o444  # mode of blobs: images share them by hard links


def cache_root() -> Path:
    """``VLLM_FORGE_CACHE``, else ``$XDG_CACHE_HOME/vllm-forge``: downloads, layers and trees."""
    try:
        if chosen := os.environ.get("VLLM_FORGE_CACHE"):
            return Path(chosen).expanduser().resolve()
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # a user without a home, or unknown
        raise errors.CacheError(str(error), remedy="set VLLM_FORGE_CACHE to a folder") from None
    return base / "vllm-forge"


@contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Yield a fresh path in the folder of ``final`` and rename it there when the block succeeds.

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


def open_plain(path: Path, folder: int | None = None) -> io.BufferedReader:
    """Open a file that others may have written; ValueError for a link, a FIFO or a device.

    ``folder``: descriptor of the open folder that ``path`` is relative to.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, dir_fd=folder)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:  # a link; a socket
            raise ValueError("not a plain file") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("not a plain file")
    return os.fdopen(descriptor, "rb")


def read_plain(path: Path, most: int = MOST_BYTES) -> bytes:
    """Content of a file, see ``open_plain``; ValueError for one of more than ``most`` bytes."""
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(most + 1) if size <= most else b""
    if max(size, len(content)) > most:  # it may have grown
        raise ValueError(f"larger than {most} bytes")
    return content


def file_digest(path: Path) -> str:
    """SHA-256 of a plain file, hex; see ``open_plain``."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inode(status: os.stat_result) -> list[int]:
    """A file's identity, mode, size and times, as in git's index.

    The change time cannot be set back, so a file that was written to has another one.
    """
    times = [status.st_mtime_ns, status.st_ctime_ns]
    return [status.st_dev, status.st_ino, status.st_mode, status.st_size, *times]


def folder_digest(folder: Path) -> str:
    """SHA-256 over names and contents of a folder's files; ValueError if one is not plain."""
    rows = {name: file_digest(folder / name) for name in walk_plain(folder)}
    return hash_of(rows, sort_keys=True)


def folder_stamp(folder: Path) -> str:
    """Hash of what the file system says of a folder's files; ValueError if one is not plain."""
    rows = {name: inode(os.lstat(f"{folder}/{name}")) for name in walk_plain(folder)}
    return hash_of(rows, sort_keys=True)


def parse_json(content: bytes | str) -> Any:
    """A JSON document; bytes are UTF-8, as every other reader of these files has it.

    ValueError also for too deep nesting, half a surrogate pair, and a duplicate key.
    """
    # json would guess UTF-16, and skip a byte order mark.
    text = content if isinstance(content, str) else content.decode("utf-8")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(row := dict(pairs)) != len(pairs):
            [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"duplicate key {key[:SHOWN]!r}")
        return row

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if SURROGATES.search(text):
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def canonical(value: object) -> bytes:
    """A JSON value in its one form: keys sorted, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def hash_of(value: object, *, sort_keys: bool = False) -> str:
    """SHA-256 of a JSON value, hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=sort_keys).encode()).hexdigest()


def read_data(
    path: Path, parse: Callable[[Any], T], error: type[ForgeError], *, what: str, remedy: str
) -> T:
    """What ``parse`` makes of a JSON or TOML file; whatever is wrong with it is an ``error``."""
    try:
        content = read_plain(path)
        is_toml = path.suffix == ".toml"
        return parse(tomllib.loads(content.decode("utf-8")) if is_toml else parse_json(content))
    except FileNotFoundError:
        problem = f"missing {what}"
    except ValidationError as cause:
        model = getattr(parse, "__self__", None)  # of Model.model_validate
        problem = f"invalid {what}: " + "\n".join(problems(cause, model))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as cause:
        detail = str(cause) if isinstance(cause, ValueError) else repr(cause)
        detail = f"missing key {cause}" if isinstance(cause, KeyError) else detail
        problem = f"invalid {what}: {detail}"
    raise error(problem, where=path, remedy=remedy)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, which appears by one rename; text is UTF-8."""
    with atomic_path(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, data: object, *, indent: int = 1, ensure_ascii: bool = True) -> None:
    """Write a record; a newline at the end."""
    write_whole(path, json.dumps(data, indent=indent, ensure_ascii=ensure_ascii) + "\n")


def write_sealed(path: Path, record: dict[str, Any]) -> None:
    """Write a record of the cache, with a hash of itself."""
    if path.is_dir():  # rename(2) replaces no folder
        remove(path)
    write_json(path, {"seal": hashlib.sha256(canonical(record)).hexdigest(), **record})


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what ``write_sealed`` wrote; OSError, ValueError if it is missing, or was changed."""
    record: dict[str, Any] = parse_json(read_plain(path))
    seal = record.pop("seal", "") if isinstance(record, dict) else ""
    if seal != hashlib.sha256(canonical(record)).hexdigest():
        raise ValueError("the record was changed after it was written")
    return record


def holds(checked: Path, now: dict[str, Any], check: Callable[[], bool]) -> bool:
    """Whether ``check`` is true: now, or when the sealed record ``checked`` got what is ``now``.

    ``now`` has all that the answer depends on, such as a ``folder_stamp``.
    """
    with suppress(OSError, ValueError):
        if read_sealed(checked) == now:
            return True
    if good := check():
        write_sealed(checked, now)
    return good


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to a file, or a copy where they are on different file systems."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        target.chmod(READ_ONLY)


def remove(path: Path) -> None:
    """Delete a file or a folder with all it holds, unmounting what is mounted in it.

    MountedError if that is in use, or the user may not. OSError if something goes on writing there:
    what a command started that was killed may do so for a moment, until the kernel ends it, too.
    """
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    for point in mounted_below(path):  # deleting would go through a mount, or stop halfway at one
        done = subprocess.run(["umount", str(point)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            what = f"cannot unmount a file system: {done.stderr.strip()}"
            remedy = "end what uses it, or unmount it as root; a killed build leaves such mounts"
            raise errors.MountedError(what, where=point, remedy=remedy)
    end = time.monotonic() + ORPHANS_S
    while path.exists():
        try:
            shutil.rmtree(path)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.ENOENT} or time.monotonic() >= end:
                raise


def walk_plain(folder: Path, below: str = "") -> Iterator[str]:
    """Relative paths of all files and links; ValueError for a FIFO, a socket or a device."""
    todo = [(os.fspath(folder), below)]  # not recursive: each path would pass through all levels
    while todo:
        path, below = todo.pop()
        for entry in list(os.scandir(path)):
            if entry.is_dir(follow_symlinks=False):
                todo.append((entry.path, f"{below}{entry.name}/"))
            elif entry.is_symlink() or entry.is_file(follow_symlinks=False):
                yield f"{below}{entry.name}"
            else:
                raise ValueError(f"not a plain file: {entry.path}")


def remove_foreign(path: Path) -> None:
    """Delete what is not a plain file of one name: a write would go elsewhere, or wait."""
    if path.is_symlink() or not path.is_file() or path.stat().st_nlink > 1:
        remove(path)


def tree_bytes(path: Path) -> int:
    """Bytes on disk below a path, as the file system counts them."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_blocks * 512
    return sum(tree_bytes(Path(entry.path)) for entry in os.scandir(path))


@contextmanager
def exclusive(name: str, *, wait: bool) -> Iterator[None]:
    """Hold the lock ``name`` of this cache; the kernel drops it when the process dies.

    Without ``wait``, a lock that is taken is a BusyError.
    """
    folder = cache_root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / f"{name}.lock", name, wait=wait) as file:
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def _locked(path: Path, name: str, *, wait: bool) -> IO[str]:
    """A lock's file, locked, and still the one that others find at its path."""
    while True:
        if os.path.lexists(path):  # of one that another process makes now, nothing is deleted
            remove_foreign(path)
        file = path.open("a+", errors="replace")
        try:
            _lock(file, name, wait=wait)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.lstat()):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()  # it was replaced before it was locked


def _lock(file: IO[str], name: str, *, wait: bool) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        if not wait:
            what = f"{name} is being worked on by process {holder}"
            remedy = "wait until it ends, or end it"
            raise errors.BusyError(what, where=file.name, remedy=remedy) from None
        what = f"  waiting for process {holder}, which works on {name}"
        console.print(what, style="dim", markup=False)
        fcntl.flock(file, fcntl.LOCK_EX)


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that will hold ``path`` (it need not exist yet)."""
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(existing).free


def require_disk(path: Path, need: int) -> None:
    """DiskSpaceError, before the first byte, unless ``need`` bytes can be written below a path."""
    if need > (free := free_bytes(path)):
        what = f"about {need / GIB:.1f} GiB are needed and {free / GIB:.1f} GiB are free"
        remedy = "free some space, or set VLLM_FORGE_CACHE / --output to a larger disk"
        raise errors.DiskSpaceError(what, where=path, remedy=remedy)


def require_writable(folder: Path) -> None:
    """FileAccessError, before a long step, unless files can be made in a folder."""
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = "not a folder in which files can be made"
        raise errors.FileAccessError(what, where=folder, remedy="choose another one, or make it")


def mounted_below(folder: Path, table: str | None = None) -> list[Path]:
    """Mount points within ``folder`` but not itself, the latest first, to be unmounted so.

    ``table``: the text of /proc/self/mountinfo (proc_pid_mountinfo(5)); default: this process's.
    """
    rows = (MOUNT_TABLE.read_text() if table is None else table).splitlines()
    points = [
        Path(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), row.split()[4])) for row in rows
    ]
    top = folder.resolve()
    return [point for point in reversed(points) if top in point.parents]
