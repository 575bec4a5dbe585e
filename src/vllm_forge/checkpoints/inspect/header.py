"""Safetensors headers of any place: names, dtypes, shapes, byte ranges; tensor data is not read.

The format is a length, a JSON header and the data
(https://huggingface.co/docs/safetensors/index#format).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_forge.checkpoints.errors import CheckpointUnreadableError
from vllm_forge.checkpoints.spans import LENGTH_BYTES, MAX_HEADER, MIN_HEADER, parse_header

if TYPE_CHECKING:
    from vllm_forge.checkpoints.inspect.places import Place

FIRST_READ = 1 << 20  # holds most headers: one request instead of two


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor as a header has it.

    Attributes:
        name: as stored.
        dtype: safetensors' name.
        shape: rows first.
        shard: file that holds it.
        begin: of its bytes in that file.
        end: one past them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin


def read_header(place: Place, shard: str, size: int) -> list[Entry]:
    """The entries of one shard, by position.

    Args:
        place: where it is.
        shard: its file name.
        size: bytes of the whole file.

    Raises:
        CheckpointUnreadableError: not a safetensors file, or cut off, or bytes that do not add up.
    """
    first = place.read(shard, 0, min(size, FIRST_READ))
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    start = LENGTH_BYTES + length
    if not MIN_HEADER <= length <= MAX_HEADER or start > size:
        raise _unreadable(place, shard, f"a header of {length} bytes in a file of {size}")
    text = first[LENGTH_BYTES:start]
    if len(text) < length:
        text += place.read(shard, LENGTH_BYTES + len(text), start)
    try:
        spans = parse_header(text, size)
    except ValueError as error:
        raise _unreadable(place, shard, str(error)) from None
    return [Entry(shard=shard, **vars(span)) for span in spans]


def _unreadable(place: Place, shard: str, what: str) -> CheckpointUnreadableError:
    return CheckpointUnreadableError(
        f"{shard} is not a whole safetensors file: {what}",
        where=str(place),
        remedy="fetch that file again",
    )
