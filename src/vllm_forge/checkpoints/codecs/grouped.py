"""MXFP4 and INT4 weights: what stored bytes mean, and how far from the source that may be.

MXFP4 is E2M1 times the power of two of its group of 32 along K (OCP Microscaling Formats 1.0,
sections 5.3 and 6.3); two codes share a byte, the first one in the low nibble, as in NVFP4.
INT4 is an integer from -8 to 7 times the BF16 scale of its group of 128. compressed-tensors stores
the integer plus 8, eight of them per int32, the first one in the lowest bits (0.17.0,
compressors/pack_quantized/helpers.py `pack_to_int32`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm_forge.checkpoints.codecs import nvfp4
from vllm_forge.checkpoints.codecs.small_floats import E2M1_MAX, e2m1_decode, e8m0_decode

if TYPE_CHECKING:
    from numpy.typing import NDArray

MXFP4_GROUP, INT4_GROUP = 32, 128
E2M1_TOP_EXPONENT = 2  # of its largest value, 6 = 1.5 x 2^2
PER_WORD, BITS, OFFSET = 8, 4, 8
STEPS = 7.5  # from zero to the largest magnitude (calculate_qparams: half of 7 - -8)
BF16_HALF = 2.0**-9  # rounding of a scale, relative


@dataclass(frozen=True, kw_only=True)
class Mxfp4:
    """A quantized weight [N, K].

    Attributes:
        packed: [N, K/2] uint8, two codes each.
        scales: [N, K/32] uint8, E8M0 codes.
    """

    packed: NDArray[np.uint8]
    scales: NDArray[np.uint8]

    def values(self) -> NDArray[np.float64]:
        """[N, K]; NaN where a scale is."""
        scales = np.repeat(e8m0_decode(self.scales), MXFP4_GROUP, axis=-1)
        values: NDArray[np.float64] = e2m1_decode(nvfp4.unpack(self.packed)) * scales
        return values


def mxfp4_bound(weight: NDArray[np.floating]) -> NDArray[np.float64]:
    """The most that a decoded element may differ, [N, K]; from the source weight alone.

    With ``a = amax(group)`` the scale is 2^(floor(log2 a) - 2), as the format's specification has
    it, so that up to 8 of it are cut to 6; or twice that where ``a`` exceeds 6 of it, as tools
    have it that round up. Which of the two it is is left open: each has its own rounding.
    """
    size = np.abs(np.asarray(weight, dtype=np.float64))
    groups = size.reshape(*size.shape[:-1], -1, MXFP4_GROUP)
    largest = groups.max(axis=-1, keepdims=True)
    _, exponent = np.frexp(largest)  # largest = m * 2^exponent with m from 0.5 to 1
    scale = np.where(largest > 0, np.ldexp(1.0, exponent - 1 - E2M1_TOP_EXPONENT), 0.0)
    limit = _rounding(groups, scale)
    doubled = np.maximum(limit, _rounding(groups, 2 * scale))
    return np.where(largest > E2M1_MAX * scale, doubled, limit).reshape(size.shape)


def _rounding(groups: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half of E2M1's spacing at each element, and what is beyond its largest value."""
    distance = np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0)
    half = nvfp4.half_spacing(distance)
    return np.asarray(np.maximum(half * scale, groups - E2M1_MAX * scale))


@dataclass(frozen=True, kw_only=True)
class Int4:
    """A quantized weight [N, K].

    Attributes:
        packed: [N, K/8] int32, eight codes each.
        scales: [N, K/128] float32 with BF16's values.
    """

    packed: NDArray[np.int32]
    scales: NDArray[np.float32]

    def values(self) -> NDArray[np.float64]:
        """[N, K]."""
        codes = unpack_words(self.packed).astype(np.float64) - OFFSET
        groups = codes.reshape(*codes.shape[:-1], self.scales.shape[-1], -1)
        scaled: NDArray[np.float64] = groups * self.scales.astype(np.float64)[..., None]
        return scaled.reshape(codes.shape)


def unpack_words(packed: NDArray[np.int32]) -> NDArray[np.uint8]:
    """[..., W] words to [..., 8 W] codes below 16."""
    shifts = np.arange(PER_WORD, dtype=np.uint32) * BITS
    codes = (packed.view(np.uint32)[..., None] >> shifts) & 15
    return np.asarray(codes.astype(np.uint8)).reshape(*packed.shape[:-1], -1)


def int4_bound(weight: NDArray[np.floating]) -> NDArray[np.float64]:
    """The most that a decoded element may differ, [N, K]; from the source weight alone.

    For rounding to nearest: half a step of ``amax(group) / 7.5``, also at the positive end, where
    7.5 becomes 7; and the rounding of the scale, which an element has as often as its code says.
    What GPTQ does to errors is not bounded by this.
    """
    size = np.abs(np.asarray(weight, dtype=np.float64))
    groups = size.reshape(*size.shape[:-1], -1, INT4_GROUP)
    step = groups.max(axis=-1, keepdims=True) / STEPS
    relative = BF16_HALF + nvfp4.TOOL_ROUNDING
    limit: NDArray[np.float64] = (0.5 * step + groups * relative) * (1 + relative)
    return limit.reshape(size.shape)
