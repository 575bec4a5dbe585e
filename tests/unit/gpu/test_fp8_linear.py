"""FP8 GEMMs with block scales: the bound passes kernels that cut off, and kills planted faults."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gpu.reference.fp8_linear import (
    BLACKWELL,
    HOPPER,
    Accumulator,
    group_scales,
    known,
    one_of_each_block,
    plain_products,
    products,
    quantize,
    spans,
)
from tests.gpu.reference.marlin_layout import bfloat16
from tests.gpu.reference.marlin_reference import Sums, margin
from tests.gpu.reference.planted import InBlocks, InResult, in_blocks, in_result
from tests.support.emulators import fp8_linear as emulate
from vllm_forge.checkpoints.codecs import fp8_block
from vllm_forge.checkpoints.codecs.fp8_block import Fp8Block

SHAPE = (384, 1024)
PLACES = 5
# As on Hopper: FlashInfer below 32 rows, DeepGEMM; and DeepGEMM on Blackwell.
KERNELS = pytest.mark.parametrize(
    ("accumulator", "powers_of_two"),
    [(HOPPER, False), (HOPPER, True), (BLACKWELL, True)],
    ids=["hopper", "hopper e8m0", "blackwell"],
)


@cache
def weight(*, powers_of_two: bool) -> Fp8Block:
    rng = np.random.default_rng(1)
    blocks = rng.uniform(0.5, 2, (3, 8))
    source = rng.standard_normal(SHAPE) * fp8_block.spread(blocks, SHAPE)
    return fp8_block.encode(source, powers_of_two=powers_of_two)


def rows(tokens: int = 9, seed: int = 2) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((tokens, SHAPE[1]))
    return bfloat16(values.astype(np.float32))


def reference(values: np.ndarray, accumulator: Accumulator, *, powers_of_two: bool) -> Sums:
    matrix = weight(powers_of_two=powers_of_two).values()
    return products(known(values, powers_of_two=powers_of_two), matrix, accumulator)


@KERNELS
@pytest.mark.parametrize("which", ["dense", "one of each block"])
def test_a_right_kernel_is_within_the_bound(
    *, accumulator: Accumulator, powers_of_two: bool, which: str
) -> None:
    values = rows() if which == "dense" else one_of_each_block(SHAPE[1])
    result = emulate(
        values, weight(powers_of_two=powers_of_two), accumulator, powers_of_two=powers_of_two
    )
    found = margin(result, reference(values, accumulator, powers_of_two=powers_of_two))
    assert found <= 1
    assert found > 0.05 or which != "dense"


def test_a_kernel_that_does_not_promote_is_noticed() -> None:
    """On Hopper: 13 bits for all of K, as FP8 GEMMs had before DeepGEMM; K is a real one."""
    rng = np.random.default_rng(3)
    matrix = np.abs(rng.standard_normal((128, 4096)))  # sums that grow
    values = bfloat16(np.abs(rng.standard_normal((3, 4096))).astype(np.float32))
    wide = fp8_block.encode(matrix, powers_of_two=True)
    right = products(known(values, powers_of_two=True), wide.values(), HOPPER)
    careless = Accumulator(bits=HOPPER.bits, promoted=False)
    assert margin(emulate(values, wide, HOPPER, powers_of_two=True), right) <= 1
    assert margin(emulate(values, wide, careless, powers_of_two=True), right) > 1


@KERNELS
@pytest.mark.parametrize(
    "fault", [InBlocks.ONE_SCALE, InBlocks.TRANSPOSED_SCALES, InBlocks.SWAPPED_ROWS]
)
def test_faults_in_the_weight_are_killed(
    *, accumulator: Accumulator, powers_of_two: bool, fault: InBlocks
) -> None:
    values, rng = one_of_each_block(SHAPE[1]), np.random.default_rng(4)
    right = reference(values, accumulator, powers_of_two=powers_of_two)
    for _ in range(PLACES):
        broken = in_blocks(fault, weight(powers_of_two=powers_of_two), rng)
        assert margin(emulate(values, broken, accumulator, powers_of_two=powers_of_two), right) > 1


@pytest.mark.parametrize(
    "fault", [InBlocks.ONE_SCALE, InBlocks.TRANSPOSED_SCALES, InBlocks.SWAPPED_ROWS]
)
def test_faults_are_killed_through_other_scales_at_load(fault: InBlocks) -> None:
    """DeepGEMM's E8M0: a checkpoint's float32 scales become powers of two, faults with them."""
    source, values = weight(powers_of_two=False), one_of_each_block(SHAPE[1])
    loaded = fp8_block.encode(source.values(), powers_of_two=True)
    right = products(known(values, powers_of_two=True), loaded.values(), HOPPER)
    rng = np.random.default_rng(8)
    for _ in range(PLACES):
        broken = fp8_block.encode(in_blocks(fault, source, rng).values(), powers_of_two=True)
        assert margin(emulate(values, broken, HOPPER, powers_of_two=True), right) > 1


def test_one_code_is_killed_where_every_weight_is_read() -> None:
    small = Fp8Block(
        codes=weight(powers_of_two=True).codes[:128, :128],
        scales=weight(powers_of_two=True).scales[:1, :1],
    )
    values, rng = np.eye(128), np.random.default_rng(5)
    right = products(known(values, powers_of_two=True), small.values(), HOPPER)
    for _ in range(PLACES):
        broken = in_blocks(InBlocks.ONE_CODE, small, rng)
        assert margin(emulate(values, broken, HOPPER, powers_of_two=True), right) > 1


@KERNELS
@pytest.mark.parametrize("fault", InResult)
def test_faults_in_the_result_are_killed(
    *, accumulator: Accumulator, powers_of_two: bool, fault: InResult
) -> None:
    right = reference(rows(), accumulator, powers_of_two=powers_of_two)
    result, stale = (
        emulate(
            values, weight(powers_of_two=powers_of_two), accumulator, powers_of_two=powers_of_two
        )
        for values in (rows(), rows(seed=3))
    )
    rng = np.random.default_rng(6)
    for _ in range(PLACES):
        assert margin(in_result(fault, result, stale, rng), right) > 1


def test_scales_of_another_kind_are_killed() -> None:
    """Activations under powers of two where float32 scales belong, and the other way around."""
    for kind in (False, True):
        right = reference(rows(), HOPPER, powers_of_two=kind)
        found = emulate(rows(), weight(powers_of_two=kind), HOPPER, powers_of_two=not kind)
        assert margin(found, right) > 1


# --- the quantization of activations --------------------------------------------------------------


@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([1 - 1e-7, 1.0, 1 + 1e-7]))
def test_spans_hold_what_kernels_make(seed: int, powers_of_two: bool, factor: float) -> None:
    """Also a kernel that multiplies with ``448 / amax``: its quotients are a little off."""
    values = rows(2, seed)
    low, high = spans(values, powers_of_two=powers_of_two)
    scaled: Any = values if powers_of_two else values.astype(np.float32) * np.float32(factor)
    found = quantize(
        scaled,
        powers_of_two=powers_of_two,
    ).values()
    assert (low <= found).all()
    assert (found <= high).all()


def test_a_tie_under_a_power_of_two_has_one_value() -> None:
    values = np.zeros((1, 128))
    values[0, :2] = 448, 17  # 17 lies between 16 and 18
    low, high = spans(values, powers_of_two=True)
    assert low[0, 1] == high[0, 1] == 16


def test_a_scale_that_is_nearly_a_power_of_two_may_be_either() -> None:
    values = np.zeros((1, 128))
    values[0, :2] = 448, 0.0137  # below E4M3's normal numbers
    low, high = spans(values, powers_of_two=True)
    under_one, under_two = (
        quantize(values * factor, powers_of_two=True).values()[0, 1] for factor in (1, 1.001)
    )
    assert under_one != under_two
    assert low[0, 1] <= min(under_one, under_two)
    assert high[0, 1] >= max(under_one, under_two)


def test_group_scales_by_hand() -> None:
    values = np.zeros((1, 256))
    values[0, 0] = 3
    assert group_scales(values, powers_of_two=True).tolist() == [[2.0**-7, 2.0**-33]]
    assert group_scales(values, powers_of_two=False)[0, 0] == np.float32(3) / np.float32(448)


# --- BF16 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 4, 32])
def test_split_sums_in_bfloat16_are_within_the_bound(parts: int) -> None:
    matrix = bfloat16(np.random.default_rng(7).standard_normal((64, 1024)).astype(np.float32))
    values, size = rows(), 1024 // parts
    partial = [
        bfloat16(
            values[:, at : at + size].astype(np.float32)
            @ matrix[:, at : at + size].T.astype(np.float32)
        )
        for at in range(0, 1024, size)
    ]
    result = bfloat16(np.sum(partial, axis=0).astype(np.float32))
    right = plain_products(Sums(exact=values, bound=np.zeros_like(values)), matrix)
    assert margin(result, right) <= 1
    assert margin(result * 1.05, right) > 1
