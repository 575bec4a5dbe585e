"""Weights and scales in the kernel's layout are bit for bit those of the pinned vLLM's own Python.

Also of its repacking kernel, which its Python equals by vLLM's own tests.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.gpu.reference import marlin_layout
from tests.gpu.reference.marlin_weights import FORMATS, FP8, MXFP4, NVFP4, random_weights

N, K = 192, 512


def test_type_ids_are_vllms() -> None:
    from vllm.scalar_type import scalar_types

    names = {
        "w4a16": scalar_types.uint4b8,
        "nvfp4": scalar_types.float4_e2m1f,
        "mxfp4": scalar_types.float4_e2m1f,
        "fp8": scalar_types.float8_e4m3fn,
    }
    assert {form.name: form.type_id for form in FORMATS} == {
        name: kind.id for name, kind in names.items()
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_weights(bits: int) -> None:
    import torch
    from vllm.model_executor.layers.quantization.utils import marlin_utils_test as theirs

    codes = np.random.default_rng(bits).integers(0, 1 << bits, (2, K, N), dtype=np.uint8)
    ours = marlin_layout.pack_weights(codes, bits)
    for expert in range(2):
        packed = theirs.marlin_weights(
            torch.from_numpy(codes[expert].astype(np.int64)), K, N, bits,
            theirs.get_weight_perm(bits),
        )  # fmt: skip
        assert np.array_equal(packed.numpy().view(np.uint32), ours[expert].view(np.uint32))


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_scales(form) -> None:  # type: ignore[no-untyped-def]
    import torch
    from vllm.model_executor.layers.quantization.utils import marlin_utils_fp4 as fp4
    from vllm.model_executor.layers.quantization.utils import marlin_utils_fp8 as fp8
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_scales

    weights = random_weights(form, experts=1, size_n=N, size_k=K, seed=3)
    values = torch.from_numpy(weights.scale_values()[0]).bfloat16()
    permuted = marlin_permute_scales(values, K, N, form.group)
    if form is NVFP4:
        permuted = fp4.nvfp4_marlin_process_scales(permuted)
        permuted = permuted[0] if isinstance(permuted, tuple) else permuted
    elif form is MXFP4:
        permuted = fp4.mxfp4_marlin_process_scales(permuted)
    elif form is FP8:
        permuted = fp8.fp8_fused_exponent_bias_into_scales(permuted)
    kind = torch.uint8 if form.scale_bytes == 1 else torch.uint16
    assert np.array_equal(permuted.view(kind).numpy(), weights.packed_scales[0])


def test_the_multiplier() -> None:
    import torch
    from vllm.model_executor.layers.quantization.utils import marlin_utils_fp4 as fp4

    weights = random_weights(NVFP4, experts=3, size_n=N, size_k=K, seed=4)
    assert weights.multiplier is not None
    assert weights.kernel_multiplier is not None
    theirs = fp4.nvfp4_marlin_process_global_scale(
        torch.from_numpy(weights.multiplier), torch.bfloat16
    )
    assert np.array_equal(theirs.numpy(), weights.kernel_multiplier)
