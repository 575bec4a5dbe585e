"""Faults to plant in weights, routing or results, each of which a tolerance must notice.

A tolerance without them says nothing: vLLM's own NVFP4 tests allow 0.1 + 0.1 * |x|, which one scale
that is off by an eighth stays within.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from tests.gpu.reference.marlin_layout import bfloat16
from tests.gpu.reference.marlin_weights import MXFP4, NVFP4

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tests.gpu.reference.marlin_weights import Weights


class InWeights(Enum):
    """What is wrong with the weights that the kernel gets."""

    ONE_SCALE = "one scale is off by an eighth (E4M3: by one step, an eighth at most; E8M0: by 2)"
    SWAPPED_EXPERTS = "two experts have each other's weights"
    TRANSPOSED_SCALES = "each expert's scales are read along the other axis"
    ONE_CODE = "one weight has its neighbour's code"


class InResult(Enum):
    """What is wrong with a result."""

    ZEROS = "nothing was computed"
    ONE_NAN = "one element is NaN"
    STALE = "the result is another launch's"


def in_weights(fault: InWeights, weights: Weights, rng: np.random.Generator) -> Weights:
    """The weights with a fault; where there is a choice, at a random place."""
    match fault:
        case InWeights.ONE_SCALE:
            return weights.with_scales(_one_scale(weights, rng))
        case InWeights.SWAPPED_EXPERTS:
            order = np.arange(weights.experts)
            order[:2] = 1, 0
            return type(weights)(
                format=weights.format,
                codes=weights.codes[order],
                scales=weights.scales[order],
                multiplier=weights.multiplier,
            )
        case InWeights.TRANSPOSED_SCALES:
            turned = weights.scales.swapaxes(1, 2).reshape(weights.scales.shape)
            return weights.with_scales(np.ascontiguousarray(turned))
        case InWeights.ONE_CODE:
            codes = weights.codes.copy()
            codes[_place(codes.shape, rng)] ^= 4  # a value that differs in every format
            return type(weights)(
                format=weights.format,
                codes=codes,
                scales=weights.scales,
                multiplier=weights.multiplier,
            )


def _one_scale(weights: Weights, rng: np.random.Generator) -> NDArray[np.generic]:
    scales = weights.scales.copy()
    place = _place(scales.shape, rng)
    if weights.format is NVFP4:
        scales[place] = int(scales[place]) - 1  # 448 is the last before NaN
    elif weights.format is MXFP4:
        scales[place] += 1
    else:
        scales[place] = bfloat16(weights.scale_values() * 1.125)[place]
    return scales


def _place(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(rng.integers(size)) for size in shape)


def in_result(
    fault: InResult,
    result: NDArray[np.float64],
    other: NDArray[np.float64],
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """The result with a fault; ``other`` is that of another launch of the same shape."""
    match fault:
        case InResult.ZEROS:
            return np.zeros_like(result)
        case InResult.STALE:
            return other
        case InResult.ONE_NAN:
            broken = result.copy()
            broken[_place(result.shape, rng)] = np.nan
            return broken
