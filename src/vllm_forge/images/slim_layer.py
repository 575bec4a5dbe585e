"""A SKU's own layer: a group's libraries without foreign code, and their RECORD rows."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from vllm_forge.images.layer import FILE_NAMES, ZSTD, LayerBlob, ZstdLayerWriter
from vllm_forge.images.slim import cut, pieces
from vllm_forge.images.store import StoredLayer, keep_layer, make_folders
from vllm_forge.sources.wheel_format import record_hash, rewrite_record

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

RECORDS = "opt/venv/lib/python*/site-packages/*.dist-info/RECORD"


def write_slim_layer(
    key: str, whole: StoredLayer, capability: tuple[int, int], epoch: int
) -> StoredLayer:
    """Write a SKU's libraries of one group, or return the layer that is there.

    Args:
        key: hash of the group's key, the capability and the format.
        whole: the group's layer, with the libraries as the wheels have them.
        capability: compute capability of the SKU, (major, minor).
        epoch: modification time of all entries, Unix seconds.

    Raises:
        UnknownFatbinError: a library's device code has a layout that we do not know.
    """

    def write(folder: Path) -> tuple[LayerBlob, dict[str, Any]]:
        files = folder / "files"
        removed: dict[str, Any] = {}
        libraries = sorted(
            path.relative_to(whole.code).as_posix()
            for path in whole.code.rglob("*")
            if path.is_file()
        )
        records = sorted(whole.files.glob(RECORDS)) if libraries else []
        with ZstdLayerWriter(folder / FILE_NAMES[ZSTD], epoch) as layer:
            for parent in make_folders(files, libraries):
                layer.directory(parent)
            for name in libraries:
                removed[name] = _add(layer, whole.code / name, files / name, name, capability)
            for path in records:
                name = path.relative_to(whole.files).as_posix()
                old = path.read_bytes()
                new = update_record(old, name, removed)
                if new != old:
                    for parent in make_folders(files, [name])[-1:]:
                        layer.directory(parent)
                    layer.data(name, new)
                    (files / name).write_bytes(new)
                    (files / name).chmod(0o644)
            return layer.close(), removed

    return keep_layer(key, write)


def _add(
    layer: ZstdLayerWriter, source: Path, target: Path, name: str, capability: tuple[int, int]
) -> dict[str, Any]:
    """Add one library; its zeros are holes in the unpacked copy."""
    found = cut(source, capability)
    mode = source.stat().st_mode & 0o777
    size = source.stat().st_size
    digest = hashlib.sha256()

    def content() -> Iterator[bytes]:
        with target.open("xb", buffering=0) as out:
            for piece, zeros in pieces(source, found.ranges):
                digest.update(piece)
                if zeros:
                    out.seek(len(piece), 1)
                else:
                    out.write(piece)
                yield piece
            out.truncate(size)

    layer.stream(name, size, mode, content())
    target.chmod(mode)
    return {
        "bytes": found.size,
        "targets": found.targets,
        "sha256": record_hash(digest.digest()),
    }


def update_record(content: bytes, name: str, removed: Mapping[str, Any]) -> bytes:
    """A RECORD whose rows of slimmed libraries have the hashes of what is in the image.

    Args:
        content: the file.
        name: its path in the image.
        removed: path in the image -> what was done to it; of ``write_slim_layer``.
    """
    site = name.rsplit("/", 2)[0]

    def change(path: str, digest: str, size: str) -> tuple[str, str, str]:
        slim = removed.get(f"{site}/{path}")
        return path, f"sha256={slim['sha256']}" if slim and slim["bytes"] else digest, size

    return rewrite_record(content, change)
