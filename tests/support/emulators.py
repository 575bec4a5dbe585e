"""Kernels on a CPU, rounding as those of a GPU do: what the references' bounds must let pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.gpu.reference import nvfp4_activations
from tests.gpu.reference.fp8_linear import STEP, Accumulator, Quantized, quantize
from tests.gpu.reference.marlin_layout import bfloat16
from tests.gpu.reference.swiglu import swiglu
from vllm_forge.checkpoints.codecs.fp8_block import BLOCK
from vllm_forge.checkpoints.codecs.small_floats import e4m3_decode

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tests.gpu.reference.marlin_reference import Routing
    from tests.gpu.reference.marlin_weights import Weights
    from tests.gpu.reference.nvfp4_moe import Experts
    from vllm_forge.checkpoints.codecs.fp8_block import Fp8Block


def marlin(
    weights: Weights,
    routing: Routing,
    activations: NDArray[np.float64],
    router: NDArray[np.float32] | None = None,
) -> NDArray[np.float64]:
    """A kernel on a CPU: float32 sums, and the kernel's own roundings."""
    flat = routing.experts_of.reshape(-1)
    out = np.empty((flat.size, weights.size_n), np.float32)
    for expert in np.unique(flat):
        mine = np.flatnonzero(flat == expert)
        rows = activations[mine // routing.top_k].astype(np.float32)
        out[mine] = rows @ weights.values[expert].astype(np.float32)
    factor = np.ones((flat.size, 1), np.float32)
    if weights.multiplier is not None:
        factor = weights.multiplier[flat][:, None]
    if router is None:
        return bfloat16(out * factor)
    row = bfloat16(router.reshape(-1, 1).astype(np.float32) * factor)
    return bfloat16((bfloat16(out) * row).astype(np.float32))


def nvfp4_experts(
    experts: Experts,
    rows: NDArray[np.float64],
    experts_of: NDArray[np.integer],
    router: NDArray[np.float32],
) -> NDArray[np.float64]:
    """A backend on a CPU: float32 sums, bfloat16 between the operations; (tokens, hidden)."""
    tokens, top_k = experts_of.shape
    flat = experts_of.reshape(-1)
    if experts.divisors is not None:
        rows = nvfp4_activations.quantize(rows, experts.divisors[0]).values()
    both = _gemm(experts.gate_up, flat, np.repeat(rows, top_k, axis=0))
    middle = bfloat16(swiglu(both, experts.limit).astype(np.float32))
    if experts.divisors is not None:
        middle = nvfp4_activations.quantize(middle, experts.divisors[1]).values()
    down = _gemm(experts.down, flat, middle) * bfloat16(router.reshape(-1, 1))
    parts = bfloat16(down.astype(np.float32)).reshape(tokens, top_k, -1)
    return bfloat16(parts.sum(axis=1).astype(np.float32))


def _gemm(
    weights: Weights, flat: NDArray[np.integer], rows: NDArray[np.float64]
) -> NDArray[np.float64]:
    out = np.empty((flat.size, weights.size_n), np.float32)
    for expert in np.unique(flat):
        mine = np.flatnonzero(flat == expert)
        out[mine] = rows[mine].astype(np.float32) @ weights.values[expert].astype(np.float32)
        if weights.multiplier is not None:
            out[mine] *= weights.multiplier[expert]
    return bfloat16(out)


def fp8_linear(
    rows: NDArray[np.float64], weight: Fp8Block, accumulator: Accumulator, *, powers_of_two: bool
) -> NDArray[np.float64]:
    """A kernel on a CPU that cuts off as the accumulator does; [M, N]."""
    return multiply(quantize(rows, powers_of_two=powers_of_two), weight, accumulator)


def multiply(rows: Quantized, weight: Fp8Block, accumulator: Accumulator) -> NDArray[np.float64]:
    """The products of codes, cut off step by step, under their scales; in bfloat16, [M, N]."""
    left, right = e4m3_decode(rows.codes), e4m3_decode(weight.codes)
    scales = np.repeat(weight.scales, BLOCK, axis=0)[: len(right)]
    if not accumulator.promoted:  # scales are powers of two and belong to the products
        left, right = rows.values(), weight.values()
    total = np.zeros((len(left), len(right)))
    sums = np.zeros_like(total)
    for start in range(0, right.shape[1], STEP):
        terms = left[:, None, start : start + STEP] * right[None, :, start : start + STEP]
        sums = _add(sums, terms, accumulator.bits)
        if accumulator.promoted and (start + STEP) % BLOCK == 0:
            block = start // BLOCK
            factor = rows.scales[:, block : block + 1] * scales[:, block]
            total = (total + sums * factor).astype(np.float32).astype(np.float64)
            sums = np.zeros_like(sums)
    return bfloat16((total + sums).astype(np.float32))


def _add(sums: NDArray[np.float64], terms: NDArray[np.float64], bits: int) -> NDArray[np.float64]:
    addends = np.concatenate([sums[..., None], terms], axis=-1)
    largest = np.abs(addends).max(axis=-1, keepdims=True)
    _, exponent = np.frexp(largest)
    grid = np.ldexp(1.0, exponent - 1 - bits)
    total: NDArray[np.float64] = (np.trunc(addends / grid) * grid).sum(axis=-1)
    return total
