"""What an FP8 block-scaled GEMM must give, its activations quantized on the way; and its bound.

Activations are quantized in groups of 128 along K: the scale is float32 of ``amax / 448``, for
DeepGEMM the power of two that is not below it; codes are E4M3, rounded to nearest
(csrc/libtorch_stable/quantization/w8a8/fp8/per_token_group_quant.cu of vLLM 0.26.0, and
``scale_1x128_kernel`` of FlashInfer 0.6.14, which multiplies with ``448 / amax``). What lies within
:data:`APPROXIMATE` of a tie may go either way, and so may a scale that close to a power of two.
Dividing by a power of two is exact, so that a tie then goes to the even code.

Sums, per element. A tensor core adds 32 products to its accumulator at a time, aligned to the
largest of these 33 numbers and cut off below its :attr:`Accumulator.bits`-th fractional bit. An
addend that is zero loses nothing, so one step is off by at most ``(nonzero + 1) * 2^-bits`` of the
largest. On Hopper 13 bits are kept (Khattak and Mikaitis, "Accurate models of NVIDIA tensor cores",
2025; "around 14 bits" in DeepSeek-V3's technical report, section 3.3.2), and therefore kernels add
each 128 products to float32 sums of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tests.gpu.reference.marlin_reference import PER_TERM, TURNS, U_BFLOAT16, U_FLOAT32, Sums
from vllm_forge.checkpoints.codecs.fp8_block import BLOCK
from vllm_forge.checkpoints.codecs.small_floats import E4M3_MAX, e4m3_decode, e4m3_encode, e8m0_ceil

if TYPE_CHECKING:
    from numpy.typing import NDArray


STEP = 32  # products of FP8 that one instruction adds
APPROXIMATE = 2.0**-20
LEAST = 1e-10  # instead of an amax of zero
# cuBLAS may cut K into as many equal parts as this, and round their sums to bfloat16
# (torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction, on by default).
MOST_SPLITS = 32


@dataclass(frozen=True, kw_only=True)
class Accumulator:
    """How a GPU adds products of FP8.

    Attributes:
        bits: fractional bits of the largest addend that are kept.
        promoted: whether each 128 products go to a float32 sum.
    """

    bits: int
    promoted: bool


HOPPER = Accumulator(bits=13, promoted=True)
# tcgen05 and mma.sync of Blackwell add into float32; two bits less are asked for here, as nothing
# that was measured says more.
BLACKWELL = Accumulator(bits=21, promoted=False)


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A quantized activation [M, K].

    Attributes:
        codes: [M, K] uint8, E4M3.
        scales: [M, K/128] float32.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]

    def values(self) -> NDArray[np.float64]:
        """[M, K]."""
        scales: NDArray[np.float64] = np.repeat(self.scales.astype(np.float64), BLOCK, axis=1)
        return e4m3_decode(self.codes) * scales


def group_scales(rows: NDArray[np.float64], *, powers_of_two: bool) -> NDArray[np.float32]:
    """[M, K/128], as the kernels make them: one float32 division."""
    largest = np.abs(rows.reshape(len(rows), -1, BLOCK)).max(axis=-1).astype(np.float32)
    scales: NDArray[np.float32] = np.maximum(largest, np.float32(LEAST)) / np.float32(E4M3_MAX)
    if powers_of_two:  # these have the least number a second time
        return e8m0_ceil(np.maximum(scales, np.float32(LEAST))).astype(np.float32)
    return scales


def quantize(rows: NDArray[np.float64], *, powers_of_two: bool) -> Quantized:
    """Rows [M, K] of bfloat16 values, rounded to nearest."""
    scales = group_scales(rows, powers_of_two=powers_of_two)
    each: NDArray[np.float32] = np.repeat(scales, BLOCK, axis=1)
    quotient: NDArray[np.float32] = rows.astype(np.float32) / each
    return Quantized(codes=e4m3_encode(quotient), scales=scales)


def spans(
    rows: NDArray[np.float64], *, powers_of_two: bool, off: NDArray[np.float64] | float = 0.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The least and the most that each element may decode to, [M, K].

    Args:
        rows: what is quantized, [M, K]; not all of a group is zero.
        powers_of_two: the kind of scales.
        off: how far the rows themselves may be off.
    """
    low, high = rows - off, rows + off
    farthest = np.maximum(np.abs(low), np.abs(high))
    nearest = np.where(low * high > 0, np.minimum(np.abs(low), np.abs(high)), 0)
    if powers_of_two or np.any(off):
        candidates = [
            group_scales(nearest * (1 - APPROXIMATE), powers_of_two=powers_of_two),
            group_scales(farthest * (1 + APPROXIMATE), powers_of_two=powers_of_two),
        ]
    else:
        candidates = [group_scales(rows, powers_of_two=False)]
    wider = 0.0 if powers_of_two else APPROXIMATE
    lowest, highest = np.full_like(low, np.inf), np.full_like(high, -np.inf)
    for scales in candidates:
        value = np.repeat(scales.astype(np.float64), BLOCK, axis=1)
        for side in (low - wider * np.abs(low), high + wider * np.abs(high)):
            decoded = e4m3_decode(e4m3_encode(side / value)) * value
            lowest, highest = np.minimum(lowest, decoded), np.maximum(highest, decoded)
    return lowest - wider * np.abs(lowest), highest + wider * np.abs(highest)


def one_of_each_block(size_k: int) -> NDArray[np.float64]:
    """Rows that read a weight's scales: one for each block of columns, with one element."""
    blocks = size_k // BLOCK
    rows = np.zeros((blocks, size_k))
    places = np.random.default_rng(5).integers(BLOCK, size=blocks)
    rows[np.arange(blocks), np.arange(blocks) * BLOCK + places] = 1
    return rows


def known(rows: NDArray[np.float64], *, powers_of_two: bool) -> Sums:
    """Rows [M, K] after quantization, and how far the kernel's may differ from them."""
    return Sums.between(*spans(rows, powers_of_two=powers_of_two))


def products(rows: Sums, weight: NDArray[np.float64], accumulator: Accumulator) -> Sums:
    """Rows [M, K] times a weight [N, K], in bfloat16: [M, N].

    Args:
        rows: decoded activations, and how far they may be off.
        weight: decoded; one scale for each block of 128 x 128.
        accumulator: the GPU's.
    """
    size_k = weight.shape[1]
    exact = np.zeros((len(rows.exact), len(weight)))
    lost, sums = np.zeros_like(exact), np.zeros_like(exact)
    for start in range(0, size_k, STEP):
        if accumulator.promoted and start % BLOCK == 0:
            sums = np.zeros_like(exact)
        some, other = rows.exact[:, start : start + STEP], weight[:, start : start + STEP]
        terms = np.abs(some) @ np.abs(other).T
        largest = np.minimum(terms, np.outer(np.abs(some).max(axis=1), np.abs(other).max(axis=1)))
        addends = np.count_nonzero(some, axis=1)[:, None] + 1
        lost += addends * 2.0**-accumulator.bits * np.maximum(largest, np.abs(sums))
        part = some @ other.T
        sums = sums + part
        exact += part
    size = np.abs(rows.exact) @ np.abs(weight).T
    slack = rows.bound @ np.abs(weight).T
    bound = slack + lost + (size_k / BLOCK + TURNS) * U_FLOAT32 * (size + slack)
    return Sums(exact=exact, bound=bound + U_BFLOAT16 * (np.abs(exact) + bound))


def plain_products(rows: Sums, weight: NDArray[np.float64]) -> Sums:
    """Bfloat16 rows [M, K] times a bfloat16 weight [N, K], by cuBLAS: [M, N]."""
    exact = rows.exact @ weight.T
    size = np.abs(rows.exact) @ np.abs(weight).T
    slack = rows.bound @ np.abs(weight).T
    size_k = weight.shape[1]
    split = np.zeros_like(exact)
    for parts in (2**power for power in range(1, MOST_SPLITS.bit_length())):
        if size_k % parts:
            break
        step = size_k // parts
        cut = [slice(start, start + step) for start in range(0, size_k, step)]
        partial = sum(np.abs(rows.exact[:, part] @ weight[:, part].T) for part in cut)
        split = np.maximum(split, np.asarray(partial))
    bound = slack + (PER_TERM * size_k + TURNS) * U_FLOAT32 * (size + slack) + U_BFLOAT16 * split
    return Sums(exact=exact, bound=bound + U_BFLOAT16 * (np.abs(exact) + bound))
