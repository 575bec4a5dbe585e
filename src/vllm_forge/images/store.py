"""Layers on disk: written once per input, with an unpacked copy for the checks.

A stored layer is a folder ``layers/<key>/`` with the blob, ``layer.json``, ``files/``, and
``code/``, where files with device code are put aside for slimming; renamed into place when
complete. Nothing of it is believed: the record has a hash of itself, the blob is hashed when an
image is assembled, and the record has a hash over unpacked files.

The layers of wheels are written by worker processes while the next wheels download. What a SKU
cannot run is not in its image: device code for other architectures.

A CUDA library holds its kernels once per architecture. The driver loads the code that runs on
the GPU it finds and never reads the rest (CUDA C++ Programming Guide, "Application
Compatibility"; kernel coverage says what runs where). So in the SKU's copy of a library the bytes
of foreign code are zeros: headers, offsets and host code stay, nothing is relinked, and the zeros
compress away. Code in PTX stays where the SKU could compile it. The copies, and the RECORD rows of
what changed, are a layer of the SKU's own.
"""

import hashlib
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from mmap import mmap
from pathlib import Path
from typing import Any, TypeVar

from vllm_forge import host
from vllm_forge.host import worker_pool
from vllm_forge.host.errors import CacheError, CommandFailedError
from vllm_forge.host.files import file_digest, read_sealed, walk_plain, write_sealed
from vllm_forge.images.content import WheelGroup, group_entries
from vllm_forge.images.layer import (
    CHUNK,
    FILE_NAMES,
    LayerBlob,
    LayerWriter,
    ZstdLayerWriter,
    stamp,
)
from vllm_forge.images.wheels import Entry
from vllm_forge.kernels.coverage.device_code import device_code, runs_on
from vllm_forge.kernels.coverage.library import mapped
from vllm_forge.matrix import ImageCell
from vllm_forge.sources import Wheelhouse
from vllm_forge.sources.errors import HashMismatchError, WheelError
from vllm_forge.sources.wheel_format import record_hash, rewrite_record, seek_to_data

T = TypeVar("T")
WORKERS = 2
NICE = 10  # the rootfs is made meanwhile
# Smaller libraries have too little device code to be worth a copy per SKU.
LEAST = 1 << 20
LARGE = 4 << 20  # members from here on are inflated ahead of their turn
RECORDS = "opt/venv/lib/python*/site-packages/*.dist-info/RECORD"
SLIMMED = r"code/.+|files/.+\.dist-info/RECORD"  # what a slim layer is made of


@dataclass(frozen=True, kw_only=True)
class StoredLayer:
    """A layer in the store: its blob and the two folders."""

    blob: LayerBlob
    files: Path
    code: Path
    removed: dict[str, Any]  # what a slim layer lacks, see ``write_slim_layer``
    unpacked: dict[str, str]  # pattern -> hash of such files, see ``intact``

    @property
    def empty(self) -> bool:
        """It has no files, and is left out of images."""
        return not any(self.files.iterdir())


def layer_folder(key: str) -> Path:
    return host.cache_root() / "layers" / key


def stored(key: str) -> StoredLayer | None:
    """The layer of that key; None when it was not written yet, or is damaged and must be again."""
    folder = layer_folder(key)
    try:
        record = read_sealed(folder / "layer.json")
        removed, unpacked = record.pop("removed"), record.pop("unpacked", {})
        blob = LayerBlob(path=folder / FILE_NAMES[record["media_type"]], **record)
        whole = blob.path.stat().st_size == blob.size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    files, code = folder / "files", folder / "code"
    if not (whole and files.is_dir() and code.is_dir()):
        return None
    return StoredLayer(blob=blob, files=files, code=code, removed=removed, unpacked=unpacked)


def require_stored(key: str) -> StoredLayer:
    """The layer of that key.

    Raises CacheError: it was not written, or was deleted or damaged meanwhile.
    """
    if (layer := stored(key)) is None:
        what = "a layer that was written has been deleted or damaged"
        remedy = "do not clean the cache while a build runs; build again"
        raise CacheError(what, where=layer_folder(key), remedy=remedy)
    return layer


def _unpacked(folder: Path, pattern: str, crc: Callable[[Path], int]) -> str:
    """Hash of unpacked files: modes, targets of links, CRC-32; ValueError for another kind."""
    names = (*walk_plain(folder / "code", "code/"), *walk_plain(folder / "files", "files/"))
    paths = {name: folder / name for name in names if re.fullmatch(pattern, name)}
    rows = {
        name: [path.lstat().st_mode, str(path.readlink()) if path.is_symlink() else crc(path)]
        for name, path in paths.items()
    }
    return host.hash_of(rows, sort_keys=True)


def intact(layer: StoredLayer, pattern: str = ".+") -> bool:
    """Whether its unpacked files, ``files/...`` and ``code/...``, are all as they were written."""

    def crc(path: Path) -> int:
        with mapped(path) as content:
            return zlib.crc32(content)

    try:
        return _unpacked(layer.files.parent, pattern, crc) == layer.unpacked.get(pattern)
    except (OSError, ValueError):
        return False


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
    key: str, entries: Sequence[Entry], epoch: int, *, code_apart: bool = False
) -> StoredLayer:
    """Write a layer, or return the one that is there.

    ``key`` is the hash of all that it is a function of, ``epoch`` the time of all entries, Unix
    seconds; ``code_apart``: files with device code are left out, and unpacked to ``code``.

    Raises HashMismatchError, WheelError, UnknownFatbinError: a member is not what the zip or RECORD
    says; or a library's device code has an unknown layout.
    """

    def write(folder: Path) -> tuple[LayerBlob, dict[str, Any]]:
        inside = _put_code_apart(entries, folder / "code") if code_apart else entries
        return _write(folder, inside, epoch), {}

    return keep_layer(key, write)


def keep_layer(key: str, write: Callable[[Path], tuple[LayerBlob, dict[str, Any]]]) -> StoredLayer:
    """The layer of that key; when it is not there, written by ``write``.

    ``write`` makes the blob in a folder, unpacks to its ``files``, and returns what it removed.
    """
    with host.exclusive(f"layer-{key}", wait=True):
        if (known := stored(key)) is not None:
            return known
        with host.atomic_path(layer_folder(key)) as folder:
            for name in ("files", "code"):
                (folder / name).mkdir(parents=True)
                (folder / name).chmod(0o755)
            blob, removed = write(folder)
            unpacked = {
                pattern: _unpacked(folder, pattern, lambda path: int(path.stat().st_mtime))
                for pattern in (".+", SLIMMED)
            }  # see `stamp`
            record = asdict(blob) | {"removed": removed, "unpacked": unpacked}
            del record["path"]
            write_sealed(folder / "layer.json", record)
    return require_stored(key)


def may_hold_code(path: str, size: int) -> bool:
    """Whether to look into a file at all: a shared library of some size."""
    return size >= LEAST and ".so" in path.rpartition("/")[2]


def _put_code_apart(entries: Sequence[Entry], target: Path) -> list[Entry]:
    """Unpack the libraries with device code to ``target``; return the other entries."""
    others = []
    for entry in entries:
        if entry.member is not None and may_hold_code(entry.path, entry.member.file_size):
            path = target / entry.path
            make_folders(target, [entry.path])
            _inflate(entry, path)
            with mapped(path) as content:
                has_code = bool(device_code(content, path.name))
            if has_code:
                stamp(path, entry.mode, entry.member.CRC)
                continue
            path.unlink()
        others.append(entry)
    return others


def make_folders(target: Path, paths: Iterable[str]) -> list[str]:
    """Make the parent folders of ``paths`` below ``target``; return them, parents first."""
    folders = sorted({parent.as_posix() for path in paths for parent in Path(path).parents[:-1]})
    for folder in folders:
        (target / folder).mkdir(exist_ok=True)
        (target / folder).chmod(0o755)  # whatever the umask: the checks run as another user
    return folders


def _write(folder: Path, entries: Sequence[Entry], epoch: int) -> LayerBlob:
    files = folder / "files"
    with LayerWriter(folder, epoch) as layer, ThreadPoolExecutor(1) as ahead:
        parents = make_folders(files, [entry.path for entry in entries])[::-1]
        large: dict[str, Future[None]] = {
            entry.path: ahead.submit(_inflate, entry, files / entry.path)
            for entry in entries
            if entry.member is not None and entry.member.file_size >= LARGE
        }
        for entry in entries:
            while parents and parents[-1] < entry.path:
                layer.directory(parents.pop())
            if (job := large.pop(entry.path, None)) is not None:
                job.result()
            _add(layer, entry, None if job else files / entry.path)
        return layer.close()


def _add(layer: LayerWriter, entry: Entry, target: Path | None) -> None:
    """Add one entry, of a wheel's member inflated to ``target`` unless that was done."""
    if entry.link is not None:
        layer.symlink(entry.path, entry.link)
    elif entry.content is not None:
        layer.data(entry.path, entry.content, entry.mode)
    elif entry.member is not None:
        if target is not None:
            _inflate(entry, target)
        layer.member(entry.path, entry.mode, entry.member, _raw(entry))


def _raw(entry: Entry) -> Iterator[memoryview]:
    """A member's bytes as they are in the zip."""
    assert entry.archive is not None and entry.member is not None  # noqa: S101
    with entry.archive.open("rb") as file:
        seek_to_data(file, entry.member)
        left = entry.member.compress_size
        while left:
            block = file.read(min(CHUNK, left))
            if not block:
                raise HashMismatchError("the wheel ends early", where=entry.archive)
            left -= len(block)
            yield memoryview(block)


def _inflate(entry: Entry, target: Path) -> None:
    """Write a member's plain bytes to ``target``; check size, CRC, and its hash in RECORD."""
    member = entry.member
    assert member is not None  # noqa: S101 - only members come here
    plain = zlib.decompressobj(-15) if member.compress_type == zipfile.ZIP_DEFLATED else None
    crc, size, digest = 0, 0, hashlib.sha256()
    fault = ""
    try:
        with target.open("xb", buffering=0) as out:
            for piece in _raw(entry):
                block = plain.decompress(piece) if plain else bytes(piece)
                crc = zlib.crc32(block, crc)
                digest.update(block)
                size += len(block)
                out.write(block)
            if plain and (rest := plain.flush()):
                crc, size = zlib.crc32(rest, crc), size + len(rest)
                digest.update(rest)
                out.write(rest)
    except zlib.error as error:
        fault = f": {error}"
    # Bytes behind the stream would enter the layer where a reader expects a gzip member.
    whole = plain is None or (plain.eof and not plain.unused_data)
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


def write_layers(
    cell: ImageCell,
    groups: Sequence[WheelGroup],
    meanwhile: Callable[[], T],
    *,
    slim: bool = True,
) -> T:
    """Download the wheels of ``groups``, lowest layer first, and write what is not there yet.

    Returns what ``meanwhile`` does, which is called when all wheels are fetched, while worker
    processes write the layers. ``slim``: also the SKU's layers of libraries.
    """
    wheelhouse = Wheelhouse()
    with worker_pool(WORKERS, NICE) as pool:
        jobs = []
        for group in groups:
            wheelhouse.fetch(group.wheels)
            if any(stored(key) is None for key in group.keys[: 2 if slim else 1]):
                jobs.append(pool.submit(_write_group, group, cell, slim=slim))
        result = meanwhile()
        try:
            for job in jobs:
                job.result()
        except BrokenProcessPool as error:
            raise CommandFailedError(
                "a process that writes layers was killed",
                where="the worker processes of this build",
                remedy="it may have run out of memory: free some, and build again",
            ) from error
    return result


def _write_group(group: WheelGroup, cell: ImageCell, *, slim: bool) -> None:
    """Worker process: write a layer of verified wheels, and the SKU's of its libraries."""
    epoch = cell.base.source_date_epoch
    slim_key = group.slim_key if slim else None
    cuts = slim_key is not None and stored(slim_key) is None
    whole = stored(group.key)
    if whole is not None and cuts and not intact(whole, SLIMMED):
        forget(layer_folder(group.key))
        whole = None
    if whole is None:
        paths = [Wheelhouse().verify(wheel) for wheel in group.wheels]
        entries = group_entries(group.name, paths, cell.line.python)
        whole = write_layer(group.key, entries, epoch, code_apart=group.slim_key is not None)
    if slim_key is not None:
        major, minor = (int(part) for part in cell.sku.compute_capability.split("."))
        write_slim_layer(slim_key, whole, (major, minor), epoch)


def cut(
    content: bytes | mmap, name: str, capability: tuple[int, int]
) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """What of a library cannot run on a compute capability.

    Returns (offset, size) of each part, ascending, not overlapping; and what it was compiled for,
    e.g. ``cubin 80`` -> bytes. Raises UnknownFatbinError: some is in an unknown layout.
    """
    codes = device_code(content, name)
    foreign = [code for code in codes if not runs_on(code.target, code.kind, capability)]
    targets = Counter[str]()
    for code in foreign:
        targets[f"{code.kind} {code.target}"] += code.size
    return sorted((code.offset, code.size) for code in foreign), dict(sorted(targets.items()))


def pieces(content: bytes | mmap, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """A library's bytes in order, with zeros for ``ranges``; no piece has both."""
    position = 0
    for start, size in [*ranges, (len(content), 0)]:
        for at in range(position, start, CHUNK):
            yield content[at : min(at + CHUNK, start)]
        for at in range(0, size, CHUNK):
            yield bytes(min(CHUNK, size - at))
        position = start + size


def write_slim_layer(
    key: str, whole: StoredLayer, capability: tuple[int, int], epoch: int
) -> StoredLayer:
    """Write a SKU's libraries of the group's layer ``whole``, which is ``intact``, under a key.

    ``capability`` is the SKU's (major, minor), ``epoch`` the time of all entries, Unix seconds.
    """

    def write(folder: Path) -> tuple[LayerBlob, dict[str, Any]]:
        files = folder / "files"
        removed: dict[str, Any] = {}
        paths = (path for path in whole.code.rglob("*") if path.is_file())
        libraries = sorted(path.relative_to(whole.code).as_posix() for path in paths)
        records = sorted(whole.files.glob(RECORDS)) if libraries else []
        with ZstdLayerWriter(folder, epoch) as layer:
            for parent in make_folders(files, libraries):
                layer.directory(parent)
            for name in libraries:
                removed[name] = _add_library(layer, whole.code / name, name, capability)
            for path in records:
                name = path.relative_to(whole.files).as_posix()
                old = path.read_bytes()
                new = update_record(old, name, removed)
                if new != old:
                    for parent in make_folders(files, [name])[-1:]:
                        layer.directory(parent)
                    layer.data(name, new)
            return layer.close(), removed

    return keep_layer(key, write)


def _add_library(
    layer: ZstdLayerWriter, source: Path, name: str, capability: tuple[int, int]
) -> dict[str, Any]:
    """Add one library; return what it lacks."""
    digest = hashlib.sha256()
    with mapped(source) as content:
        ranges, targets = cut(content, source.name, capability)

        def hashed() -> Iterator[bytes]:
            for piece in pieces(content, ranges):
                digest.update(piece)
                yield piece

        layer.stream(name, len(content), source.stat().st_mode & 0o777, hashed())
    return {
        "bytes": sum(targets.values()),
        "targets": targets,
        "sha256": record_hash(digest.digest()),
    }


def update_record(content: bytes, name: str, removed: Mapping[str, Any]) -> bytes:
    """A RECORD whose rows of slimmed libraries have the hashes of what is in the image.

    ``name`` is its path in the image, ``removed`` that of ``write_slim_layer``'s layer.
    """
    site = name.rsplit("/", 2)[0]

    def change(path: str, digest: str, size: str) -> tuple[str, str, str]:
        slim = removed.get(f"{site}/{path}")
        return path, f"sha256={slim['sha256']}" if slim and slim["bytes"] else digest, size

    return rewrite_record(content, change)
