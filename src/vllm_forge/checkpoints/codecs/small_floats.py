"""Codes of E2M1, E4M3 and E8M0 and their values: exact, in float64; rounding to nearest even.

E2M1 and the group formats: OCP Microscaling Formats 1.0, section 5.3. E4M3 without infinity: OCP
8-bit Floating Point 1.0, section 5. Ties go to the even code, as torch's float8_e4m3fn does and as
compressed-tensors does for E2M1 (quant_args.py, FP4_E2M1_DATA.cast_to_fp4 in 0.17.0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E2M1_SIGN, E4M3_SIGN = 8, 128
E4M3_NAN = 0x7F
E8M0_BIAS, E8M0_NAN = 127, 255


def _e4m3_magnitudes() -> NDArray[np.float64]:
    codes = np.arange(E4M3_NAN)
    exponent, mantissa = codes >> 3, codes & 7
    normal = (8 + mantissa) * 2.0 ** (exponent - 10.0)
    return np.asarray(np.where(exponent == 0, mantissa * 2.0**-9, normal))


E2M1_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
# Ascending, so that the index is the code.
E4M3_MAGNITUDES = _e4m3_magnitudes()


def e2m1_decode(codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Values of codes 0 to 15; 8 is -0."""
    magnitudes = E2M1_MAGNITUDES[codes & 7]
    return np.asarray(np.where(codes & E2M1_SIGN, -magnitudes, magnitudes))


def e2m1_encode(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """The nearest codes; values beyond 6 become 6.

    What rounds to zero keeps its sign, but -0 itself becomes 0: the tools multiply by sign(x).
    """
    negative = np.asarray(values) < 0
    return _nearest(values, E2M1_MAGNITUDES) | np.where(negative, np.uint8(E2M1_SIGN), np.uint8(0))


def e4m3_decode(codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Values of bytes; 0x7F and 0xFF are NaN."""
    magnitudes = np.append(E4M3_MAGNITUDES, np.nan)[codes & 0x7F]
    return np.asarray(np.where(codes & E4M3_SIGN, -magnitudes, magnitudes))


def e4m3_encode(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """The nearest bytes; values beyond 448 become 448, as the tools clamp before they convert."""
    negative = np.signbit(values)
    return _nearest(values, E4M3_MAGNITUDES) | np.where(negative, np.uint8(E4M3_SIGN), np.uint8(0))


def e8m0_decode(codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Powers of two from 2^-127 on; 255 is NaN."""
    powers = 2.0 ** (codes.astype(np.float64) - E8M0_BIAS)
    return np.asarray(np.where(codes == E8M0_NAN, np.nan, powers))


def e8m0_ceil(scales: NDArray[np.floating]) -> NDArray[np.float64]:
    """The power of two that is not below each positive scale; vllm/utils/deep_gemm.py rounds so."""
    mantissa, exponent = np.frexp(np.asarray(scales, dtype=np.float64))
    return np.asarray(np.ldexp(1.0, exponent - (mantissa == 0.5)))  # noqa: PLR2004


def _nearest(values: NDArray[np.floating], magnitudes: NDArray[np.float64]) -> NDArray[np.uint8]:
    size = np.minimum(np.abs(np.asarray(values, dtype=np.float64)), magnitudes[-1])
    above = np.searchsorted(magnitudes, size).clip(1, len(magnitudes) - 1)
    below = above - 1
    down, up = size - magnitudes[below], magnitudes[above] - size
    nearest = np.where(down < up, below, above)
    return np.asarray(np.where(down == up, below + (below & 1), nearest).astype(np.uint8))
