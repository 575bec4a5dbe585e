"""A layer as a function of its wheels: a gzip'd tar made of the wheels' own deflate streams.

A wheel is a zip: each of its files already is a raw deflate stream. RFC 1952 lets a gzip
file be a sequence of members, so a layer is written as

    member: tar header (stored, not compressed)     member: the file's deflate stream, as is

The same trick carries eStargz, which every registry and runtime reads. Nothing is compressed,
so a layer is written at the speed of hashing, and its digest depends on the lock alone: not
on a compressor, its version, its threads, or the host.
"""

from __future__ import annotations

import hashlib
import struct
import tarfile
import zlib
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

BLOCK = 512
STORED_MAX = 65535
# No name, no time, unknown OS: nothing of the host.
GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
MEDIA_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"


@dataclass(frozen=True, kw_only=True)
class LayerBlob:
    """A finished layer.

    Attributes:
        path: the gzip'd tar.
        digest: SHA-256 of the file, hex; what a manifest names.
        diff_id: SHA-256 of the tar inside, hex; what a config names.
        size: bytes of the file.
        unpacked_size: bytes of the files inside.
    """

    path: Path
    digest: str
    diff_id: str
    size: int
    unpacked_size: int


class LayerWriter:
    """Writes one layer, entry by entry. Same entries, same bytes.

    Args:
        path: the new file.
        epoch: modification time of every entry, Unix seconds.
    """

    def __init__(self, path: Path, epoch: int) -> None:
        self._path = path
        self._epoch = epoch
        self._file: IO[bytes] = path.open("wb")
        self._blob = hashlib.sha256()
        self._diff = hashlib.sha256()
        self._pending = bytearray()  # tar bytes that are not in a member yet
        self._unpacked = 0
        self._size = 0

    def __enter__(self) -> LayerWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a folder."""
        self._header(path + "/", tarfile.DIRTYPE, mode=mode)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._header(path, tarfile.SYMTYPE, mode=0o777, target=target)

    def hardlink(self, path: str, target: str) -> None:
        """Add another name of an earlier entry."""
        self._header(path, tarfile.LNKTYPE, mode=0o644, target=target)

    def data(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Add a file from memory, stored."""
        self._header(path, tarfile.REGTYPE, mode=mode, size=len(content))
        self._tar(content)
        self._pad(len(content))

    def begin_deflated(self, path: str, size: int, mode: int = 0o644) -> None:
        """Add the header of a file whose content comes through ``deflated``."""
        self._header(path, tarfile.REGTYPE, mode=mode, size=size)

    def deflated(
        self, raw: Iterable[memoryview], plain: Iterable[bytes], crc: int, size: int
    ) -> None:
        """Add the content: ``raw`` is one whole deflate stream, ``plain`` what it inflates to.

        Both are consumed; ``plain`` is only hashed. ``crc`` and ``size`` are those of the
        plain bytes, and the caller has checked them.
        """
        self._flush()
        self._write(GZIP_HEADER)
        for piece in raw:
            self._write(piece)
        self._write(struct.pack("<II", crc, size & 0xFFFFFFFF))
        for block in plain:
            self._diff.update(block)
        self._pad(size)

    def close(self) -> LayerBlob:
        """Write the end of the archive."""
        self._tar(bytes(2 * BLOCK))
        self._flush()
        self._file.close()
        return LayerBlob(
            path=self._path,
            digest=self._blob.hexdigest(),
            diff_id=self._diff.hexdigest(),
            size=self._size,
            unpacked_size=self._unpacked,
        )

    def _header(
        self, path: str, kind: bytes, *, mode: int, size: int = 0, target: str = ""
    ) -> None:
        info = tarfile.TarInfo(path)
        info.type = kind
        info.mode = mode
        info.size = size
        info.linkname = target
        info.mtime = self._epoch
        self._tar(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"))
        self._unpacked += size

    def _pad(self, size: int) -> None:
        self._tar(bytes(-size % BLOCK))

    def _tar(self, content: bytes) -> None:
        self._diff.update(content)
        self._pending += content

    def _flush(self) -> None:
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
        self._write(struct.pack("<II", zlib.crc32(content), len(content) & 0xFFFFFFFF))

    def _write(self, content: bytes | memoryview) -> None:
        self._blob.update(content)
        self._file.write(content)
        self._size += len(content)
