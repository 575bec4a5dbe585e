"""Faults to plant in an FP8 weight with block scales, each of which a bound must notice."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from vllm_forge.checkpoints.codecs.fp8_block import BLOCK

if TYPE_CHECKING:
    from vllm_forge.checkpoints.codecs.fp8_block import Fp8Block


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
