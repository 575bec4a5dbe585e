"""NVFP4: every code, every byte, the bound, and each fault that the bound must see."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vllm_forge.checkpoints.codecs.nvfp4 import (
    GROUP,
    Nvfp4,
    bound,
    encode,
    global_scale_of,
    pack,
    unpack,
)
from vllm_forge.checkpoints.codecs.small_floats import (
    E2M1_MAGNITUDES,
    E4M3_MAGNITUDES,
    e2m1_decode,
    e2m1_encode,
    e4m3_decode,
    e4m3_encode,
    e8m0_ceil,
    e8m0_decode,
)

BYTES = np.arange(256, dtype=np.uint8)
NIBBLES = np.arange(16, dtype=np.uint8)


def _weight(seed: int = 0, rows: int = 8, columns: int = 256) -> NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((rows, columns)) * 0.02).astype(np.float32)


class TestSmallFloats:
    def test_every_nibble_comes_back(self) -> None:
        back = e2m1_encode(e2m1_decode(NIBBLES))
        assert back.tolist() == [*range(8), 0, *range(9, 16)]  # -0 becomes 0

    def test_every_e4m3_byte_comes_back(self) -> None:
        numbers = BYTES[~np.isnan(e4m3_decode(BYTES))]
        assert len(numbers) == 254
        assert np.array_equal(e4m3_encode(e4m3_decode(numbers)), numbers)

    def test_e4m3_is_what_the_standard_says(self) -> None:
        values = e4m3_decode(BYTES)
        assert values[[0x01, 0x08, 0x38, 0x7E]].tolist() == [2.0**-9, 2.0**-6, 1.0, 448.0]
        assert np.array_equal(values[:127], np.sort(values[:127]))
        assert np.array_equal(-values[1:127], values[129:255])

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], [0, 1, 1, 2, 2, 4, 4]),
            ([0.26, 0.74, 1.26, 1.74, 2.6, 3.4, 5.1], [0.5, 0.5, 1.5, 1.5, 3, 3, 6]),
            ([6, 7, 1e9, -1e9], [6, 6, 6, -6]),
        ],
    )
    def test_e2m1_rounds_ties_to_even(self, values: list[float], expected: list[float]) -> None:
        assert e2m1_decode(e2m1_encode(np.array(values))).tolist() == expected

    @pytest.mark.parametrize(
        ("encode_", "decode", "magnitudes"),
        [
            (e2m1_encode, e2m1_decode, E2M1_MAGNITUDES),
            (e4m3_encode, e4m3_decode, E4M3_MAGNITUDES),
        ],
    )
    @given(st.floats(-500, 500))
    def test_no_code_is_nearer(self, encode_, decode, magnitudes, value: float) -> None:  # type: ignore[no-untyped-def]
        kept = min(abs(value), magnitudes[-1])
        error = abs(abs(decode(encode_(np.array(value)))) - kept)
        assert error == np.abs(magnitudes - kept).min()

    def test_what_rounds_to_zero_keeps_its_sign(self) -> None:
        tiny = np.array([-1e-9, 1e-9, -0.0])
        assert e2m1_encode(tiny).tolist() == [8, 0, 0]
        assert e4m3_encode(tiny).tolist() == [128, 0, 128]

    def test_every_e8m0_byte_is_a_power_of_two(self) -> None:
        values = e8m0_decode(BYTES)
        assert (values[0], values[127], values[254]) == (2.0**-127, 1.0, 2.0**127)
        assert np.isnan(values[255])
        assert np.array_equal(e8m0_ceil(values[:255]), values[:255])

    @given(st.floats(1e-30, 1e30))
    def test_the_power_of_two_is_the_next_one(self, scale: float) -> None:
        power = float(e8m0_ceil(np.array(scale)))
        assert power / 2 < scale <= power


class TestPacking:
    def test_the_low_nibble_comes_first(self) -> None:
        assert pack(np.array([1, 2, 15, 0], np.uint8)).tolist() == [0x21, 0x0F]

    def test_every_byte_comes_back(self) -> None:
        assert np.array_equal(pack(unpack(BYTES)), BYTES)


class TestCodec:
    def test_the_largest_weight_uses_all_of_the_range(self) -> None:
        weight = _weight()
        made = encode(weight)
        assert float(made.global_scale) * np.abs(weight).max() == pytest.approx(448 * 6, rel=1e-6)
        assert made.scales.max() == 0x7E

    def test_a_group_of_zeros_stays_zero(self) -> None:
        weight = _weight()
        weight[:, :GROUP] = 0
        made = encode(weight)
        assert not made.values()[:, :GROUP].any()
        assert not np.isnan(made.values()).any()
        assert set(made.scales[:, 0]) == {0x20}  # the tools' epsilon, 0.125

    def test_zeros_alone_have_the_fallback_of_the_tools(self) -> None:
        made = encode(np.zeros((2, 32), np.float32))
        assert made.global_scale == 1
        assert not made.values().any()

    def test_representable_weights_come_back_exactly(self) -> None:
        weight = np.tile(e2m1_decode(np.r_[1:8, 9:16, 7, 15].astype(np.uint8)), (4, 3))
        assert np.array_equal(encode(weight, np.float32(448)).values(), weight)

    def test_two_weights_share_one_scale(self) -> None:
        low, high = _weight(1), _weight(2) * 8
        assert global_scale_of(low, high) == global_scale_of(high)

    @given(
        st.integers(0, 2**32 - 1),
        st.floats(-30, 30),
        st.sampled_from(["normal", "heavy", "sparse", "one"]),
    )
    def test_no_element_is_beyond_its_bound(self, seed: int, power: float, kind: str) -> None:
        generator = np.random.default_rng(seed)
        weight = generator.standard_normal((4, 64))
        if kind == "heavy":
            weight **= 5
        elif kind == "sparse":
            weight *= generator.random(weight.shape) < 0.1
        elif kind == "one":
            weight[:] = 0
            weight[1, 5] = 1
        weight = (weight * 2.0**power).astype(np.float32)
        scale = global_scale_of(weight)
        assert (np.abs(encode(weight).values() - weight) <= bound(weight, scale)).all()

    @pytest.mark.parametrize("size", [0.3, 0.6, 0.9, 0.999, 1.001, 1.5, 3.0])
    def test_a_group_whose_scale_rounds_to_zero_is_within_it(self, size: float) -> None:
        """Below half of E4M3's smallest number the scale is zero, and so is every weight."""
        weight = _weight()
        scale = global_scale_of(weight)
        weight[0, :GROUP] = np.sign(weight[0, :GROUP]) * size * 2.0**-10 * 6 / scale
        made = encode(weight, scale)
        assert made.values()[0, :GROUP].any() == (size > 1)
        assert (np.abs(made.values() - weight) <= bound(weight, scale)).all()

    def test_the_bound_is_not_loose(self) -> None:
        """Some element of a usual weight comes near to it."""
        weight = _weight(rows=64)
        ratio = np.abs(encode(weight).values() - weight) / bound(weight, global_scale_of(weight))
        assert 0.9 < ratio.max() <= 1


def _swapped_nibbles(made: Nvfp4) -> Nvfp4:
    swapped = (made.packed << np.uint8(4)) | (made.packed >> np.uint8(4))
    return Nvfp4(packed=swapped, scales=made.scales, global_scale=made.global_scale)


def _inverted_global_scale(made: Nvfp4) -> Nvfp4:
    inverse = np.float32(1) / made.global_scale
    return Nvfp4(packed=made.packed, scales=made.scales, global_scale=inverse)


def _dropped_block_scale(made: Nvfp4) -> Nvfp4:
    scales = np.full_like(made.scales, 0x38)
    return Nvfp4(packed=made.packed, scales=scales, global_scale=made.global_scale)


def _one_scale_a_step_off(made: Nvfp4) -> Nvfp4:
    scales = made.scales.copy()
    scales[3, 2] += 2
    return Nvfp4(packed=made.packed, scales=scales, global_scale=made.global_scale)


def _shifted_scales(made: Nvfp4) -> Nvfp4:
    scales = np.roll(made.scales, 1, axis=-1)
    return Nvfp4(packed=made.packed, scales=scales, global_scale=made.global_scale)


def _one_sign(made: Nvfp4) -> Nvfp4:
    packed = made.packed.copy()
    packed[0, np.argmax(packed[0] & 7 > 3)] ^= 8
    return Nvfp4(packed=packed, scales=made.scales, global_scale=made.global_scale)


FAULTS = [
    _swapped_nibbles, _inverted_global_scale, _dropped_block_scale, _one_scale_a_step_off,
    _shifted_scales, _one_sign,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
@pytest.mark.parametrize("seed", range(4))
def test_the_bound_sees_each_fault(fault, seed: int) -> None:  # type: ignore[no-untyped-def]
    weight = _weight(seed)
    limit = bound(weight, global_scale_of(weight))
    made = encode(weight)
    assert (np.abs(made.values() - weight) <= limit).all()
    assert (np.abs(fault(made).values() - weight) > limit).any()


def test_the_bound_sees_a_shard_under_its_neighbours_global_scale() -> None:
    """w3 quantized with a scale of its own, read with w1's: what vLLM does with such a pair."""
    gate, up = _weight(1), _weight(2) * 4
    shared = global_scale_of(gate, up)
    own = encode(up)
    read = Nvfp4(packed=own.packed, scales=own.scales, global_scale=encode(gate).global_scale)
    assert (np.abs(encode(up, shared).values() - up) <= bound(up, shared)).all()
    assert (np.abs(read.values() - up) > bound(up, shared)).any()
