"""Layers on disk: written once per input, with an unpacked copy for the checks.

A stored layer is a folder ``layers/<key>/`` with the blob, ``layer.json``, ``files/``, and
``code/``, where files with device code are put aside for slimming; renamed into place when
complete. Nothing of it is believed: the record has a hash of itself, and the blob and the unpacked
files are compared with it before they are used: by their content, when one of them was touched
since that was done last.
"""

import hashlib
import os
import re
import stat
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from isal import isal_zlib

from vllm_forge import host
from vllm_forge.host.errors import CacheError
from vllm_forge.host.files import (
    file_digest,
    folder_stamp,
    holds,
    inode,
    read_sealed,
    walk_plain,
    write_sealed,
)
from vllm_forge.images.layer import (
    CHUNK,
    FILE_NAMES,
    LayerBlob,
    LayerWriter,
    read_blocks,
    stamp,
)
from vllm_forge.images.record import RecordedLayer, recall
from vllm_forge.images.wheels import Entry, folders_of
from vllm_forge.kernels.coverage import device_code as device_code_module
from vllm_forge.kernels.coverage.device_code import Code, Kind, device_code
from vllm_forge.kernels.coverage.library import mapped
from vllm_forge.sources.errors import HashMismatchError, WheelError
from vllm_forge.sources.wheel_format import record_hash, seek_to_data

# Smaller libraries have too little device code to be worth a copy per SKU.
LEAST = 1 << 20
UNPACKED = ("files", "code")
CHECKED = "checked.json"  # what the file system said of unpacked files when they were compared
HASHED = "hashed.json"  # and of the blob, when it was hashed
SLIMMED = r"code/.+|files/.+\.dist-info/RECORD"  # what a slim layer is made of


# Writes a layer to a folder: its blob, and what it lacks. With less work where it is recorded.
Write = Callable[[Path, RecordedLayer | None], tuple[LayerBlob, dict[str, Any]]]

_SEARCH = host.hash_of(Path(device_code_module.__file__).read_text())  # another one searches again


class CodeRange(NamedTuple):
    """Device code in a library: offset and size in bytes, ``target`` as ``100a``."""

    kind: Kind
    target: str
    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class StoredLayer:
    """A layer in the store: its blob, and two folders; CacheError for one that is damaged."""

    blob: LayerBlob
    folder: Path
    removed: dict[str, Any]  # what a slim layer lacks, see ``write_slim_layer``
    unpacked: dict[str, str]  # pattern -> hash of such files, see ``intact``

    @cached_property
    def files(self) -> Path:
        """What the blob has, unpacked."""
        return self._checked / "files"

    @cached_property
    def code(self) -> Path:
        """Files with device code that were put aside for slimming."""
        return self._checked / "code"

    @cached_property
    def _checked(self) -> Path:
        if usable(self.folder.name) is None:
            raise _gone(self.folder)
        return self.folder

    @property
    def empty(self) -> bool:
        """It has no files, and is left out of images."""
        return not any(self.files.iterdir())


def layer_folder(key: str) -> Path:
    return host.cache_root() / "layers" / key


def stored(key: str) -> StoredLayer | None:
    """The layer of that key; None when it was not written yet, or is damaged and must be again.

    Of its unpacked files only that they are there: see ``usable``.
    """
    folder = layer_folder(key)
    try:
        record = read_sealed(folder / "layer.json")
        removed, unpacked = record.pop("removed"), record.pop("unpacked", {})
        blob = LayerBlob(path=folder / FILE_NAMES[record["media_type"]], **record)
        whole = blob.path.stat().st_size == blob.size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not (whole and (folder / "files").is_dir() and (folder / "code").is_dir()):
        return None
    return StoredLayer(blob=blob, folder=folder, removed=removed, unpacked=unpacked)


def usable(key: str) -> StoredLayer | None:
    """The layer of that key, whose unpacked files are as they were written.

    One that is damaged is deleted. They are read when the file system says that one was touched
    since: the time of a change (ctime) cannot be set back, so this finds what programs do.
    """
    if (layer := stored(key)) is None:
        return None
    with suppress(OSError, ValueError):  # of a damaged layer
        now = _stamps(layer.folder, layer.unpacked)
        if holds(layer.folder / CHECKED, now, lambda: intact(layer)):
            return _as_checked(layer)
    forget(layer.folder)
    return None


def _stamps(folder: Path, unpacked: dict[str, str]) -> dict[str, Any]:
    """What the file system says of unpacked files that are as a record has them."""
    return {"unpacked": unpacked} | {place: folder_stamp(folder / place) for place in UNPACKED}


def require_stored(key: str, *, checked: bool = False) -> StoredLayer:
    """The layer of that key; CacheError if it was not written, or deleted or damaged meanwhile.

    ``checked``: ``usable`` was asked, or it was written, just now.
    """
    if (layer := stored(key)) is None:
        raise _gone(layer_folder(key))
    return _as_checked(layer) if checked else layer


def _as_checked(layer: StoredLayer) -> StoredLayer:
    vars(layer)["_checked"] = layer.folder  # the cached property
    return layer


def _gone(folder: Path) -> CacheError:
    what = "a layer is not in the cache, or is damaged"
    remedy = "build an image of the line, and do not clean the cache meanwhile: "
    remedy += "nox -s forge -- build SKU --line LINE"
    return CacheError(what, where=folder, remedy=remedy)


def hashed_blob(layer: StoredLayer) -> list[int]:
    """The blob's ``inode``, if it was not touched since it was hashed; else empty."""
    with suppress(OSError, ValueError):
        now = inode(layer.blob.path.lstat())
        if read_sealed(layer.folder / HASHED) == {"digest": layer.blob.digest, "blob": now}:
            return now
    return []


def note_hashed(folder: Path, blob: LayerBlob, stamp: list[int]) -> None:
    """Keep that a blob, whose ``inode`` was ``stamp`` before, was hashed."""
    write_sealed(folder / HASHED, {"digest": blob.digest, "blob": stamp})


def _rows(
    folder: Path, pattern: str, crc: Callable[[str, os.stat_result], int]
) -> dict[str, list[Any]]:
    """Mode of each unpacked file, and its CRC-32 or link's target; ValueError for another kind."""
    rows = {}
    for name in (name for place in UNPACKED for name in walk_plain(folder / place, f"{place}/")):
        if re.fullmatch(pattern, name):
            path = f"{folder}/{name}"
            status = os.lstat(path)
            link = stat.S_ISLNK(status.st_mode)
            rows[name] = [status.st_mode, str(Path(path).readlink()) if link else crc(path, status)]
    return rows


def intact(layer: StoredLayer, pattern: str = ".+") -> bool:
    """Whether its unpacked files, ``files/...`` and ``code/...``, are all as they were written."""

    def crc(path: str, _: os.stat_result) -> int:
        with mapped(Path(path)) as content:
            return isal_zlib.crc32(content)

    try:
        return _hashed(_rows(layer.folder, pattern, crc), pattern) == layer.unpacked.get(pattern)
    except (OSError, ValueError):
        return False


def _hashed(rows: dict[str, list[Any]], pattern: str) -> str:
    rows = {name: row for name, row in rows.items() if re.fullmatch(pattern, name)}
    return host.hash_of(rows, sort_keys=True)


def forget(folder: Path) -> None:
    """Delete a damaged part of the cache, so that the next build makes it again."""
    host.console.print(f"  deleted: {folder} is damaged", style="dim", markup=False)
    host.remove(folder)


def forget_damaged(blobs: Iterable[LayerBlob]) -> None:
    """Delete the kept layers and systems whose blob is not what its digest says."""
    for blob in blobs:
        with suppress(OSError, ValueError):
            if file_digest(blob.path) == blob.digest:
                continue
        kind, key = blob.path.relative_to(host.cache_root()).parts[:2]
        forget(host.cache_root() / kind / key)


def write_layer(
    key: str,
    entries: Sequence[Entry],
    epoch: int,
    *,
    code_apart: bool = False,
    recorded: RecordedLayer | None = None,
) -> StoredLayer:
    """Write a layer, or return the one that is there.

    ``key`` is the hash of all that it is a function of, ``epoch`` the time of all entries, Unix
    seconds; ``code_apart``: files with device code are left out, and unpacked to ``code``;
    ``recorded``: see ``keep_layer``.

    Raises HashMismatchError, WheelError, UnknownFatbinError: a member is not what the zip or RECORD
    says; or a library's device code has an unknown layout.
    """

    def write(folder: Path, known: RecordedLayer | None) -> tuple[LayerBlob, dict[str, Any]]:
        code = _put_code_apart(entries, folder, key) if code_apart else set()
        rest = [entry for entry in entries if entry.path not in code]
        if known is None:
            return _write(folder, rest, epoch), {}
        # The blob's digest shows that it has the files which were compared with RECORD before.
        return _write(folder, [replace(e, recorded="") for e in rest], epoch, known.diff_id), {}

    return keep_layer(key, write, recorded)


def keep_layer(key: str, write: Write, recorded: RecordedLayer | None = None) -> StoredLayer:
    """The layer of that key; when it is not there, written by ``write``.

    ``write`` makes the blob in a folder, unpacks to its ``files``, and returns what it removed.
    It may take the hashes of ``recorded`` for what the blob has; unless the blob's digest is that
    of the record, which proves them, the layer is written again without.
    """
    with host.exclusive(f"layer-{key}", wait=True):
        if (known := usable(key)) is not None:
            return known
        with host.atomic_path(layer_folder(key)) as folder:
            blob, removed = _fill(folder, write, recorded)
            if recorded is not None and blob.digest != recorded.digest:
                host.console.print(f"  written again: layer {key} differs from its record")
                host.remove(folder)
                blob, removed = _fill(folder, write, None)
            rows = _rows(folder, ".+", lambda _, status: int(status.st_mtime))  # see `stamp`
            unpacked = {pattern: _hashed(rows, pattern) for pattern in (".+", SLIMMED)}
            record = asdict(blob) | {"removed": removed, "unpacked": unpacked}
            del record["path"]
            write_sealed(folder / "layer.json", record)
            write_sealed(folder / CHECKED, _stamps(folder, unpacked))
            note_hashed(folder, blob, inode(blob.path.lstat()))
    return require_stored(key, checked=True)


def _fill(
    folder: Path, write: Write, recorded: RecordedLayer | None
) -> tuple[LayerBlob, dict[str, Any]]:
    for name in UNPACKED:
        (folder / name).mkdir(parents=True)
        (folder / name).chmod(0o755)
    return write(folder, recorded)


def may_hold_code(path: str, size: int) -> bool:
    """Whether to look into a file at all: a shared library of some size."""
    return size >= LEAST and ".so" in path.rpartition("/")[2]


def code_ranges(key: str, path: str, file: Path) -> list[CodeRange]:
    """Device code of a library of the layer ``key``, whose ``file`` was compared.

    It is searched once for all SKUs. Raises UnknownFatbinError: some is in an unknown layout.
    """

    def search() -> list[list[Any]]:
        with mapped(file) as content:
            return [list(row) for row in ranges_of(device_code(content, path))]

    status = file.stat()
    crc = int(status.st_mtime)  # see ``stamp``
    inputs = ["device code", _SEARCH, key, path, status.st_size, crc]
    return [CodeRange(*row) for row in recall(inputs, search)]


def ranges_of(codes: Iterable[Code]) -> list[CodeRange]:
    """What ``recall`` keeps of device code."""
    return [CodeRange(code.kind, str(code.target), code.offset, code.size) for code in codes]


def _put_code_apart(entries: Sequence[Entry], folder: Path, key: str) -> set[str]:
    """Unpack large libraries to ``files``, or to ``code`` those with device code; return these."""
    apart = set()
    with _Wheels() as wheels:
        for entry in entries:
            if entry.member is not None and may_hold_code(entry.path, entry.member.file_size):
                files, code = (folder / place / entry.path for place in UNPACKED)
                make_folders(folder / "code", [entry.path])
                deque(_unpacked(entry, wheels.raw(entry), str(code)), 0)
                if code_ranges(key, entry.path, code):
                    apart.add(entry.path)
                else:
                    make_folders(folder / "files", [entry.path])
                    code.rename(files)
    return apart


def make_folders(target: Path, paths: Iterable[str]) -> list[str]:
    """Make the parent folders of ``paths`` below ``target``; return them, parents first."""
    folders = sorted(folders_of(paths))
    for path in [f"{target}/{folder}" for folder in folders]:  # a Path of each takes longer
        with suppress(FileExistsError):
            os.mkdir(path)  # noqa: PTH102
        # Whatever the umask: the checks run as another user.
        os.chmod(path, 0o755)  # noqa: PTH101, S103
    return folders


def _write(folder: Path, entries: Sequence[Entry], epoch: int, diff_id: str = "") -> LayerBlob:
    files = folder / "files"
    parents = make_folders(files, [entry.path for entry in entries])[::-1]
    with LayerWriter(folder, epoch, diff_id) as layer, _Wheels() as wheels:
        for entry in entries:
            while parents and parents[-1] < entry.path:
                layer.directory(parents.pop())
            _add(layer, entry, f"{files}/{entry.path}", wheels)
        return layer.close()


class _Wheels(ExitStack):
    """Wheels, each of which is opened once."""

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[Path, FileIO] = {}

    def raw(self, entry: Entry) -> Iterator[bytes]:
        """A member's bytes as they are in the zip."""
        assert entry.archive is not None and entry.member is not None  # noqa: S101
        file = self._files.get(entry.archive)
        if file is None:
            file = self.enter_context(FileIO(entry.archive))
            self._files[entry.archive] = file
        seek_to_data(file, entry.member)
        left = entry.member.compress_size
        while left:
            block = file.read(min(CHUNK, left))
            if not block:
                raise HashMismatchError("the wheel ends early", where=entry.archive)
            left -= len(block)
            yield block


def _add(layer: LayerWriter, entry: Entry, target: str, wheels: _Wheels) -> None:
    """Add one entry; of a wheel's member inflated to ``target``, unless that was done."""
    if entry.link is not None:
        layer.symlink(entry.path, entry.link)
    elif entry.content is not None:
        layer.data(entry.path, entry.content, entry.mode)
    elif (member := entry.member) is not None:

        def plain(raw: Iterable[bytes]) -> Iterator[bytes]:
            try:
                yield from _unpacked(entry, raw, target)
            except FileExistsError:  # a library without device code, which was checked
                deque(raw, 0)
                yield from read_blocks(Path(target))

        layer.member(entry.path, entry.mode, member, wheels.raw(entry), plain)


def _unpacked(entry: Entry, raw: Iterable[bytes], target: str) -> Iterator[bytes]:
    """A member's plain bytes, checked, which are written to a new file."""
    assert entry.member is not None  # noqa: S101
    with open(target, "xb") as out:  # noqa: PTH123
        for block in _inflated(entry, raw):
            out.write(block)
            yield block
        out.flush()
        stamp(out.fileno(), entry.mode, entry.member.CRC)


def _inflated(entry: Entry, raw: Iterable[bytes]) -> Iterator[bytes]:
    """A member's plain bytes; checks size, CRC, and its hash in RECORD at the end."""
    member = entry.member
    assert member is not None  # noqa: S101 - only members come here
    inflate = isal_zlib.decompressobj(-15) if member.compress_type == zipfile.ZIP_DEFLATED else None
    crc, size, digest = 0, 0, hashlib.sha256()
    fault = ""
    try:
        for piece in raw:
            block = inflate.decompress(piece) if inflate else piece
            crc = isal_zlib.crc32(block, crc)
            if entry.recorded:
                digest.update(block)
            size += len(block)
            yield block
    except isal_zlib.error as error:  # type: ignore[misc] # its stub has an instance
        fault = f": {error}"
    # Bytes behind the stream would enter the layer where a reader expects a gzip member.
    whole = inflate is None or (inflate.eof and not inflate.unused_data)
    if fault or not whole or (crc, size) != (member.CRC, member.file_size):
        what = f"{member.filename} does not inflate to what the wheel's directory says{fault}"
        remedy = "delete that wheel from the cache and build again"
        raise HashMismatchError(what, where=entry.archive, remedy=remedy)
    if entry.recorded not in ("", f"sha256={record_hash(digest.digest())}"):
        raise WheelError(
            f"{member.filename} has sha256={record_hash(digest.digest())}, RECORD says "
            f"{entry.recorded}",
            where=entry.archive,
            remedy="lock another version; if it is a slip of the publisher, add the two hashes to "
            "images/wheels.py, PUBLISHED_WRONG",
        )
