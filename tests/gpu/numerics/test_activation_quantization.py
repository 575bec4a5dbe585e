"""Kernels that quantize activations: codes and scales bit for bit, where the format decides them.

Where a number lies so close to a tie that the kernel's arithmetic decides, either neighbour is
right; ``numerics/fp8_linear.py`` and ``numerics/nvfp4_activations.py`` say which numbers do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.gpu.numerics.layers import bfloat16_tensor, codes
from tests.gpu.reference import fp8_linear, nvfp4_activations
from tests.gpu.reference.marlin_layout import bfloat16
from tests.gpu.reference.output_projection import rotated_back
from vllm_forge.checkpoints.codecs.fp8_block import BLOCK
from vllm_forge.checkpoints.codecs.nvfp4 import GROUP, unpack
from vllm_forge.checkpoints.codecs.small_floats import E8M0_BIAS, e2m1_decode, e4m3_decode

if TYPE_CHECKING:
    from numpy.typing import NDArray

pytestmark = [pytest.mark.gpu, pytest.mark.tier("kernel"), pytest.mark.value(8, 3)]

SHAPE = (67, 1024)  # rows that no alignment divides
DIVISOR = 448.0


def rows_of(seed: int = 1) -> NDArray[np.float64]:
    """Groups from 2^-8 to 2^8 in size, and one of nothing but zeros."""
    rng = np.random.default_rng(seed)
    size = 2.0 ** rng.integers(-8, 9, (SHAPE[0], SHAPE[1] // BLOCK))
    rows = rng.standard_normal(SHAPE) * np.repeat(size, BLOCK, axis=1)
    rows[3, :BLOCK] = 0
    return bfloat16(rows.astype(np.float32))


@pytest.mark.parametrize("layout", ["rows", "columns", "aligned columns"])
@pytest.mark.parametrize("powers_of_two", [False, True], ids=["float32", "ue8m0"])
def test_fp8_in_groups_of_128(*, layout: str, powers_of_two: bool) -> None:
    from vllm.model_executor.layers.quantization.utils.fp8_utils import per_token_group_quant_fp8

    rows = rows_of()
    found, scales = per_token_group_quant_fp8(
        bfloat16_tensor(rows),
        BLOCK,
        column_major_scales=layout != "rows",
        tma_aligned_scales=layout == "aligned columns",
        use_ue8m0=powers_of_two,
    )
    expected = fp8_linear.quantize(rows, powers_of_two=powers_of_two)
    assert np.array_equal(scales.cpu().numpy(), expected.scales)
    assert np.array_equal(codes(found), expected.codes)


@pytest.mark.sm_100
@pytest.mark.sm_103
@pytest.mark.sm_120
def test_fp8_with_packed_scales() -> None:
    """Four exponents in an integer, the first in the lowest byte."""
    from vllm.model_executor.layers.quantization.utils import fp8_utils

    rows = rows_of()
    found, packed = fp8_utils.per_token_group_quant_fp8_packed_for_deepgemm(
        bfloat16_tensor(rows), BLOCK, use_ue8m0=True
    )
    expected = fp8_linear.quantize(rows, powers_of_two=True)
    exponents = (np.log2(expected.scales) + E8M0_BIAS).astype(np.uint8)
    exponents = np.pad(exponents, ((0, 0), (0, -exponents.shape[1] % 4)))
    assert np.array_equal(packed.cpu().contiguous().numpy().view(np.uint8), exponents)
    assert np.array_equal(codes(found), expected.codes)


@pytest.mark.parametrize("tokens", [1, 37])
def test_fp8_of_the_rotated_output(tokens: int) -> None:
    """``fused_inv_rope_fp8_quant``, two groups of two heads: all elements may come out so."""
    import torch
    from vllm.models.deepseek_v4.common.ops.fused_inv_rope_fp8_quant import (
        fused_inv_rope_fp8_quant,
    )
    from vllm.models.deepseek_v4.nvidia.ops.o_proj import compute_fp8_einsum_recipe

    rng = np.random.default_rng(tokens)
    heads = bfloat16(rng.standard_normal((tokens, 4, 512)).astype(np.float32))
    angle = rng.uniform(0, 7, (64, 32))
    cache = np.hstack([np.cos(angle), np.sin(angle)]).astype(np.float32)
    positions = rng.integers(64, size=tokens)
    _, aligned = compute_fp8_einsum_recipe()
    found, stored = fused_inv_rope_fp8_quant(
        bfloat16_tensor(heads), torch.from_numpy(positions).cuda(), torch.from_numpy(cache).cuda(),
        n_groups=2, heads_per_group=2, tma_aligned_scales=aligned,
    )  # fmt: skip
    scales = stored.cpu().contiguous().numpy()
    if aligned:
        scales = np.ldexp(1.0, scales.view(np.uint8).astype(np.int32) - E8M0_BIAS)
    decoded = e4m3_decode(codes(found)) * np.repeat(scales.astype(np.float64), BLOCK, axis=-1)

    cos, sin = np.split(cache[positions], 2, axis=1)
    exact = rotated_back(heads, cos, sin)
    low, high = fp8_linear.spans(
        exact.exact.reshape(2 * tokens, -1), powers_of_two=True,
        off=exact.bound.reshape(2 * tokens, -1),
    )  # fmt: skip
    decoded = decoded.reshape(low.shape)
    assert np.count_nonzero((decoded < low) | (decoded > high)) == 0


@pytest.mark.sm_100
@pytest.mark.sm_103
@pytest.mark.sm_120
def test_nvfp4_in_groups_of_16() -> None:
    """``scaled_fp4_quant``, linear scales: within what may come out; the scales' codes too."""
    import torch
    from vllm._custom_ops import scaled_fp4_quant

    rows = rows_of()
    divisor = torch.tensor([DIVISOR / 256], dtype=torch.float32, device="cuda")
    packed, stored = scaled_fp4_quant(bfloat16_tensor(rows), divisor, is_sf_swizzled_layout=False)
    expected = nvfp4_activations.quantize(rows, DIVISOR / 256)
    scales = codes(stored).reshape(expected.scales.shape)
    assert np.abs(scales.astype(int) - expected.scales).max() <= 1
    decoded = e2m1_decode(unpack(codes(packed))) * np.repeat(e4m3_decode(scales), GROUP, axis=1)
    decoded /= DIVISOR / 256
    low, high = nvfp4_activations.spans(rows, rows, DIVISOR / 256)
    assert np.count_nonzero((decoded < low) | (decoded > high)) == 0
