"""The bound on a Marlin launch's result: a right kernel stays within it, planted faults do not."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from tests.gpu.reference import marlin_layout
from tests.gpu.reference.marlin_layout import bfloat16, pack_weights
from tests.gpu.reference.marlin_reference import (
    Routing,
    margin,
    read_out,
    route,
    spread,
    sums,
)
from tests.gpu.reference.marlin_weights import (
    FORMATS,
    FP8,
    MXFP4,
    NVFP4,
    W4A16,
    WeightFormat,
    Weights,
    random_weights,
)
from tests.gpu.reference.planted import InResult, InWeights, in_result, in_weights
from tests.support import emulators
from vllm_forge.checkpoints.codecs.small_floats import e4m3_decode

EXPERTS, N, K, TOKENS, TOP_K, BLOCK = 3, 64, 256, 16, 2, 8
PLACES = 25


@cache
def weights_of(form: WeightFormat) -> Weights:
    return random_weights(form, experts=EXPERTS, size_n=N, size_k=K, seed=7)


def dense(seed: int) -> tuple[Routing, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    routing = route(spread(TOKENS, TOP_K, EXPERTS), EXPERTS, BLOCK)
    activations = bfloat16(rng.standard_normal((TOKENS, K)) / 8)
    return routing, activations, rng.uniform(0.1, 1, (TOKENS, TOP_K)).astype(np.float32)


def read_all() -> Routing:
    """Every expert gets the identity."""
    return route(np.repeat(np.arange(EXPERTS), K)[:, None], EXPERTS, BLOCK)


def read(weights: Weights) -> np.ndarray:
    return emulators.marlin(weights, read_all(), np.tile(np.eye(K), (EXPERTS, 1)))


def reads_right(weights: Weights, result: np.ndarray) -> bool:
    return np.array_equal(result, read_out(weights, read_all()))


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("with_router", [False, True])
def test_a_right_kernel_is_within_the_bound(form: WeightFormat, with_router: bool) -> None:
    routing, activations, router = dense(1)
    given = router if with_router else None
    weights = weights_of(form)
    result = emulators.marlin(weights, routing, activations, given)
    reference = sums(weights, routing, activations, given)
    assert 0.2 < margin(result, reference) <= 1
    assert np.median(reference.bound) < 0.05 * np.median(np.abs(reference.exact))


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_the_identity_reads_every_weight_exactly(form: WeightFormat) -> None:
    weights = weights_of(form)
    assert reads_right(weights, read(weights))
    assert len(np.unique(weights.codes)) == (1 << form.bits) - (2 if form is FP8 else 0)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("fault", InWeights)
def test_a_fault_in_the_weights_is_always_noticed(form: WeightFormat, fault: InWeights) -> None:
    """Wherever it is: a GPU test of one format makes both launches, so either may notice."""
    weights, rng = weights_of(form), np.random.default_rng(3)
    routing, activations, _ = dense(2)
    reference = sums(weights, routing, activations)
    dense_kills = 0
    for _ in range(PLACES):
        broken = in_weights(fault, weights, rng)
        assert not reads_right(weights, read(broken))
        dense_kills += margin(emulators.marlin(broken, routing, activations), reference) > 1
    everywhere = fault in {InWeights.SWAPPED_EXPERTS, InWeights.TRANSPOSED_SCALES}
    assert dense_kills == PLACES if everywhere else dense_kills > 0


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("fault", InResult)
def test_a_fault_in_the_result_is_always_noticed(form: WeightFormat, fault: InResult) -> None:
    weights, rng = weights_of(form), np.random.default_rng(4)
    routing, activations, _ = dense(2)
    reference = sums(weights, routing, activations)
    result = emulators.marlin(weights, routing, activations)
    other = emulators.marlin(weights, routing, dense(5)[1])
    for _ in range(PLACES):
        assert margin(in_result(fault, result, other, rng), reference) > 1


def test_partial_sums_in_16_bits_are_noticed() -> None:
    """``use_fp32_reduce=False``, and the protocol emulator's HALF_REDUCE."""
    weights = weights_of(NVFP4)
    routing, activations, _ = dense(2)
    halves = [activations.copy() for _ in range(4)]
    for number, half in enumerate(halves):
        half[:, np.arange(K) // (K // 4) != number] = 0
    total = np.zeros((TOKENS * TOP_K, N))
    for half in halves:
        total = bfloat16(total + emulators.marlin(weights, routing, half))
    assert margin(total, sums(weights, routing, activations)) > 1


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_loses_nothing_and_keeps_tiles_together(bits: int) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 1 << bits, (2, 64, 128), dtype=np.uint8)
    packed = pack_weights(codes, bits)
    assert packed.shape == (2, 4, 128 * bits // 2)
    mask, per_word = (1 << bits) - 1, 32 // bits
    words = packed.view(np.uint32).reshape(2, 4, 2, -1)  # the tiles of 64 columns
    for place in (0, per_word - 1):
        assert ((words >> (bits * place)) & mask).max() == mask
    unpacked = np.stack([(words >> (bits * p)) & mask for p in range(per_word)], -1)
    tiles = codes.reshape(2, 4, 16, 2, 64).swapaxes(2, 3)
    for left, right in zip(unpacked.reshape(-1, 1024), tiles.reshape(-1, 1024), strict=True):
        assert np.array_equal(np.bincount(left, minlength=mask), np.bincount(right, minlength=mask))


def test_one_element_of_the_packed_order() -> None:
    """Lane 1 of the first tile starts with row 2, column 0: a fragment's second pair of rows."""
    codes = np.zeros((1, 16, 64), np.uint8)
    codes[0, 2, 0] = 0xF
    (word,) = np.flatnonzero(pack_weights(codes, 4))
    assert word == 4
    assert pack_weights(codes, 4).view(np.uint32).ravel()[4] == 0xF


def test_nvfp4_scales_keep_their_values_and_lose_only_those_that_vllm_loses() -> None:
    values = e4m3_decode(np.arange(127, dtype=np.uint8))
    stored, factor = marlin_layout.nvfp4_scale_bytes(values.reshape(1, 1, -1))
    assert factor == 1
    # Five exponent bits of bias 15, three of mantissa, 2^7 times as large.
    wide = stored.ravel().astype(int)
    decoded = np.where(wide >= 128, (8 + wide % 8) * 2.0 ** (wide // 8 - 25), 0)
    kept = values >= 2.0**-6
    assert np.array_equal(decoded[kept], values[kept])
    assert (decoded[~kept] == 0).all() and (~kept).sum() == 8


def test_a_common_factor_is_given_back_to_the_multiplier() -> None:
    scales = np.array([[[1.0, 3.5]]])
    stored, factor = marlin_layout.nvfp4_scale_bytes(scales)
    assert factor == 128
    multiplier = np.array([3.0], np.float32)
    assert marlin_layout.nvfp4_global_scale(multiplier, factor)[0] == 3 * 2.0**119 / 128
    assert stored.ravel().tolist() == [0xE8, 0xF6]


def test_scalar_types_are_those_in_the_wheels_symbols() -> None:
    assert {form.name: form.type_id for form in FORMATS} == {
        "w4a16": 1125899907892224,
        "nvfp4": 562949953487106,
        "mxfp4": 562949953487106,
        "fp8": 2814749767172868,
    }
    assert [form.scale_bytes for form in (W4A16, NVFP4, MXFP4, FP8)] == [2, 1, 1, 2]


def test_bfloat16_rounds_ties_to_even() -> None:
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, np.inf, np.nan])
    rounded = bfloat16(values.astype(np.float32))
    assert rounded.tolist()[:-1] == [1, 1 + 2**-6, 1 + 2**-7, -1, np.inf]
    assert np.isnan(rounded[-1])


# --- routing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [8, 16, 64])
def test_every_row_is_in_a_block_of_its_expert(block: int) -> None:
    rng = np.random.default_rng(block)
    experts_of = np.stack([rng.permutation(20)[:6] for _ in range(40)])
    routing = route(experts_of, 20, block)
    assert routing.padded % block == 0
    rows = routing.sorted_ids[: routing.padded]
    assert sorted(rows[rows < 240].tolist()) == list(range(240))
    for number, row in enumerate(rows):
        if row < 240:
            assert experts_of.ravel()[row] == routing.expert_ids[number // block]
    assert (routing.sorted_ids[routing.padded :] == 240).all()


def test_spread_gives_each_expert_as_many_rows() -> None:
    assert np.bincount(spread(8, 6, 20).ravel()).tolist() == [3] * 8 + [2] * 12
    with pytest.raises(ValueError, match="6 different experts of 5"):
        spread(8, 6, 5)
