"""``wo_a``: the rotation back by hand, both paths within their bounds, killed faults."""

from __future__ import annotations

import numpy as np
import pytest

from tests.gpu.reference import output_projection
from tests.gpu.reference.fp8_linear import HOPPER
from tests.gpu.reference.marlin_layout import bfloat16
from tests.gpu.reference.marlin_reference import margin
from tests.gpu.reference.output_projection import rotated_back
from tests.gpu.reference.planted import InBlocks, in_blocks
from tests.support import emulators
from vllm_forge.checkpoints.codecs import fp8_block

GROUPS, HEADS, SIZE, ROPE, RANK = 2, 4, 256, 64, 128
SHAPE = (GROUPS * RANK, HEADS // GROUPS * SIZE)


def inputs(tokens: int = 9) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    heads = bfloat16(rng.standard_normal((tokens, HEADS, SIZE)).astype(np.float32))
    angle = rng.uniform(0, 7, (tokens, ROPE // 2))
    return heads, np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def in_float32(heads: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """The rotation as a kernel does it, [T, HEADS * SIZE]."""
    found = heads.astype(np.float32)
    even, odd = found[..., -ROPE::2].copy(), found[..., 1 - ROPE :: 2].copy()
    found[..., -ROPE::2] = even * cos[:, None] + odd * sin[:, None]
    found[..., 1 - ROPE :: 2] = odd * cos[:, None] - even * sin[:, None]
    return found.reshape(len(found), -1)


def weight() -> fp8_block.Fp8Block:
    rng = np.random.default_rng(2)
    blocks = rng.uniform(0.5, 2, (SHAPE[0] // 128, SHAPE[1] // 128))
    source = rng.standard_normal(SHAPE) * fp8_block.spread(blocks, SHAPE)
    return fp8_block.encode(source, powers_of_two=True)


def fp8_kernel(rows: np.ndarray, matrix: fp8_block.Fp8Block) -> np.ndarray:
    parts = []
    for group in range(GROUPS):
        mine = slice(group * RANK, (group + 1) * RANK)
        block = slice(mine.start // 128, mine.stop // 128)
        part = fp8_block.Fp8Block(codes=matrix.codes[mine], scales=matrix.scales[block])
        width = slice(group * SHAPE[1], (group + 1) * SHAPE[1])
        values = rows[:, width].astype(np.float64)
        parts.append(emulators.fp8_linear(values, part, HOPPER, powers_of_two=True))
    return np.hstack(parts)


def test_a_quarter_turn_by_hand() -> None:
    heads = np.zeros((1, 1, SIZE))
    heads[0, 0, -ROPE : 2 - ROPE] = 3, 5
    cos, sin = np.zeros((1, ROPE // 2), np.float32), np.ones((1, ROPE // 2), np.float32)
    found = rotated_back(heads, cos, sin)
    assert found.exact[0, 0, -ROPE : 2 - ROPE].tolist() == [5, -3]
    assert not found.bound[0, 0, :-ROPE].any()


def test_the_fp8_path_is_within_the_bound() -> None:
    heads, cos, sin = inputs()
    right = output_projection.fp8(rotated_back(heads, cos, sin), weight().values(), GROUPS, HOPPER)
    assert 0.05 < margin(fp8_kernel(in_float32(heads, cos, sin), weight()), right) <= 1


def test_the_bf16_path_is_within_the_bound() -> None:
    heads, cos, sin = inputs()
    matrix = bfloat16(weight().values().astype(np.float32))
    right = output_projection.bf16(rotated_back(heads, cos, sin), matrix, GROUPS)
    rows = bfloat16(in_float32(heads, cos, sin)).reshape(len(heads), GROUPS, -1)
    result = bfloat16(
        np.einsum(
            "tgd,grd->tgr",
            rows.astype(np.float32),
            matrix.reshape(GROUPS, RANK, -1).astype(np.float32),
        ).reshape(len(heads), -1)
    )
    assert 0.05 < margin(result, right) <= 1
    assert margin(result[:, ::-1], right) > 1


@pytest.mark.parametrize("lost", ["rotation", "direction", "groups"])
def test_faults_are_killed(lost: str) -> None:
    heads, cos, sin = inputs()
    right = output_projection.fp8(rotated_back(heads, cos, sin), weight().values(), GROUPS, HOPPER)
    rows = {
        "rotation": in_float32(heads, np.ones_like(cos), np.zeros_like(sin)),
        "direction": in_float32(heads, cos, -sin),
        "groups": in_float32(heads[:, ::-1].copy(), cos, sin),
    }[lost]
    assert margin(fp8_kernel(rows, weight()), right) > 1


@pytest.mark.parametrize("fault", [InBlocks.TRANSPOSED_SCALES, InBlocks.SWAPPED_ROWS])
def test_faults_in_the_weight_are_killed(fault: InBlocks) -> None:
    heads, cos, sin = inputs()
    right = output_projection.fp8(rotated_back(heads, cos, sin), weight().values(), GROUPS, HOPPER)
    broken = in_blocks(fault, weight(), np.random.default_rng(3))
    assert margin(fp8_kernel(in_float32(heads, cos, sin), broken), right) > 1
