"""Our NVFP4 and FP8 block codecs give the bits that compressed-tensors and torch give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_forge.checkpoints.codecs import fp8_block, nvfp4
from vllm_forge.checkpoints.codecs.small_floats import (
    E4M3_MAGNITUDES,
    e2m1_decode,
    e2m1_encode,
    e4m3_decode,
    e4m3_encode,
    e8m0_ceil,
)

CODES = np.arange(256, dtype=np.uint8)
SCALES = (1.0, 1e-3, 37.0, 1e-30)


def _weights(scale: float, rows: int = 200, columns: int = 384) -> torch.Tensor:
    """BF16, with a block of zeros, a tie in every group, and a negative zero."""
    generator = torch.Generator().manual_seed(42)
    weight = torch.randn(rows, columns, generator=generator) * scale
    weight[:, :16] = 0
    weight[:, 16] = -0.0
    weight[:, 17::16] = weight.abs().amax(dim=1, keepdim=True) * 0.75
    return weight.bfloat16().float()


def test_every_e4m3_byte_means_what_torch_says() -> None:
    theirs = torch.from_numpy(CODES.copy()).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(e4m3_decode(CODES), theirs, equal_nan=True)
    assert np.signbit(e4m3_decode(CODES))[128]


def test_every_e4m3_midpoint_rounds_as_in_torch() -> None:
    middle = (E4M3_MAGNITUDES[1:] + E4M3_MAGNITUDES[:-1]) / 2
    values = np.concatenate(
        [E4M3_MAGNITUDES, middle, np.nextafter(middle.astype("f4"), 0),
         np.nextafter(middle.astype("f4"), np.float32(1e9))]
    ).astype(np.float32)  # fmt: skip
    values = np.concatenate([values, -values])
    theirs = torch.from_numpy(values.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(e4m3_encode(values), theirs)


def test_every_nibble_packs_and_unpacks_as_in_compressed_tensors() -> None:
    from compressed_tensors.compressors.nvfp4.helpers import (
        pack_fp4_to_uint8,
        unpack_fp4_from_uint8,
    )

    first, second = np.divmod(CODES, 16)
    pairs = np.stack([second, first], axis=-1).reshape(16, 32)
    values = e2m1_decode(pairs)
    theirs = pack_fp4_to_uint8(torch.from_numpy(values))
    assert np.array_equal(theirs.numpy(), CODES.reshape(16, 16))
    assert np.array_equal(nvfp4.pack(pairs), CODES.reshape(16, 16))
    assert np.array_equal(nvfp4.unpack(CODES), pairs.reshape(-1))
    back = unpack_fp4_from_uint8(theirs, 16, 32, dtype=torch.float64)
    assert np.array_equal(back.numpy(), values)


def test_every_e2m1_tie_rounds_as_in_compressed_tensors() -> None:
    from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA

    grid = np.arange(-7, 7.03125, 1 / 32, dtype=np.float32)
    values = np.concatenate([grid, np.nextafter(grid, np.float32(9)), [np.float32(-0.0)]])
    # Clamped before, as round_to_quantized_type_args does.
    clamped = torch.from_numpy(values).clamp(-6, 6)
    cast = getattr(FP4_E2M1_DATA.cast_to_fp4, "_torchdynamo_orig_callable", None)
    theirs = (cast or FP4_E2M1_DATA.cast_to_fp4)(clamped.clone()).numpy()
    ours = e2m1_decode(e2m1_encode(values))
    assert np.array_equal(ours, theirs)
    assert np.array_equal(np.signbit(ours), np.signbit(theirs))


@pytest.mark.parametrize("scale", SCALES)
def test_nvfp4_bits_are_those_of_compressed_tensors(scale: float) -> None:
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import NVFP4
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weight = _weights(scale)
    args = NVFP4["weights"]
    divisor = generate_gparam(weight.amin(), weight.amax())
    groups = weight.unflatten(-1, (-1, 16))
    scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=divisor)
    theirs = NVFP4PackedCompressor.compress(
        {"weight": weight, "weight_scale": scales, "weight_global_scale": divisor},
        QuantizationScheme(targets=["Linear"], **NVFP4),
    )
    ours = nvfp4.encode(weight.numpy())
    assert ours.global_scale == divisor.item()
    assert np.array_equal(ours.scales, theirs["weight_scale"].view(torch.uint8).numpy())
    assert np.array_equal(ours.packed, theirs["weight_packed"].numpy())


@pytest.mark.parametrize("scale", SCALES)
def test_nvfp4_values_are_those_of_vllms_emulation(scale: float) -> None:
    """VLLM's own decoder, in float32: equal up to its two roundings."""
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
        dequantize_to_dtype,
    )

    ours = nvfp4.encode(_weights(scale).numpy())
    theirs = dequantize_to_dtype(
        torch.from_numpy(ours.packed),
        torch.from_numpy(ours.scales).view(torch.float8_e4m3fn),
        torch.tensor(1 / ours.global_scale),
        torch.float32,
        16,
        swizzle=False,
    ).numpy()
    assert np.abs(theirs - ours.values()).max() <= 2.0**-22 * np.abs(ours.values()).max()


@pytest.mark.parametrize("rows", [200, 256])
@pytest.mark.parametrize("scale", SCALES[:3])
def test_fp8_block_bits_are_those_of_compressed_tensors(scale: float, rows: int) -> None:
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.quant_scheme import FP8_BLOCK
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = _weights(scale, rows)
    weight[128:, 128:256] = 0
    padded = torch.zeros(256, 384)
    padded[:rows] = weight
    blocks = padded.reshape(2, 128, 3, 128)
    args = FP8_BLOCK["weights"]
    scales, _ = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
    theirs = quantize(weight, scales, None, args, dtype=torch.float8_e4m3fn)
    ours = fp8_block.encode(weight.numpy())
    assert np.array_equal(ours.scales, scales.numpy())
    assert np.array_equal(ours.codes, theirs.view(torch.uint8).numpy())


def test_powers_of_two_are_those_of_vllm() -> None:
    from vllm.utils.deep_gemm import _ceil_to_ue8m0

    scales = np.concatenate([np.geomspace(1e-6, 1e3, 4096), 2.0 ** np.arange(-20, 20)])
    scales = scales.astype(np.float32)
    theirs = _ceil_to_ue8m0(torch.from_numpy(scales)).double().numpy()
    assert np.array_equal(e8m0_ceil(scales), theirs)
