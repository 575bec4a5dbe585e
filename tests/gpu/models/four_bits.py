"""Weights of few values as compressed-tensors stores them in four bits, exactly.

Scales take turns along K, down the rows and from expert to expert, and codes make up for them: a
scale that is read from another place, or a code, is another number. Standard library only.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.gpu.models.exact_checkpoint import Tensor, bfloat16

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

E2M1 = {0.0: 0, 0.5: 1, 1.0: 2, 2.0: 4, 4.0: 6}
E4M3 = {0.5: 0x30, 1.0: 0x38, 2.0: 0x40}
LARGEST = 448 * 6  # what an NVFP4 code and its scale hold together


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
