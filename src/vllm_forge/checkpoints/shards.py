"""Safetensors files as names, dtypes, shapes and byte ranges; nothing is interpreted.

A tensor that passes through stays the very bytes that it was, and is never held in memory as a
whole. The format is a length, a JSON header and the data
(https://huggingface.co/docs/safetensors/index#format); the library's own writer wants every
tensor of a file in memory at once, which at 13 GB per layer is what we must not do.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from vllm_forge.checkpoints.errors import ModelInputError
from vllm_forge.checkpoints.spans import (
    DTYPE_BYTES,
    LENGTH_BYTES,
    MAX_HEADER,
    MAX_TEXT,
    MIN_HEADER,
    parse_header,
    strict_json,
)
from vllm_forge.host import atomic_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
CHUNK = 1 << 24
SHOWN = 200  # characters of a path


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a file: name, safetensors dtype, shape, and where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    size: int

    def read(self) -> bytearray:
        """All of its bytes, row-major and little-endian.

        Raises:
            ModelInputError: the file is shorter than its header says, or cannot be read any more.
        """
        data = bytearray(self.size)
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                size = file.readinto(data)
        except OSError as error:
            raise self._gone(error) from None
        if size != self.size:
            raise ModelInputError(f"{self.name} is cut off", where=str(self.path))
        return data

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, a piece at a time.

        Raises:
            ModelInputError: the file is shorter than its header says, or cannot be read any more.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                left = self.size
                while left:
                    block = file.read(min(CHUNK, left))
                    if not block:
                        raise ModelInputError(f"{self.name} is cut off", where=str(self.path))
                    left -= len(block)
                    yield block
        except OSError as error:
            raise self._gone(error) from None

    def _gone(self, error: OSError) -> ModelInputError:
        return ModelInputError(
            f"{self.name} cannot be read: {error.strerror}",
            where=str(self.path),
            remedy="put the file back, and give the same command again",
        )


@dataclass(frozen=True, kw_only=True)
class Item:
    """A tensor to be written; ``chunks`` gives its bytes when they are needed."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes]]

    @property
    def size(self) -> int:
        """Bytes that ``chunks`` must give."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Written:
    """A tensor as written: name, dtype, shape, SHA-256 of its bytes in hex."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder with config.json and safetensors files.

    Attributes:
        folder: where it is.
        config: config.json.
        tensors: by name.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]

    @property
    def files(self) -> list[Path]:
        """The safetensors files."""
        return sorted({tensor.path for tensor in self.tensors.values()})


def copy_of(tensor: Stored, name: str | None = None) -> Item:
    """The same bytes, perhaps under another name."""
    return Item(
        name=name or tensor.name, dtype=tensor.dtype, shape=tensor.shape, chunks=tensor.chunks
    )


def in_memory(name: str, dtype: str, shape: Sequence[int], data: bytes) -> Item:
    """A tensor whose bytes are here already."""
    return Item(name=name, dtype=dtype, shape=tuple(shape), chunks=lambda: (data,))


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object of a checkpoint.

    Raises:
        ModelInputError: missing, unreadable, malformed, or longer than any such file.
    """
    try:
        if (size := _size(path)) > MAX_TEXT:
            raise ModelInputError(f"{size} bytes, more than {MAX_TEXT}", where=str(path))
        found = strict_json(path.read_bytes())
    except FileNotFoundError:
        raise ModelInputError(f"there is no {path.name}", where=str(path.parent)) from None
    except OSError as error:
        raise ModelInputError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except ValueError as error:
        raise ModelInputError(f"{path.name} is not JSON: {error}", where=str(path)) from None
    if not isinstance(found, dict):
        raise ModelInputError(f"{path.name} is not a JSON object", where=str(path))
    return found


def _size(path: Path) -> int:
    """Bytes of a file.

    Raises:
        ModelInputError: a pipe or a device, which would be waited for.
        OSError: there is none, or it may not be looked at.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ModelInputError("no regular file", where=str(path))
    return found.st_size


def read_shard(path: Path) -> list[Stored]:
    """Names, dtypes, shapes and byte ranges of one file.

    Raises:
        ModelInputError: no such file, or not safetensors, or ranges that are not the file's.
    """
    try:
        size = _size(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if not MIN_HEADER <= length <= MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")  # noqa: TRY301
            spans = parse_header(file.read(length), size)
    except FileNotFoundError:
        raise ModelInputError(f"there is no {path.name}", where=str(path.parent)) from None
    except OSError as error:
        raise ModelInputError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except ValueError as error:
        raise ModelInputError(
            f"not a whole safetensors file: {error}",
            where=str(path),
            remedy="an interrupted download or copy: fetch it again",
        ) from None
    return [
        Stored(
            name=span.name,
            dtype=span.dtype,
            shape=span.shape,
            path=path,
            start=span.begin,
            size=span.end - span.begin,
        )
        for span in spans
    ]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read config.json, the index and every header.

    Raises:
        ModelInputError: a file is missing or malformed, or the index is not what the files hold.
    """
    try:
        there = folder.is_dir()
    except OSError as error:  # a name that is too long, a folder on the way that is locked
        raise ModelInputError(
            f"cannot be read: {error.strerror}", where=str(folder)[:SHOWN]
        ) from None
    if not there:
        raise ModelInputError("there is no such folder", where=str(folder))
    config = read_json(folder / CONFIG)
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not is_weight_map(weight_map):
            raise ModelInputError("the index has no weight_map", where=str(folder / INDEX))
        names = sorted(set(weight_map.values()))
    else:
        weight_map, names = None, [SINGLE]
    tensors: dict[str, Stored] = {}
    for name in names:
        for tensor in read_shard(folder / name):
            if weight_map is not None and weight_map.get(tensor.name) != name:
                raise ModelInputError(
                    f"{tensor.name} is in {name}, the index says "
                    f"{weight_map.get(tensor.name, 'nothing of it')}",
                    where=str(folder / INDEX),
                )
            tensors[tensor.name] = tensor
    if weight_map is not None and (absent := sorted(set(weight_map) - set(tensors))):
        raise ModelInputError(
            f"the index lists {len(absent)} tensors that no file has, e.g. {absent[0]}",
            where=str(folder / INDEX),
        )
    return Checkpoint(folder=folder, config=config, tensors=tensors)


def is_weight_map(found: Any) -> TypeGuard[dict[str, str]]:
    """Whether it is tensor -> file name, and the files are in the index's own folder."""
    return isinstance(found, dict) and all(
        isinstance(file, str)
        and file == Path(file).name != ".."
        and file != ""
        and f"{name}{file}".isprintable()
        for name, file in found.items()
    )


def write_shard(path: Path, items: Iterable[Item]) -> list[Written]:
    """Write one file aside, flush it to the disk, and rename it; the same items, the same bytes.

    The widest dtypes come first, as the library has it, so that every tensor is aligned.
    """
    ordered = sorted(items, key=lambda item: (-DTYPE_BYTES[item.dtype], item.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for item in ordered:
        offsets = [at, at + item.size]
        header[item.name] = {
            "dtype": item.dtype, "shape": list(item.shape), "data_offsets": offsets
        }  # fmt: skip
        at += item.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    written = []
    with atomic_path(path) as aside:
        aside.parent.mkdir(exist_ok=True)
        with aside.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for item in ordered:
                digest, size = hashlib.sha256(), 0
                for chunk in item.chunks():
                    file.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
                if size != item.size:
                    raise ValueError(f"{item.name}: {size} bytes are not {item.size}")
                written.append(
                    Written(
                        name=item.name,
                        dtype=item.dtype,
                        shape=item.shape,
                        sha256=digest.hexdigest(),
                    )
                )
            file.flush()
            os.fsync(file.fileno())
    return written


def write_index(folder: Path, shards: Mapping[str, Iterable[str]], total: int) -> None:
    """Write the index: shard name -> names of its tensors; ``total`` bytes of all tensors."""
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    text = json.dumps(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        indent=2,
    )
    with atomic_path(folder / INDEX) as aside:
        aside.write_text(text + "\n", encoding="utf-8")
