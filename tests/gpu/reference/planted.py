"""Faults to plant in weights, routing or results, each of which a tolerance must notice.

A tolerance without them says nothing: vLLM's own NVFP4 tests allow 0.1 + 0.1 * |x|, which one scale
that is off by an eighth stays within.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.gpu.reference.marlin_layout import bfloat16
from tests.gpu.reference.marlin_reference import Sums, margin
from tests.gpu.reference.marlin_weights import MXFP4, NVFP4, Weights
from vllm_forge.checkpoints.codecs.fp8_block import BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from vllm_forge.checkpoints.codecs.fp8_block import Fp8Block

PLACES = 5  # at which each fault is planted


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
            return replace(weights, scales=_one_scale(weights, rng))
        case InWeights.SWAPPED_EXPERTS:
            order = np.arange(weights.experts)
            order[:2] = 1, 0
            return replace(weights, codes=weights.codes[order], scales=weights.scales[order])
        case InWeights.TRANSPOSED_SCALES:
            turned = weights.scales.swapaxes(1, 2).reshape(weights.scales.shape)
            return replace(weights, scales=np.ascontiguousarray(turned))
        case InWeights.ONE_CODE:
            codes = weights.codes.copy()
            codes[_place(codes.shape, rng)] ^= 4  # a value that differs in every format
            return replace(weights, codes=codes)


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


class InBlocks(Enum):
    """What is wrong with the weight that the kernel gets."""

    ONE_SCALE = "one scale is off by an eighth"
    TRANSPOSED_SCALES = "the scales are read along the other axis"
    SWAPPED_ROWS = "two blocks of rows have each other's codes and scales"
    ONE_CODE = "one weight has its neighbour's code"


def in_blocks(fault: InBlocks, weight: Fp8Block, rng: np.random.Generator) -> Fp8Block:
    """The weight with a fault; where there is a choice, at a random place."""
    match fault:
        case InBlocks.ONE_SCALE:
            scales = weight.scales.copy()
            scales[tuple(rng.integers(scales.shape))] *= np.float32(1.125)
            return replace(weight, scales=scales)
        case InBlocks.TRANSPOSED_SCALES:
            turned = weight.scales.T.reshape(weight.scales.shape)
            return replace(weight, scales=np.ascontiguousarray(turned))
        case InBlocks.SWAPPED_ROWS:
            first, second = rng.choice(len(weight.codes) // BLOCK, 2, replace=False)
            order = np.arange(len(weight.scales))
            order[[first, second]] = second, first
            rows = (order[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)
            return replace(weight, codes=weight.codes[rows], scales=weight.scales[order])
        case InBlocks.ONE_CODE:
            codes = weight.codes.copy()
            place = tuple(rng.integers(codes.shape))
            codes[place] ^= 8  # twice or half as much
            return replace(weight, codes=codes)


def require_noticed(
    record: Callable[..., None], fault: str, noticed: Sequence[bool], *, kind: str = "planted",
    **facts: Any,
) -> None:  # fmt: skip
    """Record how many of the planted faults were noticed; it must be all of them."""
    killed = sum(noticed)
    record(kind=kind, fault=fault.lower(), planted=len(noticed), killed=killed, **facts)
    assert killed == len(noticed), f"{killed} of {len(noticed)} faults were noticed"


def require_result_noticed(
    record: Callable[..., None], fault: InResult, results: Sequence[NDArray[np.float64]],
    expected: Sums, seed: int, **facts: Any,
) -> None:  # fmt: skip
    """A result is within its bound, and exceeds it with each of the faults.

    Args:
        record: the test's.
        fault: what is planted.
        results: of the launch, and of another one of the same shape.
        expected: of the first.
        seed: of the places.
        facts: for the test's row of results.
    """
    (result, other), rng = results, np.random.default_rng(seed)
    share = margin(result, expected)
    assert share <= 1, f"the result is {share:.2f} of its bound"
    broken = [in_result(fault, result, other, rng) for _ in range(PLACES)]
    require_noticed(record, fault.name, [margin(b, expected) > 1 for b in broken], **facts)
