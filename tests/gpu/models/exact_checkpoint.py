"""What the checkpoints of exactly known tokens share: Walsh functions, BF16, four bits, files.

Weights of few values are stored in four bits as compressed-tensors does it, exactly. Scales take
turns along K, down the rows and from expert to expert, and codes make up for them: a scale that is
read from another place, or a code, is another number. Standard library only: the tests on a GPU
host write the checkpoints themselves.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

E2M1 = {0.0: 0, 0.5: 1, 1.0: 2, 2.0: 4, 4.0: 6}
E4M3 = {0.5: 0x30, 1.0: 0x38, 2.0: 0x40}
LARGEST = 448 * 6  # what an NVFP4 code and its scale hold together


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


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the experts' weights are stored.

    Attributes:
        name: compressed-tensors' format.
        group: weights along K that share a scale.
        scales: those in use, by turns: a scale read from another place is another number.
        activations: whether these are FP4 too, where a GPU has it: NVFP4.
    """

    name: str
    group: int
    scales: tuple[float, ...]
    activations: bool

    def code(self, value: float) -> int:
        """Four bits for a value."""
        if self.activations:
            return E2M1[abs(value)] | (8 if value < 0 else 0)
        return int(value) + 8

    def config(self) -> dict[str, object]:
        """What a group of compressed-tensors' configuration says, but for its targets."""
        weights: dict[str, object] = {
            "num_bits": 4, "symmetric": True, "group_size": self.group, "dynamic": False,
            "actorder": None,
        }  # fmt: skip
        weights |= (
            {"type": "float", "strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
            if self.activations
            else {"type": "int", "strategy": "group"}
        )
        return {
            "weights": weights,
            "input_activations": {**weights, "dynamic": "local"} if self.activations else None,
            "output_activations": None,
            "format": self.name,
        }

    def encode(self, values: bytes, turn: int) -> tuple[bytes, list[float]]:
        """One row: two codes per byte, and the scale of each group.

        Args:
            values: weights -2 to 2, plus 2.
            turn: which scale the first group has.
        """
        coded = [
            values.translate(bytes([self.code((v - 2) / scale) for v in range(5)] + [0] * 251))
            for scale in self.scales
        ]
        groups = range(0, len(values), self.group)
        turns = [(turn + number) % len(coded) for number in range(len(groups))]
        row = b"".join(
            coded[which][at : at + self.group] for which, at in zip(turns, groups, strict=True)
        )
        low, high = int.from_bytes(row[0::2]), int.from_bytes(row[1::2])
        return (low | high << 4).to_bytes(len(row) // 2), [self.scales[which] for which in turns]


NVFP4 = Scheme(name="nvfp4-pack-quantized", group=16, scales=(1.0, 0.5, 2.0), activations=True)
INT4 = Scheme(name="pack-quantized", group=128, scales=(1.0, 0.5), activations=False)


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A weight [N, K] of whole numbers from -2 to 2, times a unit.

    Attributes:
        rows: N rows of K bytes, each the number plus 2.
        unit: a power of two.
        largest_input: greatest absolute value that it is ever multiplied with.
    """

    rows: Sequence[bytes]
    unit: float
    largest_input: float

    def tensors(self, prefix: str, scheme: Scheme, turn: int) -> Iterator[Tensor]:
        """As the checkpoint has them; ``turn`` is where the scales of the first row begin."""
        coded = [scheme.encode(row, turn + number) for number, row in enumerate(self.rows)]
        packed, scales = b"".join(row for row, _ in coded), [s for _, row in coded for s in row]
        shape = (len(self.rows), len(self.rows[0]))
        grouped = (shape[0], shape[1] // scheme.group)
        if scheme.activations:
            data = bytes(E4M3[scale] for scale in scales)
            yield Tensor(name=f"{prefix}weight_packed", dtype="U8", shape=(shape[0], shape[1] // 2),
                         data=packed)  # fmt: skip
            yield Tensor(name=f"{prefix}weight_scale", dtype="F8_E4M3", shape=grouped, data=data)
            # Divisors. An input's makes the scale of a group with its greatest value 448, exactly.
            for name, divisor in (
                ("weight", 1 / self.unit),
                ("input", LARGEST / self.largest_input),
            ):
                yield Tensor(name=f"{prefix}{name}_global_scale", dtype="F32", shape=(1,),
                             data=struct.pack("<f", divisor))  # fmt: skip
            return
        table = {scale: bfloat16(scale * self.unit) for scale in scheme.scales}
        yield Tensor(name=f"{prefix}weight_packed", dtype="I32", shape=(shape[0], shape[1] // 8),
                     data=packed)  # fmt: skip
        yield Tensor(name=f"{prefix}weight_scale", dtype="BF16", shape=grouped,
                     data=b"".join(map(table.__getitem__, scales)))  # fmt: skip
        yield Tensor(name=f"{prefix}weight_shape", dtype="I64", shape=(2,),
                     data=struct.pack("<2q", *shape))  # fmt: skip
