"""DeepSeek-V4's ``wo_a``: attention's output, rotated back, times a weight of each group of heads.

The last ``rope`` elements of a head are pairs (even, odd), rotated back by the position's angle
(``fused_inv_rope_fp8_quant`` of vLLM 0.26.0; the BF16 path is this project's patch). Kernels do it
in float32. An FP8 weight gets the whole row quantized in groups of 128 under powers of two; a BF16
one gets it rounded to bfloat16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.gpu.reference import fp8_linear
from tests.gpu.reference.marlin_layout import bfloat16
from tests.gpu.reference.marlin_reference import U_FLOAT32, Sums

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tests.gpu.reference.fp8_linear import Accumulator

# Two products and their sum, in either order, fused or not; and the way back from float64.
ROUNDINGS = 4


def rotated_back(
    heads: NDArray[np.float64], cos: NDArray[np.float32], sin: NDArray[np.float32]
) -> Sums:
    """Rows with their rotation undone, and how far float32 may be off; [T, heads, size].

    Args:
        heads: bfloat16 values, [T, heads, size].
        cos: of each token's angles, [T, rope / 2]; the last ``rope`` elements are rotated.
        sin: likewise.
    """
    rope = 2 * cos.shape[1]
    exact, off = heads.copy(), np.zeros_like(heads)
    even, odd = heads[..., -rope::2], heads[..., 1 - rope :: 2]
    c, s = (angle.astype(np.float64)[:, None] for angle in (cos, sin))
    exact[..., -rope::2] = even * c + odd * s
    exact[..., 1 - rope :: 2] = odd * c - even * s
    size = np.abs(even) * np.abs(c) + np.abs(odd) * np.abs(s)
    other = np.abs(odd) * np.abs(c) + np.abs(even) * np.abs(s)
    off[..., -rope::2], off[..., 1 - rope :: 2] = size, other
    return Sums(exact=exact, bound=ROUNDINGS * U_FLOAT32 * off)


def fp8(rows: Sums, weight: NDArray[np.float64], groups: int, accumulator: Accumulator) -> Sums:
    """The FP8 path, [T, groups * rank].

    Args:
        rows: rotated back, [T, heads, size].
        weight: decoded, [groups * rank, heads / groups * size].
        groups: of this GPU.
        accumulator: the GPU's.
    """
    parts = []
    for mine, matrix in _by_group(rows, weight, groups):
        known = Sums.between(*fp8_linear.spans(mine.exact, powers_of_two=True, off=mine.bound))
        parts.append(fp8_linear.products(known, matrix, accumulator))
    return _joined(parts)


def bf16(rows: Sums, weight: NDArray[np.float64], groups: int) -> Sums:
    """The BF16 path, [T, groups * rank]; the arguments as for :func:`fp8`."""
    parts = []
    for mine, matrix in _by_group(rows, weight, groups):
        low, high = (
            bfloat16((mine.exact + side * mine.bound).astype(np.float32)) for side in (-1, 1)
        )
        parts.append(fp8_linear.plain_products(Sums.between(low, high), matrix))
    return _joined(parts)


def _by_group(
    rows: Sums, weight: NDArray[np.float64], groups: int
) -> list[tuple[Sums, NDArray[np.float64]]]:
    tokens = len(rows.exact)
    exact, bound = (side.reshape(tokens, groups, -1) for side in (rows.exact, rows.bound))
    matrices = weight.reshape(groups, -1, weight.shape[1])
    return [
        (Sums(exact=exact[:, group], bound=bound[:, group]), matrices[group])
        for group in range(groups)
    ]


def _joined(parts: list[Sums]) -> Sums:
    return Sums(
        exact=np.hstack([part.exact for part in parts]),
        bound=np.hstack([part.bound for part in parts]),
    )
