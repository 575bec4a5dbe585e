"""INT4 weights in groups along K: what stored bytes mean, and how far that may be off.

A weight is an integer from -8 to 7 times the BF16 scale of its group. compressed-tensors stores
the integer plus 8, eight of them per int32, the first one in the lowest bits (0.17.0,
compressors/pack_quantized/helpers.py `pack_to_int32`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

GROUP = 128
PER_WORD, BITS, OFFSET = 8, 4, 8
STEPS = 7.5  # from zero to the largest magnitude (calculate_qparams: half of 7 - -8)
BF16_HALF = 2.0**-9  # rounding of a scale, relative
# Tools that find maxima of BF16 weights may divide them in BF16.
TOOL_ROUNDING = 2.0**-8


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
        codes = unpack(self.packed).astype(np.float64) - OFFSET
        groups = codes.reshape(*codes.shape[:-1], self.scales.shape[-1], -1)
        found: NDArray[np.float64] = groups * self.scales.astype(np.float64)[..., None]
        return found.reshape(codes.shape)


def unpack(packed: NDArray[np.int32]) -> NDArray[np.uint8]:
    """[..., W] words to [..., 8 W] codes below 16."""
    shifts = np.arange(PER_WORD, dtype=np.uint32) * BITS
    words = packed.view(np.uint32)[..., None]
    codes: NDArray[np.uint8] = ((words >> shifts) & 15).astype(np.uint8)
    return codes.reshape(*packed.shape[:-1], -1)


def bound(weight: NDArray[np.floating]) -> NDArray[np.float64]:
    """The most that a decoded element may differ, [N, K]; from the source weight alone.

    For rounding to nearest: half a step of ``amax(group) / 7.5``, also at the positive end, where
    7.5 becomes 7; and the rounding of the scale, which an element has as often as its code says.
    What GPTQ does to errors is not bounded by this.
    """
    size = np.abs(np.asarray(weight, dtype=np.float64))
    groups = size.reshape(*size.shape[:-1], -1, GROUP)
    step = groups.max(axis=-1, keepdims=True) / STEPS
    relative = BF16_HALF + TOOL_ROUNDING
    found = (0.5 * step + groups * relative) * (1 + relative)
    limit: NDArray[np.float64] = found.reshape(size.shape)
    return limit
