"""NVFP4 weights: codec, and how far a decoded weight may be from the one it was made of.

A weight is E2M1 times the E4M3 scale of its group of 16 along K, divided by the FP32 global scale
of the tensor. Two codes share a byte, the first one in the low nibble. compressed-tensors stores
the divisor (``weight_global_scale``); ModelOpt its inverse (``weight_scale_2``).

Encoding does the same float32 operations in the same order as compressed-tensors
(quantization/utils/helpers.py `generate_gparam`, `calculate_qparams`; lifecycle/forward_helpers.py
`_quantize` in 0.17.0), so that codes and scales are equal bit for bit
(tests/patches/test_codecs.py). Decoding is exact in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm_forge.checkpoints.codecs.small_floats import (
    E2M1_MAX,
    E4M3_MAX,
    e2m1_decode,
    e2m1_encode,
    e4m3_decode,
    e4m3_encode,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

GROUP = 16
# A group scale of zero would divide by zero; the tools take float8_e4m3fn's epsilon instead.
EPSILON = np.float32(0.125)
# Half of E4M3's spacing: relative to a normal number, and below the normal numbers.
E4M3_HALF, E4M3_SUBNORMAL_HALF = 2.0**-4, 2.0**-10
# Tools that find minima and maxima of BF16 weights may divide them in BF16.
TOOL_ROUNDING = 2.0**-8


@dataclass(frozen=True, kw_only=True)
class Nvfp4:
    """A quantized weight [N, K].

    Attributes:
        packed: [N, K/2] uint8, two codes each.
        scales: [N, K/16] uint8, E4M3 codes.
        global_scale: the divisor.
    """

    packed: NDArray[np.uint8]
    scales: NDArray[np.uint8]
    global_scale: np.float32

    def values(self) -> NDArray[np.float64]:
        """[N, K]."""
        scales = np.repeat(e4m3_decode(self.scales), GROUP, axis=-1)
        return e2m1_decode(unpack(self.packed)) * scales / float(self.global_scale)


def pack(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[..., K] codes below 16 to [..., K/2] bytes."""
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))


def unpack(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[..., K/2] bytes to [..., K] codes."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1)
    return codes.reshape(*packed.shape[:-1], -1)


def global_scale_of(*weights: NDArray[np.floating]) -> np.float32:
    """The divisor that uses all of E4M3's range; one for all weights that must share it."""
    largest = np.float32(max(np.abs(weight).max() for weight in weights))
    largest = max(largest, np.finfo(np.float32).tiny)
    # torch divides a number by a tensor so: one rounding more, and another last bit at times.
    with np.errstate(over="ignore"):
        scale = np.float32(E4M3_MAX * E2M1_MAX) * (np.float32(1) / largest)
    return scale if np.isfinite(scale) else np.float32(1)


def encode(weight: NDArray[np.floating], global_scale: np.float32 | None = None) -> Nvfp4:
    """Quantize a weight [N, K], rounding to nearest.

    Args:
        weight: K is a multiple of 16; taken as float32.
        global_scale: the divisor; None: the weight's own.
    """
    single = np.asarray(weight, dtype=np.float32)
    divisor = global_scale_of(single) if global_scale is None else np.float32(global_scale)
    groups = single.reshape(*single.shape[:-1], -1, GROUP)
    largest = np.abs(groups).max(axis=-1)
    scales = e4m3_encode(divisor * (largest / np.float32(E2M1_MAX)))
    scales = np.where(scales == 0, e4m3_encode(np.array(EPSILON)), scales)
    local = e4m3_decode(scales).astype(np.float32) / divisor
    codes = e2m1_encode(groups / local[..., None])
    return Nvfp4(packed=pack(codes.reshape(single.shape)), scales=scales, global_scale=divisor)


def bound(weight: NDArray[np.floating], global_scale: np.float32) -> NDArray[np.float64]:
    """The most that a decoded element may differ, [N, K]; from the source weight alone.

    With ``s = amax(group) / 6`` the stored scale lies within E4M3's rounding of ``s``, whatever
    the tool. At distance ``r = |w| / s`` E2M1 is spaced by 0.5 up to 2, by 1 up to 4, by 2 up to
    6; half of that, times the largest scale possible, is the rounding. Beyond 6 of the smallest
    scale possible the code is 6, and the excess is lost.

    Args:
        weight: what was quantized.
        global_scale: the divisor that must have been used.
    """
    size = np.abs(np.asarray(weight, dtype=np.float64))
    groups = size.reshape(*size.shape[:-1], -1, GROUP)
    ideal = groups.max(axis=-1, keepdims=True) / E2M1_MAX
    rounding = np.maximum(ideal * E4M3_HALF, E4M3_SUBNORMAL_HALF / float(global_scale))
    rounding += ideal * TOOL_ROUNDING
    most, least = ideal + rounding, np.maximum(ideal - rounding, 0)
    distance = np.divide(groups, least, out=np.full_like(groups, np.inf), where=least > 0)
    limit = np.maximum(half_spacing(distance) * most, groups - E2M1_MAX * least)
    return np.asarray(limit.reshape(size.shape) * (1 + TOOL_ROUNDING))


def half_spacing(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half of E2M1's spacing at a magnitude."""
    return np.select([distance <= 2, distance <= 4], [0.25, 0.5], 1.0)  # noqa: PLR2004 - E2M1
