"""A safetensors header, parsed as what a stranger wrote: nothing in it is taken on trust.

The format is a length, a JSON header and the data
(https://huggingface.co/docs/safetensors/index#format).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

LENGTH_BYTES = 8
MIN_HEADER, MAX_HEADER = 2, 100_000_000  # "{}"; what the library accepts
MAX_TEXT = 1 << 28  # bytes of a JSON file; a manifest.json of 135,000 tensors has 3e7
MAX_NUMBER = 1 << 63
HALVES = re.compile(r"\\u[dD][89a-fA-F]")  # of a pair that JSON writes for one character
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2,
    "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


def strict_json(text: str | bytes) -> Any:
    """Parse JSON that others wrote; bytes are UTF-8, as every other reader of these files has it.

    Raises:
        ValueError: malformed, nested beyond reason, half a character, or one key twice, of which
            readers see one.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")  # json would guess UTF-16, and skip a byte order mark

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"{twice!r} is there twice")
        return found

    try:
        found = json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if HALVES.search(text):
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    return found


@dataclass(frozen=True, kw_only=True)
class Span:
    """A tensor as a header has it; ``begin`` and ``end`` are positions in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_header(text: bytes, size: int) -> list[Span]:
    """The tensors of a safetensors header, by position.

    Args:
        text: the header, without its length.
        size: bytes of the file.

    Raises:
        ValueError: not a header, or tensors that are not side by side until the end of the file.
    """
    header = strict_json(text)
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")  # noqa: TRY004 - one error for callers
    about = header.pop("__metadata__", None) or {}
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise ValueError("its __metadata__ is not text by name")
    at = LENGTH_BYTES + len(text)
    spans = [_span(name, row, at) for name, row in header.items()]
    # An empty tensor lies before the one that begins where it does.
    spans.sort(key=lambda span: (span.begin, span.end))
    for span in spans:
        if span.begin != at:
            raise ValueError(f"{span.name} does not follow the one before")
        at = span.end
    if at != size:
        what = "cut off" if at > size else "too long"
        raise ValueError(f"its header describes {at} bytes, the file has {size}: {what}")
    return spans


def _span(name: str, row: Any, base: int) -> Span:
    if not name.isprintable():
        raise ValueError(f"{name!r} is no name of a tensor")
    known = isinstance(row, dict) and {"dtype", "shape", "data_offsets"} <= row.keys()
    if not known or not _naturals(row["shape"]) or not _naturals(row["data_offsets"], 2):
        raise ValueError(f"{name} has no dtype, shape and data_offsets")
    dtype, shape, (begin, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"{name} has the dtype {dtype!r}, known are {', '.join(DTYPE_BYTES)}")
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(f"{name}: {end - begin} bytes are not {dtype} {list(shape)}")
    return Span(name=name, dtype=dtype, shape=shape, begin=base + begin, end=base + end)


def _naturals(row: Any, count: int | None = None) -> bool:
    """A list of numbers from 0 on that a file can have; ``count`` of them."""
    return (
        isinstance(row, list)
        and count in (None, len(row))
        and all(type(number) is int and 0 <= number < MAX_NUMBER for number in row)
    )
