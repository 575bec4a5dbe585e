"""NVFP4 activations: what a kernel may make of them holds every kernel, and little more."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gpu.reference.marlin_layout import bfloat16
from tests.gpu.reference.nvfp4_activations import quantize, spans

DIVISOR = 256.0


def rows(seed: int, size: float = 1.0) -> np.ndarray:
    values = size * np.random.default_rng(seed).standard_normal((4, 64))
    return bfloat16(values.astype(np.float32))


def approximate(values: np.ndarray, divisor: float, off: float) -> np.ndarray:
    """A kernel whose reciprocals are off by so much."""
    return (
        quantize(values * (1 + off), divisor).values()
        if off
        else quantize(values, divisor).values()
    )


def test_a_value_by_hand() -> None:
    group = np.zeros((1, 16))
    group[0, :4] = 6, -3, 1.3, 0.2
    found = quantize(group, 64.0)  # the scale is 64, which is 1
    assert found.values()[0, :4].tolist() == [6, -3, 1.5, 0]


def test_a_scale_that_rounds_to_zero_makes_zeros() -> None:
    assert not quantize(np.full((1, 16), 2.0**-20), 1.0).values().any()


@given(st.integers(0, 10_000), st.sampled_from([-1e-7, 0.0, 1e-7]), st.integers(-6, 6))
def test_spans_hold_what_kernels_make(seed: int, off: float, power: int) -> None:
    values = rows(seed, 2.0**power)
    low, high = spans(values, values, DIVISOR)
    found = approximate(values, DIVISOR, off)
    assert (low <= found).all()
    assert (found <= high).all()


@given(st.integers(0, 10_000), st.floats(0, 0.02))
def test_spans_of_intervals_hold_what_comes_of_numbers_in_them(seed: int, width: float) -> None:
    values = rows(seed)
    low, high = spans(values - width, values + width, DIVISOR)
    inside = values + width * np.random.default_rng(seed + 1).uniform(-1, 1, values.shape)
    found = quantize(inside, DIVISOR).values()
    assert (low <= found).all()
    assert (found <= high).all()


def test_known_numbers_mostly_have_one_value() -> None:
    """Bfloat16 has few bits, so that a scale is a tie more often than with other numbers."""
    found = [spans(values, values, DIVISOR) for values in map(rows, range(50))]
    assert np.mean([low == high for low, high in found]) > 0.8


@pytest.mark.parametrize("factor", [1.125, 0.875])
def test_another_scale_is_outside(factor: float) -> None:
    values = rows(2)
    low, high = spans(values, values, DIVISOR)
    found = quantize(values, DIVISOR).values() * factor
    assert ((found < low) | (found > high)).any()
