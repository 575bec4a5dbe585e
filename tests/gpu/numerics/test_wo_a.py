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

from tests.gpu.numerics.layers import accumulator, bfloat16_tensor, linear, values, worst
from tests.gpu.reference import output_projection
from tests.gpu.reference.marlin_layout import bfloat16
from tests.gpu.reference.output_projection import rotated_back
from tests.gpu.reference.planted import InResult, in_result
from tests.gpu.reference.planted_fp8 import InBlocks, in_blocks
from vllm_forge.checkpoints.codecs import fp8_block

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from tests.gpu.reference.marlin_reference import Sums
    from vllm_forge.checkpoints.codecs.fp8_block import Fp8Block

    Margin = Callable[[str, float, float], None]
    Record = Callable[..., None]

pytestmark = [pytest.mark.gpu, pytest.mark.tier("kernel")]

# A rank's share at tensor parallel 4: 16 heads in 2 groups.
GROUPS, HEADS, RANK = 2, 16, 1024
NOPE, ROPE = 448, 64
SHAPE = (GROUPS * RANK, HEADS // GROUPS * (NOPE + ROPE))
POSITIONS = 4096
PLACES = 5
PATHS = pytest.mark.parametrize(
    "path",
    [
        pytest.param("fp8", marks=pytest.mark.value(8, 10)),
        pytest.param("bf16", marks=pytest.mark.value(10, 3)),
    ],
)


@cache
def fp8_weight() -> Fp8Block:
    """Blocks that differ in size by up to 4; scales are powers of two, as none is then changed."""
    rng = np.random.default_rng(1)
    blocks = rng.uniform(0.5, 2, tuple(size // fp8_block.BLOCK for size in SHAPE))
    source = rng.standard_normal(SHAPE) * fp8_block.spread(blocks, SHAPE) / 64
    return fp8_block.encode(source, powers_of_two=True)


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
    return output_projection.fp8(rows, fp8_weight().values(), GROUPS, accumulator())


@cache
def layer_of(path: str) -> Any:
    if path == "bf16":
        return linear(bf16_weight(), name="wo_a")
    return linear(fp8_weight(), name="wo_a", groups=GROUPS)


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
    found = worst(run(layer_of(path), heads, np.zeros_like(positions)), expected)
    record(kind="planted", path=path, fault="rotation lost", planted=1, killed=int(found > 1))
    assert found > 1


@PATHS
@pytest.mark.parametrize("fault", InResult)
def test_a_fault_in_the_result_is_noticed(record: Record, path: str, fault: InResult) -> None:
    heads, positions = heads_of(9)
    expected, rng = reference(path, heads, positions), np.random.default_rng(3)
    result = run(layer_of(path), heads, positions)
    stale = run(layer_of(path), heads[::-1].copy(), positions)
    assert worst(result, expected) <= 1
    killed = sum(worst(in_result(fault, result, stale, rng), expected) > 1 for _ in range(PLACES))
    record(kind="planted", path=path, fault=fault.name.lower(), planted=PLACES, killed=killed)
    assert killed == PLACES


@pytest.mark.value(8, 10)
@pytest.mark.parametrize(
    "fault", [InBlocks.ONE_SCALE, InBlocks.TRANSPOSED_SCALES, InBlocks.SWAPPED_ROWS]
)
def test_a_fault_in_the_weight_is_noticed(record: Record, fault: InBlocks) -> None:
    """By a token for each block of columns, zero but for one element of it in each group."""
    blocks = SHAPE[1] // fp8_block.BLOCK
    heads = np.zeros((blocks, GROUPS, SHAPE[1]))
    heads[np.arange(blocks), :, np.arange(blocks) * fp8_block.BLOCK] = 1
    heads = heads.reshape(blocks, HEADS, NOPE + ROPE)
    positions = np.arange(blocks)
    expected = reference("fp8", heads, positions)
    assert worst(run(layer_of("fp8"), heads, positions), expected) <= 1
    rng, killed = np.random.default_rng(4), 0
    for _ in range(PLACES):
        broken = linear(in_blocks(fault, fp8_weight(), rng), name="wo_a", groups=GROUPS)
        killed += worst(run(broken, heads, positions), expected) > 1
    record(kind="planted", fault=fault.name.lower(), planted=PLACES, killed=killed)
    assert killed == PLACES
