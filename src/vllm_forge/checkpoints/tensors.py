"""Tensors of safetensors files, read and written as byte ranges; nothing is interpreted.

The format is a length, a JSON header and the data
(https://huggingface.co/docs/safetensors/index#format). A header is untrusted: nothing in it is
believed. A tensor that passes through keeps its bytes and is never in memory as a whole; the
library's own writer wants every tensor of a file in memory at once, which is 13 GB per layer.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_forge.checkpoints.fixtures import sparse
from vllm_forge.host import atomic_path, parse_json, write_json

if TYPE_CHECKING:
    from vllm_forge.checkpoints.checkpoint import CheckpointSource

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
LENGTH_BYTES = 8
MIN_HEADER, MAX_HEADER = 2, 100_000_000  # "{}"; what the library accepts
MAX_NUMBER = 1 << 63
MAX_NAME = 200  # characters; the longest of any artifact have 60
MAX_DIMENSIONS = 64  # what torch has
CHUNK = 1 << 24
FIRST_READ = 1 << 20  # holds most headers: one request instead of two
DTYPE_BYTES = sparse.DTYPE_BYTES


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor: name, safetensors dtype (``BF16``, ``F32``, ``I64``, ...), shape, rows first."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


Spec = TypeVar("Spec", bound=TensorSpec)


@dataclass(frozen=True, kw_only=True)
class StoredTensor(TensorSpec):
    """A tensor of a file; ``begin`` and ``end`` are positions of its bytes in the file ``shard``.

    Reading raises what ``source.read`` does.
    """

    source: "CheckpointSource" = field(compare=False, repr=False)
    shard: str
    begin: int
    end: int

    def read(self) -> bytearray:
        """All of its bytes, row-major and little-endian."""
        return self.source.read(self.shard, self.begin, self.end)

    def chunks(self) -> Iterator[bytearray]:
        """Its bytes, a piece at a time."""
        for at in range(self.begin, self.end, CHUNK):
            yield self.source.read(self.shard, at, min(at + CHUNK, self.end))

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class TensorToWrite(TensorSpec):
    """A tensor to be written; ``chunks`` gives its ``size`` bytes when they are needed."""

    chunks: Callable[[], Iterable[bytes | bytearray]]

    def data(self) -> bytes:
        return b"".join(self.chunks())


def copy_of(tensor: StoredTensor, name: str | None = None) -> TensorToWrite:
    """The same bytes, perhaps under another name."""
    return TensorToWrite(
        name=name or tensor.name, dtype=tensor.dtype, shape=tensor.shape, chunks=tensor.chunks
    )


def in_memory(name: str, dtype: str, shape: Sequence[int], data: bytes) -> TensorToWrite:
    return TensorToWrite(name=name, dtype=dtype, shape=tuple(shape), chunks=lambda: (data,))


def read_header(
    source: "CheckpointSource", shard: str, count: Callable[[int], None] | None = None
) -> list[StoredTensor]:
    """The tensors of one shard, by position; their data is not read.

    ``count`` gets the bytes of the header before they are parsed, and may raise.
    """
    size = source.sizes[shard]
    first = source.read(shard, 0, min(size, FIRST_READ))
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    start = LENGTH_BYTES + length
    try:
        if not MIN_HEADER <= length <= MAX_HEADER or start > size:
            raise ValueError(f"a header of {length} bytes in a file of {size}")  # noqa: TRY301
        if count is not None:
            count(length)
        text = first[LENGTH_BYTES:start]
        if len(text) < length:
            text += source.read(shard, LENGTH_BYTES + len(text), start)
        return parse_header(text, size, source, shard)
    except ValueError as error:
        raise source.malformed(shard, f"a whole safetensors file: {error}") from None


def parse_header(
    text: bytes | bytearray, size: int, source: "CheckpointSource", shard: str
) -> list[StoredTensor]:
    """The tensors of a safetensors header (without its length) of a file of ``size`` bytes.

    ValueError: not a header, or tensors that are not side by side until the end of the file.
    """
    header = parse_json(bytes(text))
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")  # noqa: TRY004 - one error for callers
    about = header.pop("__metadata__", None) or {}
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise ValueError("invalid __metadata__: expected strings by name")
    at = LENGTH_BYTES + len(text)
    tensors = []
    for name, row in header.items():
        dtype, shape, begin, end = _fields(name, row)
        tensor = StoredTensor(
            name=name, dtype=dtype, shape=shape,
            source=source, shard=shard, begin=at + begin, end=at + end,
        )  # fmt: skip
        tensors.append(tensor)
    # An empty tensor lies before the one that begins where it does.
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    for tensor in tensors:
        if tensor.begin != at:
            raise ValueError(f"{tensor.name} does not follow the tensor before it")
        at = tensor.end
    if at != size:
        what = "cut off" if at > size else "too long"
        raise ValueError(f"its header describes {at} bytes, the file has {size}: {what}")
    return tensors


def _fields(name: str, row: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not name.isprintable() or len(name) > MAX_NAME:
        limit = f"expected at most {MAX_NAME} printable characters"
        raise ValueError(f"invalid tensor name {name[:MAX_NAME]!r}: {limit}")
    known = isinstance(row, dict) and {"dtype", "shape", "data_offsets"} <= row.keys()
    if not known or not _naturals(row["shape"]) or not _naturals(row["data_offsets"], 2):
        raise ValueError(f"{name} has no dtype, shape and data_offsets")
    dtype, shape, (begin, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        what = f"unknown dtype {repr(dtype)[:MAX_NAME]}"
        raise ValueError(f"{name}: {what}, known are {', '.join(DTYPE_BYTES)}")
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(f"{name}: {end - begin} bytes are not {dtype} {list(shape)}")
    return dtype, shape, begin, end


def _naturals(row: Any, count: int | None = None) -> bool:
    """Whether it is a list of ``count`` numbers from 0 on that a file can have."""
    return (
        isinstance(row, list)
        and len(row) <= MAX_DIMENSIONS
        and count in (None, len(row))
        and all(type(number) is int and 0 <= number < MAX_NUMBER for number in row)
    )


def encode_header(tensors: Iterable[Spec]) -> tuple[list[Spec], bytes]:
    """The tensors of a file in their order, and its header without the length.

    The widest dtypes come first, as the library has it, so that every tensor is aligned.
    """
    ordered = sorted(tensors, key=lambda tensor: (-DTYPE_BYTES[tensor.dtype], tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in ordered:
        offsets = [at, at + tensor.size]
        header[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets
        }  # fmt: skip
        at += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    return ordered, text + b" " * (-len(text) % 8)


def write_shard(path: Path, tensors: Iterable[TensorToWrite]) -> dict[str, str]:
    """Write one file aside, flush it to the disk, and rename it; the same tensors, the same bytes.

    Returns the SHA-256 of each tensor's bytes, in hex, by name.
    """
    ordered, text = encode_header(tensors)
    sums = {}
    with atomic_path(path) as aside, aside.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for tensor in ordered:
            digest, size = hashlib.sha256(), 0
            for chunk in tensor.chunks():
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            if size != tensor.size:
                raise ValueError(f"{tensor.name}: {size} bytes are not {tensor.size}")
            sums[tensor.name] = digest.hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return sums


def write_index(folder: Path, shards: Mapping[str, Iterable[TensorSpec]]) -> None:
    """Write the index: shard name -> its tensors."""
    total = sum(tensor.size for tensors in shards.values() for tensor in tensors)
    weight_map = {tensor.name: shard for shard, tensors in shards.items() for tensor in tensors}
    write_json(
        folder / INDEX,
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        indent=2,
    )
