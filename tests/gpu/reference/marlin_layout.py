"""How the Marlin MoE kernel wants weights and scales: orders of elements and bit patterns.

Equal to what vLLM 0.26.0 does in Python and in ``gptq_marlin_repack``; the contract tests compare.
Activations of 16 bits only. Arrays start with an expert axis.

Sources, of 0.26.0: ``marlin_utils_test.py`` get_weight_perm, marlin_weights; ``marlin_utils.py``
get_scale_perms, marlin_permute_scales; ``marlin_utils_fp4.py`` nvfp4_marlin_process_scales,
mxfp4_marlin_process_scales; ``marlin_utils_fp8.py`` fp8_fused_exponent_bias_into_scales.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm_forge.checkpoints.codecs.small_floats import E4M3_MAX

if TYPE_CHECKING:
    from numpy.typing import NDArray

TILE = 16
INTERLEAVE = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
BYTE_SCALES = (0, 2, 1, 3)  # the order of each four scales of one byte
# What the kernel leaves out when it puts a small float's bits into a bfloat16: 2^(127 - bias).
FP4_BIAS, FP8_BIAS = 126, 120
NVFP4_SHIFT = 7  # scales are stored 2^7 times as large, so that their top exponent bit is set
NVFP4_LEAST = 2.0  # a stored scale below it has that bit clear: vLLM makes it zero


def weight_order(bits: int) -> NDArray[np.intp]:
    """Where each of the 1024 elements of four 16 x 16 tiles side by side comes from."""
    order: list[int] = []
    for lane in range(32):
        column = lane // 4
        rows = [2 * (lane % 4) + step for step in (0, 1, 8, 9)]
        fragment = [TILE * row + column + 8 * half for half in (0, 1) for row in rows]
        order += [element + TILE * TILE * tile for tile in range(4) for element in fragment]
    return np.asarray(order).reshape(-1, len(INTERLEAVE[bits]))[:, INTERLEAVE[bits]].ravel()


def pack_weights(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Pack codes for the kernel.

    Args:
        codes: (experts, k, n); k a multiple of 16, n of 64.
        bits: of a code, 4 or 8.

    Returns:
        (experts, k / 16, n * bits / 2).
    """
    experts, k, n = codes.shape
    tiled = codes.reshape(experts, k // TILE, TILE, n // TILE, TILE).swapaxes(2, 3)
    order = weight_order(bits)
    mixed = tiled.reshape(-1, order.size)[:, order].reshape(experts, k // TILE, -1)
    per_word = 32 // bits
    packed = np.zeros((experts, k // TILE, n * TILE // per_word), np.uint32)
    for place in range(per_word):
        packed |= mixed[..., place::per_word].astype(np.uint32) << np.uint32(bits * place)
    return packed.view(np.int32)


def order_scales(scales: NDArray[np.generic]) -> NDArray[np.generic]:
    """Order group scales (experts, groups > 1, n) as the kernel's fragments read them."""
    order = [row + 8 * column for row in range(8) for column in range(8)]
    return np.ascontiguousarray(scales.reshape(-1, len(order))[:, order].reshape(scales.shape))


def order_byte_scales(scales: NDArray[np.generic]) -> NDArray[np.generic]:
    """The same for scales of one byte."""
    ordered = order_scales(scales)
    mixed = ordered.reshape(-1, len(BYTE_SCALES))[:, BYTE_SCALES]
    return np.ascontiguousarray(mixed.reshape(scales.shape))


def nvfp4_scale_bytes(scales: NDArray[np.float64]) -> tuple[NDArray[np.uint8], float]:
    """E4M3 scale values as bytes with five exponent bits and no sign, not yet in order.

    Returns:
        The bytes, and the power of two that all scales were multiplied with beforehand to use the
        range; the global scale has to be divided by it.

    Raises:
        ValueError: a scale is negative.
    """
    if (scales < 0).any():
        raise ValueError("the kernel's scales have no sign")
    most = float(scales.max())
    factor = 2.0 ** np.floor(np.log2(E4M3_MAX / most)) if 0 < most < E4M3_MAX else 1.0
    stored = scales * factor * 2.0**NVFP4_SHIFT
    stored = np.where(stored < NVFP4_LEAST, 0, stored).astype(np.float16)
    return ((stored.view(np.uint16) << 1) >> 8).astype(np.uint8), float(factor)


def nvfp4_global_scale(scale: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    """Multipliers of the experts as the kernel wants them for bfloat16 activations."""
    shifted = scale * np.float32(2.0 ** (FP4_BIAS - NVFP4_SHIFT))
    return (shifted / np.float32(factor)).astype(np.float32)


def bfloat16(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Round float32 values to bfloat16, ties to even; NaN stays NaN."""
    bits = bfloat16_bits(values).astype(np.uint32) << 16
    return bits.view(np.float32).astype(np.float64)


def bfloat16_bits(values: NDArray[np.floating]) -> NDArray[np.uint16]:
    """The bit patterns of the rounded values."""
    single = np.ascontiguousarray(values, dtype=np.float32)
    bits = single.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), rounded)
