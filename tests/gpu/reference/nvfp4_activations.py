"""NVFP4 activations: what a kernel may make of a row, given how well the row itself is known.

A kernel quantizes with a fixed divisor: the scale of 16 elements is E4M3 of ``divisor * amax / 6``,
the codes are E2M1 of ``x * divisor / scale`` (``cvt_warp_fp16_to_fp4`` in
csrc/libtorch_stable/quantization/fp4/nvfp4_utils.cuh of vLLM 0.26.0). Both roundings are to
nearest. The kernel multiplies with approximate reciprocals, so that a number within
:data:`APPROXIMATE` of a tie may go either way; so may all numbers of an interval that holds a tie.
:func:`spans` gives the lowest and the highest value that can come out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm_forge.checkpoints.codecs.nvfp4 import GROUP
from vllm_forge.checkpoints.codecs.small_floats import (
    E2M1_MAX,
    e2m1_decode,
    e2m1_encode,
    e4m3_decode,
    e4m3_encode,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

# rcp.approx.ftz.f32 is within 1 ulp (PTX ISA); four of such operations, and room.
APPROXIMATE = 2.0**-20


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A quantized activation [M, K].

    Attributes:
        codes: [M, K] uint8, E2M1.
        scales: [M, K/16] uint8, E4M3.
        divisor: the global scale.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.uint8]
    divisor: float

    def values(self) -> NDArray[np.float64]:
        """[M, K]."""
        scales = np.repeat(e4m3_decode(self.scales), GROUP, axis=-1)
        return e2m1_decode(self.codes) * scales / self.divisor


def quantize(rows: NDArray[np.floating], divisor: float) -> Quantized:
    """As a kernel with exact reciprocals does it; a scale that rounds to zero makes zeros."""
    groups = np.asarray(rows, np.float64).reshape(*rows.shape[:-1], -1, GROUP)
    scales = e4m3_encode(divisor * np.abs(groups).max(axis=-1) / E2M1_MAX)
    return Quantized(
        codes=e2m1_encode(_quotient(groups, scales, divisor)).reshape(rows.shape),
        scales=scales,
        divisor=divisor,
    )


def spans(
    low: NDArray[np.floating], high: NDArray[np.floating], divisor: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The least and the most that each element may decode to, [M, K].

    Args:
        low: least values of the elements before, [M, K]; K is a multiple of 16.
        high: the most.
        divisor: the global scale.
    """
    low, high = (np.asarray(side, np.float64) for side in (low, high))
    least, most = (side.reshape(*side.shape[:-1], -1, GROUP) for side in (low, high))
    farthest = np.maximum(np.abs(least), np.abs(most)).max(axis=-1)
    nearest = np.where(least * most > 0, np.minimum(np.abs(least), np.abs(most)), 0).max(axis=-1)
    first = e4m3_encode(divisor * nearest / E2M1_MAX * (1 - APPROXIMATE))
    last = e4m3_encode(divisor * farthest / E2M1_MAX * (1 + APPROXIMATE))
    least, most = least - APPROXIMATE * np.abs(least), most + APPROXIMATE * np.abs(most)
    lowest, highest = np.full_like(least, np.inf), np.full_like(most, -np.inf)
    for step in range(int((last - first).max()) + 1):
        scales = np.minimum(first + np.uint8(step), last)
        value = e4m3_decode(scales)[..., None] / divisor
        for side in (least, most):
            decoded = e2m1_decode(e2m1_encode(_quotient(side, scales, divisor))) * value
            lowest, highest = np.minimum(lowest, decoded), np.maximum(highest, decoded)
    return lowest.reshape(low.shape), highest.reshape(high.shape)


def _quotient(
    groups: NDArray[np.float64], scales: NDArray[np.uint8], divisor: float
) -> NDArray[np.float64]:
    value = e4m3_decode(scales)[..., None] / divisor
    return np.divide(groups, value, out=np.zeros_like(groups), where=value > 0)
