"""INT4 and MXFP4: bytes mean what the specifications say, and rounding stays within its bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_forge.checkpoints.codecs import grouped, nvfp4
from vllm_forge.checkpoints.codecs.small_floats import e2m1_encode, e8m0_ceil

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

SEEDS = st.integers(0, 2**32 - 1)
SPREADS = st.sampled_from([1e-6, 0.02, 1.0, 300.0])


def _weights(seed: int, spread: float, columns: int) -> NDArray[np.float32]:
    """BF16's values: normal, with a row of zeros and one that is alike everywhere."""
    drawn = np.random.default_rng(seed).normal(0, spread, (6, columns)).astype(np.float32)
    drawn[0], drawn[1] = 0, spread
    return (drawn.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _floor(largest: NDArray[np.float64]) -> NDArray[np.float64]:
    """The specification's scale: the exponent of the largest element, less E2M1's own."""
    scales: NDArray[np.float64] = np.exp2(np.floor(np.log2(largest)) - 2)
    return scales


def _ceil(largest: NDArray[np.float64]) -> NDArray[np.float64]:
    """The smallest power of two under which nothing is cut off."""
    return e8m0_ceil(largest / 6)


def _seven_eighths(largest: NDArray[np.float64]) -> NDArray[np.float64]:
    """As compressed-tensors has it: up from 7/4 of a power of two on."""
    scales: NDArray[np.float64] = np.exp2(np.floor(np.log2(largest * 8 / 7)) - 2)
    return scales


def _mxfp4(
    weight: NDArray[np.float32], rule: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> grouped.Mxfp4:
    groups = weight.astype(np.float64).reshape(len(weight), -1, grouped.MXFP4_GROUP)
    largest = np.abs(groups).max(-1)
    scales = rule(np.where(largest > 0, largest, 1))
    codes = e2m1_encode(groups / scales[..., None]).reshape(weight.shape)
    return grouped.Mxfp4(packed=nvfp4.pack(codes), scales=(np.log2(scales) + 127).astype(np.uint8))


@pytest.mark.parametrize("rule", [_floor, _ceil, _seven_eighths])
@given(seed=SEEDS, spread=SPREADS)
def test_mxfp4_is_within_its_bound_by_every_rule_for_scales(
    rule: Callable[[NDArray[np.float64]], NDArray[np.float64]], seed: int, spread: float
) -> None:
    weight = _weights(seed, spread, 96)
    error = np.abs(_mxfp4(weight, rule).values() - weight)
    assert (error <= grouped.mxfp4_bound(weight)).all()


@given(seed=SEEDS, spread=SPREADS, by=st.sampled_from([-1, 1]))
def test_a_scale_of_the_next_power_is_beyond_it(seed: int, spread: float, by: int) -> None:
    weight = _weights(seed, spread, 96)
    made = _mxfp4(weight, _ceil)
    wrong = grouped.Mxfp4(packed=made.packed, scales=made.scales + np.int8(by).view(np.uint8))
    error = np.abs(wrong.values() - weight)
    assert (error > grouped.mxfp4_bound(weight)).any()
    assert np.isnan(grouped.Mxfp4(packed=made.packed, scales=made.scales * 0 + 255).values()).all()


def _int4(weight: NDArray[np.float32]) -> grouped.Int4:
    """Round to nearest, scales in BF16, which are rounded to nearest themselves."""
    groups = weight.astype(np.float64).reshape(len(weight), -1, grouped.INT4_GROUP)
    exact = (np.abs(groups).max(-1) / 7.5).astype(np.float32)
    bits = exact.view(np.uint32)
    scales = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    divisor = np.where(scales == 0, 1, scales)[..., None]
    codes = (np.clip(np.round(groups / divisor), -8, 7) + 8).astype(np.uint32)
    words = codes.reshape(len(weight), -1, 8) << (np.arange(8, dtype=np.uint32) * 4)
    packed = np.bitwise_or.reduce(words, axis=-1).astype(np.uint32).view(np.int32)
    return grouped.Int4(packed=packed, scales=scales)


@given(seed=SEEDS, spread=SPREADS)
def test_int4_is_within_its_bound_and_one_step_is_beyond(seed: int, spread: float) -> None:
    weight = _weights(seed, spread, 256)
    made = _int4(weight)
    bound = grouped.int4_bound(weight)
    assert (np.abs(made.values() - weight) <= bound).all()
    off = grouped.Int4(packed=made.packed ^ np.int32(1), scales=made.scales)
    assert (np.abs(off.values() - weight)[1:] > bound[1:]).any()
    wide = grouped.Int4(packed=made.packed, scales=made.scales * 2)
    assert (np.abs(wide.values() - weight)[1:] > bound[1:]).any()


def test_the_first_code_is_in_the_lowest_bits() -> None:
    word = np.array([[0x76543210]], dtype=np.int32)
    assert grouped.unpack_words(word).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert grouped.unpack_words(np.array([[-1]], dtype=np.int32)).tolist() == [[15] * 8]
    scales = np.ones((1, 1), dtype=np.float32)
    assert grouped.Int4(packed=word, scales=scales).values().tolist() == [
        [-8, -7, -6, -5, -4, -3, -2, -1]
    ]
