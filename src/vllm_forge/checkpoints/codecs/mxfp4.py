"""MXFP4 weights: what stored bytes mean, and how far that may be from the weight they are of.

A weight is E2M1 times the power of two of its group of 32 along K (OCP Microscaling Formats 1.0,
sections 5.3 and 6.3). Two codes share a byte, the first one in the low nibble, as in NVFP4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm_forge.checkpoints.codecs.nvfp4 import unpack
from vllm_forge.checkpoints.codecs.small_floats import E2M1_MAX, e2m1_decode, e8m0_decode

if TYPE_CHECKING:
    from numpy.typing import NDArray

GROUP = 32
E2M1_TOP_EXPONENT = 2  # of its largest value, 6 = 1.5 x 2^2


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
        scales = np.repeat(e8m0_decode(self.scales), GROUP, axis=-1)
        found: NDArray[np.float64] = e2m1_decode(unpack(self.packed)) * scales
        return found


def bound(weight: NDArray[np.floating]) -> NDArray[np.float64]:
    """The most that a decoded element may differ, [N, K]; from the source weight alone.

    With ``a = amax(group)`` the scale is 2^(floor(log2 a) - 2), as the format's specification has
    it, so that up to 8 of it are cut to 6; or twice that where ``a`` exceeds 6 of it, as tools
    have it that round up. Which of the two it is is left open: each has its own rounding.
    """
    size = np.abs(np.asarray(weight, dtype=np.float64))
    groups = size.reshape(*size.shape[:-1], -1, GROUP)
    largest = groups.max(axis=-1, keepdims=True)
    _, exponent = np.frexp(largest)  # largest = m * 2^exponent with m from 0.5 to 1
    scale = np.where(largest > 0, np.ldexp(1.0, exponent - 1 - E2M1_TOP_EXPONENT), 0.0)
    found = _rounding(groups, scale)
    found = np.where(
        largest > E2M1_MAX * scale, np.maximum(found, _rounding(groups, 2 * scale)), found
    )
    limit: NDArray[np.float64] = found.reshape(size.shape)
    return limit


def _rounding(groups: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half of E2M1's spacing at each element, and what is beyond its largest value."""
    distance = np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0)
    half = np.select([distance <= 2, distance <= 4], [0.25, 0.5], 1.0)  # noqa: PLR2004 - E2M1
    found: NDArray[np.float64] = np.maximum(half * scale, groups - E2M1_MAX * scale)
    return found
