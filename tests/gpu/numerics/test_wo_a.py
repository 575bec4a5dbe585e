"""``wo_a`` of DeepSeek-V4's attention, as ``deep_gemm_fp8_o_proj`` of the patched line runs it.

Rotation back, quantization and grouped product in one call, for an FP8 weight, and for the BF16
weight of a draft block that is not quantized. The bound is that of
``numerics/output_projection.py``.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.gpu.numerics.layers import accumulator, bfloat16_tensor, fp8_weight, linear, values
from tests.gpu.reference import output_projection, planted
from tests.gpu.reference.marlin_layout import bfloat16
from tests.gpu.reference.marlin_reference import margin as worst
from tests.gpu.reference.output_projection import rotated_back
from vllm_forge.checkpoints.codecs import fp8_block

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tests.gpu.conftest import Margin, Record
    from tests.gpu.reference.marlin_reference import Sums
    from vllm_forge.checkpoints.codecs.fp8_block import Fp8Block

pytestmark = [pytest.mark.gpu, pytest.mark.tier("kernel")]

# A rank's share at tensor parallel 4: 16 heads in 2 groups.
GROUPS, HEADS, RANK = 2, 16, 1024
NOPE, ROPE = 448, 64
SHAPE = (GROUPS * RANK, HEADS // GROUPS * (NOPE + ROPE))
POSITIONS = 4096
PATHS = pytest.mark.parametrize(
    "path",
    [
        pytest.param("fp8", marks=pytest.mark.value(8, 10)),
        pytest.param("bf16", marks=pytest.mark.value(10, 3)),
    ],
)


@cache
def weight_of_blocks() -> Fp8Block:
    """Scales are powers of two, as none is then changed."""
    return fp8_weight(SHAPE, 1, 64, powers_of_two=True)


@cache
def bf16_weight() -> NDArray[np.float64]:
    return bfloat16((np.random.default_rng(2).standard_normal(SHAPE) / 64).astype(np.float32))


@cache
def angles() -> NDArray[np.float32]:
    """cos and sin of each position's angles, [positions, rope]."""
    frequency = 10000.0 ** -(np.arange(ROPE // 2) / (ROPE // 2))
    angle = np.arange(POSITIONS)[:, None] * frequency
    return np.hstack([np.cos(angle), np.sin(angle)]).astype(np.float32)


def heads_of(tokens: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    rng = np.random.default_rng(tokens)
    heads = rng.standard_normal((tokens, HEADS, NOPE + ROPE)).astype(np.float32)
    return bfloat16(heads), rng.integers(POSITIONS, size=tokens)


def reference(path: str, heads: NDArray[np.float64], positions: NDArray[np.int64]) -> Sums:
    cos, sin = np.split(angles()[positions], 2, axis=1)
    rows = rotated_back(heads, cos, sin)
    if path == "bf16":
        return output_projection.bf16(rows, bf16_weight(), GROUPS)
    return output_projection.fp8(rows, weight_of_blocks().values(), GROUPS, accumulator())


@cache
def layer_of(path: str) -> Any:
    if path == "bf16":
        return linear(bf16_weight(), name="wo_a")
    return linear(weight_of_blocks(), name="wo_a", groups=GROUPS)


def run(
    layer: Any, heads: NDArray[np.float64], positions: NDArray[np.int64], device: str = "cuda"
) -> NDArray[np.float64]:
    import torch
    from vllm.models.deepseek_v4.nvidia.ops import o_proj

    recipe, aligned = o_proj.compute_fp8_einsum_recipe()
    with torch.inference_mode():
        return values(
            o_proj.deep_gemm_fp8_o_proj(
                bfloat16_tensor(heads, device),
                torch.from_numpy(positions).to(device),
                torch.from_numpy(angles()).to(device),
                layer,
                torch.nn.Identity(),  # wo_b
                n_groups=GROUPS,
                heads_per_group=HEADS // GROUPS,
                nope_dim=NOPE,
                rope_dim=ROPE,
                o_lora_rank=RANK,
                einsum_recipe=recipe,
                tma_aligned_scales=aligned,
            )
        )


@PATHS
@pytest.mark.parametrize("tokens", [9, 130])
def test_products_are_within_the_bound(margin: Margin, path: str, tokens: int) -> None:
    heads, positions = heads_of(tokens)
    margin("error", worst(run(layer_of(path), heads, positions), reference(path, heads, positions)),
           1)  # fmt: skip


@PATHS
def test_a_lost_rotation_is_noticed(record: Record, path: str) -> None:
    heads, positions = heads_of(9)
    expected = reference(path, heads, positions)
    noticed = [worst(run(layer_of(path), heads, np.zeros_like(positions)), expected) > 1]
    planted.require_noticed(record, "rotation lost", noticed, path=path)


@PATHS
@pytest.mark.parametrize("fault", planted.InResult)
def test_a_fault_in_the_result_is_noticed(
    record: Record, path: str, fault: planted.InResult
) -> None:
    heads, positions = heads_of(9)
    results = [run(layer_of(path), rows, positions) for rows in (heads, heads[::-1].copy())]
    expected = reference(path, heads, positions)
    planted.require_result_noticed(record, fault, results, expected, 3, path=path)


@pytest.mark.value(8, 10)
@pytest.mark.parametrize(
    "fault",
    [planted.InBlocks.ONE_SCALE, planted.InBlocks.TRANSPOSED_SCALES, planted.InBlocks.SWAPPED_ROWS],
)
def test_a_fault_in_the_weight_is_noticed(record: Record, fault: planted.InBlocks) -> None:
    """By a token for each block of columns, zero but for one element of it in each group."""
    blocks = SHAPE[1] // fp8_block.BLOCK
    heads = np.zeros((blocks, GROUPS, SHAPE[1]))
    heads[np.arange(blocks), :, np.arange(blocks) * fp8_block.BLOCK] = 1
    heads = heads.reshape(blocks, HEADS, NOPE + ROPE)
    positions = np.arange(blocks)
    expected = reference("fp8", heads, positions)
    assert worst(run(layer_of("fp8"), heads, positions), expected) <= 1
    rng, noticed = np.random.default_rng(4), []
    for _ in range(planted.PLACES):
        broken = linear(
            planted.in_blocks(fault, weight_of_blocks(), rng), name="wo_a", groups=GROUPS
        )
        noticed.append(worst(run(broken, heads, positions), expected) > 1)
    planted.require_noticed(record, fault.name, noticed)
