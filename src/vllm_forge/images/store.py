"""Layers on disk: written once per input, with an unpacked copy for the checks.

A stored layer is a folder ``layers/<key>/`` with the blob, ``layer.json``, ``files/`` and, where
files with device code were put aside for ``slim``, ``code/``; renamed into place when complete.
"""

from __future__ import annotations

import json
import mmap
import os
import zipfile
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.host import atomic_path, cache_root, exclusive, remove
from vllm_forge.host.errors import CacheError
from vllm_forge.images.layer import FILE_NAMES, GZIP, LayerBlob, LayerWriter
from vllm_forge.images.layout import file_digest
from vllm_forge.kernels.coverage import device_code
from vllm_forge.sources.errors import HashMismatchError
from vllm_forge.sources.wheel_format import seek_to_data

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from vllm_forge.images.wheels import Entry
    from vllm_forge.kernels.coverage import Code

CHUNK = 1 << 20
# Smaller libraries have too little device code to be worth a copy per SKU.
LEAST = 1 << 20
ELF = b"\x7fELF"
LARGE = 4 << 20  # members from here on are inflated ahead of their turn


@dataclass(frozen=True, kw_only=True)
class StoredLayer:
    """A layer in the store.

    Attributes:
        blob: what an image refers to.
        files: the folder with its files unpacked.
        code: the folder with the files that were put aside, as the wheels have them.
        removed: what a slim layer lacks, see ``slim``.
    """

    blob: LayerBlob
    files: Path
    code: Path
    removed: dict[str, Any] = field(default_factory=dict)

    @property
    def whole(self) -> tuple[Path, ...]:
        """The folders that together have what the wheels have.

        A layer that an earlier version kept has no folder for code.
        """
        return (self.files, self.code) if self.code.is_dir() else (self.files,)

    @property
    def empty(self) -> bool:
        """It has no files, and is left out of images."""
        return not any(self.files.iterdir())


def layer_folder(key: str) -> Path:
    """Where the layer of that key is, or will be."""
    return cache_root() / "layers" / key


def stored(key: str) -> StoredLayer | None:
    """The layer of that key, None when it was not written yet.

    Raises:
        CacheError: its blob or its record is damaged.
    """
    folder = layer_folder(key)
    try:
        record = json.loads((folder / "layer.json").read_text())
        if "removed" in record and not (folder / "code").is_dir():
            raise _damaged(folder, "the folder of its libraries is missing")
        removed = record.pop("removed", {})
        path = folder / FILE_NAMES[record.get("media_type", GZIP)]
        blob = LayerBlob(path=path, **record)
        size = blob.path.stat().st_size if blob.path.exists() else 0
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(folder, f"the record is not one of a layer: {error}") from error
    if size != blob.size:
        raise _damaged(folder, f"the blob has {size} bytes, its record says {blob.size}")
    return StoredLayer(blob=blob, files=folder / "files", code=folder / "code", removed=removed)


def _damaged(folder: Path, what: str) -> CacheError:
    return CacheError(what, where=str(folder), remedy="delete that folder and build again")


def require_stored(key: str) -> StoredLayer:
    """The layer of that key.

    Raises:
        CacheError: it was not written, or was deleted meanwhile.
    """
    if (layer := stored(key)) is None:
        raise CacheError(
            "a layer that was written has been deleted",
            where=str(layer_folder(key)),
            remedy="do not clean the cache while a build runs; build again",
        )
    return layer


def forget_damaged(blobs: Iterable[LayerBlob]) -> list[Path]:
    """Delete the kept layers whose blob is not what its digest says; return their folders."""
    damaged = [blob.path.parent for blob in blobs if file_digest(blob.path) != blob.digest]
    for folder in damaged:
        remove(folder)
    return damaged


def write_layer(
    key: str, entries: Sequence[Entry], epoch: int, *, code_apart: bool = False
) -> StoredLayer:
    """Write a layer, or return the one that is there.

    Args:
        key: hash of everything that the layer is a function of.
        entries: sorted by path, unique.
        epoch: modification time of all entries, Unix seconds.
        code_apart: leave out files with device code; they are unpacked to ``code``.

    Raises:
        HashMismatchError: a wheel's member does not inflate to what the zip says.
        UnknownFatbinError: see ``codes_in``.
    """

    def write(folder: Path) -> tuple[LayerBlob, dict[str, Any]]:
        inside = _put_code_apart(entries, folder / "code") if code_apart else entries
        return _write(folder / FILE_NAMES[GZIP], folder / "files", inside, epoch), {}

    return keep_layer(key, write)


def keep_layer(key: str, write: Callable[[Path], tuple[LayerBlob, dict[str, Any]]]) -> StoredLayer:
    """The layer of that key; when it is not there, written by ``write``.

    ``write`` makes the blob in a folder, unpacks to its ``files``, and returns what it removed.
    """
    with exclusive(f"layer-{key}", wait=True):
        if (known := stored(key)) is not None:
            return known
        with atomic_path(layer_folder(key)) as folder:
            for name in ("files", "code"):
                (folder / name).mkdir(parents=True)
                (folder / name).chmod(0o755)
            blob, removed = write(folder)
            record = asdict(blob) | {"removed": removed}
            del record["path"]
            (folder / "layer.json").write_text(json.dumps(record, indent=1) + "\n")
    return require_stored(key)


def codes_in(path: Path) -> list[Code]:
    """Device code of a library, for any architecture; empty for other files.

    Raises:
        UnknownFatbinError: it has some in an unknown layout.
    """
    with path.open("rb") as file:
        if file.read(len(ELF)) != ELF:
            return []
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
            return device_code(content, path.name)


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
            if codes_in(path):
                path.chmod(entry.mode)
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


def _write(path: Path, files: Path, entries: Sequence[Entry], epoch: int) -> LayerBlob:
    with LayerWriter(path, epoch) as layer, ThreadPoolExecutor(1) as ahead:
        folders = make_folders(files, [entry.path for entry in entries])
        large: dict[str, Future[None]] = {
            entry.path: ahead.submit(_inflate, entry, files / entry.path)
            for entry in entries
            if entry.member is not None and entry.member.file_size >= LARGE
        }
        remaining = iter([*folders, None])
        folder_ = next(remaining)
        for entry in entries:
            while folder_ is not None and folder_ < entry.path:
                layer.directory(folder_)
                folder_ = next(remaining)
            if (job := large.pop(entry.path, None)) is not None:
                job.result()
            _add(layer, entry, files / entry.path, inflated=job is not None)
        return layer.close()


def _add(layer: LayerWriter, entry: Entry, target: Path, *, inflated: bool) -> None:
    """Add one entry to the layer and to the unpacked copy."""
    if entry.link is not None:
        layer.symlink(entry.path, entry.link)
        target.symlink_to(entry.link)
        return
    if entry.content is not None:
        layer.data(entry.path, entry.content, entry.mode)
        target.write_bytes(entry.content)
    else:
        member = entry.member
        assert member is not None  # noqa: S101 - one source is set
        if not inflated:
            _inflate(entry, target)
        if member.compress_type == zipfile.ZIP_DEFLATED:
            layer.begin_deflated(entry.path, member.file_size, entry.mode)
            layer.deflated(_raw(entry), _blocks(target), member.CRC, member.file_size)
        else:
            layer.data(entry.path, target.read_bytes(), entry.mode)
    target.chmod(entry.mode)
    # The checks keep Python's bytecode from one image to the next, and Python takes a file of it
    # when size and time of the source agree: so an unpacked file's time depends on its content.
    crc = entry.fingerprint[1]
    assert isinstance(crc, int)  # noqa: S101 - a link has returned above
    os.utime(target, (crc, crc))


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while block := file.read(CHUNK):
            yield block


def _raw(entry: Entry) -> Iterator[memoryview]:
    """A member's bytes as they are in the zip."""
    assert entry.archive is not None and entry.member is not None  # noqa: S101
    with entry.archive.open("rb") as file:
        seek_to_data(file, entry.member)
        left = entry.member.compress_size
        while left:
            block = file.read(min(CHUNK, left))
            if not block:
                raise HashMismatchError("the wheel ends early", where=str(entry.archive))
            left -= len(block)
            yield memoryview(block)


def _inflate(entry: Entry, target: Path) -> None:
    """Write a member's plain bytes to ``target``; check size and CRC."""
    member = entry.member
    assert member is not None  # noqa: S101 - only members come here
    plain = zlib.decompressobj(-15) if member.compress_type == zipfile.ZIP_DEFLATED else None
    crc = size = 0
    fault = ""
    try:
        with target.open("xb", buffering=0) as out:
            for piece in _raw(entry):
                block = plain.decompress(piece) if plain else bytes(piece)
                crc = zlib.crc32(block, crc)
                size += len(block)
                out.write(block)
            if plain and (rest := plain.flush()):
                crc, size = zlib.crc32(rest, crc), size + len(rest)
                out.write(rest)
    except zlib.error as error:
        fault = f": {error}"
    # Bytes behind the stream would enter the layer where a reader expects a gzip member.
    whole = plain is None or (plain.eof and not plain.unused_data)
    if fault or not whole or (crc, size) != (member.CRC, member.file_size):
        raise HashMismatchError(
            f"{member.filename} does not inflate to what the wheel's directory says{fault}",
            where=str(entry.archive),
            remedy="delete that wheel from the cache and build again",
        )
