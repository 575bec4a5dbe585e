"""What the checkpoints of exactly known tokens share: Walsh functions, BF16, files.

Standard library only: the tests on a GPU host write the checkpoints themselves.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor as safetensors stores it.

    Attributes:
        name: as the model asks for it.
        dtype: safetensors' name, e.g. ``BF16``.
        shape: rows first.
        data: little-endian, row after row.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def hadamard(size: int) -> list[list[int]]:
    """Sylvester's matrix: rows of +1 and -1, orthogonal."""
    return [[1 - 2 * ((row & col).bit_count() & 1) for col in range(size)] for row in range(size)]


def bfloat16(value: float) -> bytes:
    """Little-endian BF16 of a value that BF16 has exactly.

    Raises:
        ValueError: it would be rounded, and the model would not be exact.
    """
    data = struct.pack("<f", value)
    if data[:2] != b"\0\0":
        raise ValueError(f"{value} is not a BF16 value")
    return data[2:]


def tokenizer(size: int) -> dict[str, dict[str, object]]:
    """Files of a tokenizer whose words are ``t0``, ``t1`` ...: the HTTP server wants one."""
    model = {
        "type": "WordLevel",
        "vocab": {f"t{token}": token for token in range(size)},
        "unk_token": "t0",
    }
    return {
        "tokenizer.json": {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
            "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": None, "decoder": None, "model": model,
        },
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }  # fmt: skip


def save(folder: Path, tensors: Iterable[Tensor], config: dict[str, object], words: int) -> Path:
    """Write ``model.safetensors``, ``config.json`` and the files of a tokenizer of ``words``."""
    folder.mkdir(parents=True)
    header, blobs, at = {}, [], 0
    for tensor in tensors:
        end = at + len(tensor.data)
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        blobs.append(tensor.data)
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.writelines([struct.pack("<Q", len(text)), text, *blobs])
    for name, value in {"config.json": config, **tokenizer(words)}.items():
        (folder / name).write_text(json.dumps(value, indent=1) + "\n")
    return folder
