"""FP8 weights in blocks of 128 x 128: codec, and how far a decoded weight may be from its source.

A weight is E4M3 times the scale of its block, ``amax / 448``. compressed-tensors stores FP32
scales, DeepSeek's own checkpoints powers of two (E8M0), rounded up. Encoding does the same float32
operations as compressed-tensors (quantization/utils/helpers.py `calculate_qparams`,
lifecycle/forward_helpers.py `_process_block` in 0.17.0); decoding is exact in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_forge.checkpoints.codecs.small_floats import E4M3_MAX, e4m3_decode, e4m3_encode, e8m0_ceil

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 128
EPSILON = np.finfo(np.float32).eps  # instead of a scale of zero
HALF, SUBNORMAL_HALF = 2.0**-4, 2.0**-10  # half of E4M3's spacing, see nvfp4.py
TOOL_ROUNDING = 2.0**-8


@dataclass(frozen=True, kw_only=True)
class Fp8Block:
    """A quantized weight [N, K].

    Attributes:
        codes: [N, K] uint8, E4M3.
        scales: [ceil(N/128), ceil(K/128)] float32.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]

    def values(self) -> NDArray[np.float64]:
        """[N, K]."""
        scales: NDArray[np.float64] = spread(self.scales.astype(np.float64), self.codes.shape)
        return e4m3_decode(self.codes) * scales


def spread(scales: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """One scale per element, [N, K]."""
    rows, columns = shape
    return np.repeat(np.repeat(scales, BLOCK, axis=0)[:rows], BLOCK, axis=1)[:, :columns]


def block_maxima(weight: NDArray[Any]) -> NDArray[Any]:
    """The largest magnitude of each block; blocks at the edge hold what is left."""
    rows, columns = weight.shape
    tall, wide = -(-rows // BLOCK), -(-columns // BLOCK)
    padded = np.zeros((tall * BLOCK, wide * BLOCK), dtype=weight.dtype)
    padded[:rows, :columns] = np.abs(weight)
    found: NDArray[Any] = padded.reshape(tall, BLOCK, wide, BLOCK).max(axis=(1, 3))
    return found


def encode(weight: NDArray[np.floating], *, powers_of_two: bool = False) -> Fp8Block:
    """Quantize a weight [N, K], rounding to nearest; taken as float32."""
    single = np.asarray(weight, dtype=np.float32)
    scales = block_maxima(single) / np.float32(E4M3_MAX)
    scales = np.where(scales == 0, EPSILON, scales)
    if powers_of_two:
        scales = e8m0_ceil(scales)
    kept: NDArray[np.float32] = scales.astype(np.float32)
    quotient = single / spread(kept, single.shape)
    return Fp8Block(codes=e4m3_encode(quotient), scales=kept)


def bound(weight: NDArray[np.floating], *, powers_of_two: bool = False) -> NDArray[np.float64]:
    """The most that a decoded element may differ, [N, K]; from the source weight alone.

    E4M3 rounds a normal number by 2^-4 of itself at most, and below 2^-6 of the scale by 2^-10 of
    it. A power of two is up to twice as large a scale.
    """
    size = np.abs(np.asarray(weight, dtype=np.float64))
    scale = spread(block_maxima(size) / E4M3_MAX, size.shape) * (2 if powers_of_two else 1)
    # A scale that was rounded down clips the largest element of its block.
    clipped = size * TOOL_ROUNDING
    return np.maximum(np.maximum(size * HALF, scale * SUBNORMAL_HALF), clipped) * (
        1 + TOOL_ROUNDING
    )
