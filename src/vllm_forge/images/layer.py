"""A layer as a function of its wheels: a gzip'd tar made of the wheels' own deflate streams.

A wheel is a zip: each of its files already is a raw deflate stream. RFC 1952 lets a gzip
file be a sequence of members, so a layer is written as

    member: tar header (stored, not compressed)     member: the file's deflate stream, as is

The same trick carries eStargz, which every registry and runtime reads. Nothing is compressed,
so a layer is written at the speed of hashing, and its digest depends on the lock alone: not
on a compressor, its version, its threads, or the host.

Files that are not as a wheel holds them (device code left out, see ``store``) must be
compressed. They go into a tar of one zstd frame, made by the zstd of the pinned ``zstandard``.
"""

import hashlib
import io
import os
import posixpath
import struct
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Self, TypeVar, cast

import zstandard
from isal import igzip, isal_zlib

from vllm_forge.host import READ_ONLY

T = TypeVar("T")
BLOCK = 512
CHUNK = 1 << 18  # what is inflated, hashed and written of it stays in a core's cache
STORED_MAX = 65535
# No name, no time, unknown OS: nothing of the host.
NAME, SIZE, CHECKSUM = 100, slice(124, 135), slice(148, 154)  # of a header: length, two fields
GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
TAR = "application/vnd.oci.image.layer.v1.tar"
GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
FILE_NAMES = {GZIP: "layer.tar.gz", ZSTD: "layer.tar.zst"}
# Host code of torch_cuda: 0.364 of its size at level 1, 0.348 at 3, 0.341 at 6 (half the speed).
ZSTD_LEVEL = 3
# In an upper layer: a path that is gone, and a folder of which all below is.
WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"


@dataclass(frozen=True, kw_only=True)
class LayerBlob:
    """A finished layer: a compressed tar."""

    path: Path
    digest: str  # SHA-256 of the file, hex, which a manifest names
    diff_id: str  # that of the tar inside, which a config names
    size: int  # bytes of the file
    media_type: str = GZIP


def plain_tar(layer: LayerBlob) -> io.BufferedIOBase:
    """The tar inside, to be read once."""
    opener = igzip.open if layer.media_type == GZIP else zstandard.open
    return cast("io.BufferedIOBase", opener(layer.path, "rb"))


def plain_digest(layer: LayerBlob) -> str:
    """The ``diff_id`` by the blob itself, hex; empty for one that cannot be unpacked."""
    try:
        with plain_tar(layer) as tar:
            return hashlib.file_digest(tar, "sha256").hexdigest()
    except (OSError, EOFError, isal_zlib.error, zstandard.ZstdError):  # type: ignore[misc]
        return ""


def members(blob: LayerBlob) -> Iterator[tuple[str, tarfile.TarInfo, tarfile.TarFile]]:
    """Path, entry, and the tar that has its content, in the order of the layer."""
    with plain_tar(blob) as stream, tarfile.open(fileobj=stream, mode="r|") as layer:
        for info in layer:
            yield plain_path(info.name), info, layer


def plain_path(name: str) -> str:
    """A path in an image as one form: relative to its root, without dots."""
    return posixpath.normpath(name).lstrip("/")


def overlay(
    layers: Sequence[LayerBlob],
    read: Callable[[str, tarfile.TarInfo, tarfile.TarFile], T | None],
) -> dict[str, tuple[int, T]]:
    """Path -> number of the layer that has it in the image, and what ``read`` makes of it.

    ``layers``: lowest first. ``read`` is given what ``members`` yields; None leaves a path out. A
    whiteout hides what lower layers have, never what its own layer has (image-spec, layer.md).
    """
    files: dict[str, tuple[int, T]] = {}
    for number, blob in enumerate(layers):
        for path, info, tar in members(blob):
            folder, _, base = path.rpartition("/")
            if base.startswith(WHITEOUT):
                gone = posixpath.join(folder, base.removeprefix(WHITEOUT))
                below = f"{folder if base == OPAQUE else gone}/".lstrip("/")
                for other in [other for other, (layer, _) in files.items() if layer < number]:
                    if other.startswith(below) or other == gone:
                        del files[other]
            elif (value := read(path, info, tar)) is not None:
                files[path] = (number, value)
    return files


def stamp(file: int, mode: int, crc: int) -> None:
    """Set the mode of an unpacked file, an open descriptor, and its CRC-32 as its time.

    The checks keep Python's bytecode from one image to the next, and Python takes a file of it when
    size and time of the source agree: so the time depends on the content. It also shows damage.
    A writer has a buffer, and flushes it before: one without could write a part of a block.
    """
    os.fchmod(file, mode)
    os.utime(file, (crc, crc))


def read_blocks(path: Path) -> Iterator[bytes]:
    """A file's bytes."""
    with path.open("rb", buffering=0) as file:
        while block := file.read(CHUNK):
            yield block


def tar_header(info: tarfile.TarInfo) -> bytes:
    """An entry's header in pax format."""
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


@lru_cache(8)
def _empty_file(mode: int, epoch: int) -> bytes:
    info = tarfile.TarInfo("")
    info.mode, info.mtime = mode, epoch
    return tar_header(info)


@lru_cache(1024)
def _long_name(length: int) -> bytes:
    """Header and record of a name that is too long for one; its own bytes follow."""
    return tar_header(tarfile.TarInfo("-" * length)).partition(b"-")[0]


def file_header(path: str, size: int, mode: int, epoch: int) -> bytes:
    """A file's header, equal to ``tar_header``'s, in a tenth of the time."""
    name, digits = path.encode(), b"%011o" % size
    if not path.isascii() or len(digits) > SIZE.stop - SIZE.start:
        info = tarfile.TarInfo(path)
        info.mode, info.mtime, info.size = mode, epoch, size
        return tar_header(info)
    extended = b""
    if len(name) > NAME:
        extended = _long_name(len(name)) + name + b"\n"
        extended += bytes(-len(extended) % BLOCK)
        name = name[:NAME]
    header = bytearray(_empty_file(mode, epoch))
    checksum = int(header[CHECKSUM], 8) + sum(name) + sum(digits) - sum(header[SIZE])
    header[: len(name)], header[SIZE], header[CHECKSUM] = name, digits, b"%06o" % checksum
    return extended + header


class TarWriter(ABC):
    """A tar, entry by entry, and a copy of its files; a subclass compresses the tar's bytes.

    In ``folder``, the tar gets the name of its type; ``files``, the copy, has the folders already.
    ``epoch`` is the modification time of every entry of the tar, Unix seconds. ``diff_id`` is
    that of the layer, where the caller knows it, and compares the digest: then it is not computed.
    """

    media_type = ""

    def __init__(self, folder: Path, epoch: int, diff_id: str = "") -> None:
        self._path = folder / FILE_NAMES[self.media_type]
        self._files = folder / "files"
        self._epoch = epoch
        self._file: IO[bytes] = self._path.open("xb")  # never an inode that is in use
        self._blob = hashlib.sha256()
        self._diff_id = diff_id
        self._diff = hashlib.sha256()
        self._size = 0
        self._held = bytearray()  # of the blob, to be hashed and written in larger pieces

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def directory(self, path: str, mode: int = 0o755) -> None:
        self._header(path + "/", tarfile.DIRTYPE, mode=mode)

    def symlink(self, path: str, target: str) -> None:
        self._header(path, tarfile.SYMTYPE, mode=0o777, target=target)
        (self._files / path).symlink_to(target)

    def data(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Add a file from memory, stored."""
        with (self._files / path).open("xb") as copy:
            copy.write(content)
            copy.flush()
            stamp(copy.fileno(), mode, isal_zlib.crc32(content))
        self._file_header(path, len(content), mode)
        self._tar(content)
        self._pad(len(content))

    def close(self) -> LayerBlob:
        self._tar(bytes(2 * BLOCK))
        self._end()
        self._flush()
        self._file.close()
        self._path.chmod(READ_ONLY)
        return LayerBlob(
            path=self._path,
            digest=self._blob.hexdigest(),
            diff_id=self._diff_id or self._diff.hexdigest(),
            size=self._size,
            media_type=self.media_type,
        )

    @abstractmethod
    def _tar(self, content: bytes) -> None:
        """Take bytes of the tar."""

    @abstractmethod
    def _end(self) -> None:
        """Write what is still held back."""

    def _header(self, path: str, kind: bytes, *, mode: int, target: str = "") -> None:
        info = tarfile.TarInfo(path)
        info.type, info.mode = kind, mode
        info.linkname, info.mtime = target, self._epoch
        self._tar(tar_header(info))

    def _file_header(self, path: str, size: int, mode: int) -> None:
        self._tar(file_header(path, size, mode, self._epoch))

    def _hash_plain(self, content: bytes) -> None:
        if not self._diff_id:
            self._diff.update(content)

    def _pad(self, size: int) -> None:
        self._tar(bytes(-size % BLOCK))

    def _write(self, content: bytes) -> None:
        self._held += content
        if len(self._held) >= CHUNK:
            self._flush()

    def _flush(self) -> None:
        self._blob.update(self._held)
        self._file.write(self._held)
        self._size += len(self._held)
        self._held.clear()


class LayerWriter(TarWriter):
    """Writes one layer of gzip members. Same entries, same bytes."""

    media_type = GZIP

    def __init__(self, folder: Path, epoch: int, diff_id: str = "") -> None:
        super().__init__(folder, epoch, diff_id)
        self._pending = bytearray()  # tar bytes that are not in a member yet

    def member(
        self,
        path: str,
        mode: int,
        info: zipfile.ZipInfo,
        raw: Iterable[bytes],
        plain: Callable[[Iterable[bytes]], Iterable[bytes]],
    ) -> None:
        """Add a wheel's member, which ``plain`` also adds to the copy.

        ``raw`` is what the wheel has of it, the deflate stream or the plain bytes; ``plain`` makes
        the plain bytes of that, and checks them.
        """
        self._file_header(path, info.file_size, mode)
        if info.compress_type == zipfile.ZIP_DEFLATED:
            self._end()
            self._write(GZIP_HEADER)
            for block in plain(self._written(raw)):
                self._hash_plain(block)
            self._write(struct.pack("<II", info.CRC, info.file_size & 0xFFFFFFFF))
        else:
            for block in plain(raw):
                self._tar(block)
        self._pad(info.file_size)

    def _written(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            self._write(piece)
            yield piece

    def _tar(self, content: bytes) -> None:
        self._hash_plain(content)
        self._pending += content

    def _end(self) -> None:
        """Turn the pending tar bytes into one gzip member of stored blocks."""
        if not self._pending:
            return
        content = bytes(self._pending)
        self._pending.clear()
        self._write(GZIP_HEADER)
        for start in range(0, len(content), STORED_MAX):
            piece = content[start : start + STORED_MAX]
            final = start + STORED_MAX >= len(content)
            self._write(struct.pack("<BHH", final, len(piece), len(piece) ^ 0xFFFF))
            self._write(piece)
        self._write(struct.pack("<II", isal_zlib.crc32(content), len(content) & 0xFFFFFFFF))


class ZstdLayerWriter(TarWriter):
    """Writes one layer as a zstd frame. Same entries, same bytes, by one version of zstd."""

    media_type = ZSTD

    def __init__(self, folder: Path, epoch: int, diff_id: str = "") -> None:
        super().__init__(folder, epoch, diff_id)
        self._frame = zstandard.ZstdCompressor(level=ZSTD_LEVEL, threads=1).compressobj()

    def stream(self, path: str, size: int, mode: int, pieces: Iterable[bytes]) -> None:
        """Add a file of ``size`` bytes, piece by piece; zeros are holes in the copy."""
        self._file_header(path, size, mode)
        crc = 0
        with (self._files / path).open("xb") as copy:
            for piece in pieces:
                self._tar(piece)
                crc = isal_zlib.crc32(piece, crc)
                if piece[0] or piece != bytes(len(piece)):
                    copy.write(piece)
                else:
                    copy.seek(len(piece), 1)
            copy.truncate(size)  # flushes
            stamp(copy.fileno(), mode, crc)
        self._pad(size)

    def _tar(self, content: bytes) -> None:
        self._hash_plain(content)
        self._write(self._frame.compress(content))

    def _end(self) -> None:
        self._write(self._frame.flush())
