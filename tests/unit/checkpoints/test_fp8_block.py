"""FP8 in blocks: the codec, blocks at the edge, powers of two, the bound and what it must see."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vllm_forge.checkpoints.codecs.fp8_block import (
    BLOCK,
    Fp8Block,
    block_maxima,
    bound,
    encode,
    spread,
)


def _weight(seed: int = 0, rows: int = 256, columns: int = 384) -> NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((rows, columns)) * 0.02
    # Blocks that differ: a misplaced scale must not go unseen.
    tall, wide = -(-rows // BLOCK), -(-columns // BLOCK)
    scales = 2.0 ** np.arange(tall * wide, dtype=np.float64).reshape(tall, wide)
    scaled: NDArray[np.float32] = (weight * spread(scales, weight.shape)).astype(np.float32)
    return scaled


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (200, 300), (256, 384)])
@pytest.mark.parametrize("powers", [False, True])
def test_no_element_is_beyond_its_bound(shape: tuple[int, int], powers: bool) -> None:
    weight = _weight(1, *shape)
    made = encode(weight, powers_of_two=powers)
    assert made.scales.shape == tuple(-(-extent // BLOCK) for extent in shape)
    limit = bound(weight, powers_of_two=powers)
    assert (np.abs(made.values() - weight) <= limit).all()


@given(st.integers(0, 2**32 - 1), st.floats(-30, 30))
def test_whatever_its_size(seed: int, power: float) -> None:
    weight = (_weight(seed, 130, 20) * 2.0**power).astype(np.float32)
    assert (np.abs(encode(weight).values() - weight) <= bound(weight)).all()


def test_every_block_uses_all_of_the_range() -> None:
    weight = _weight()
    made = encode(weight)
    for row in range(2):
        for column in range(3):
            block = made.codes[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
            assert (block & 0x7F).max() == 0x7E


def test_a_block_of_zeros_stays_zero() -> None:
    weight = _weight()
    weight[:128, 128:256] = 0
    made = encode(weight)
    assert made.scales[0, 1] == np.finfo(np.float32).eps
    assert not made.values()[:128, 128:256].any()


def test_powers_of_two_are_powers_of_two_and_never_smaller() -> None:
    weight = _weight()
    plain, powers = encode(weight).scales, encode(weight, powers_of_two=True).scales
    assert np.array_equal(np.frexp(powers)[0], np.full_like(powers, 0.5))
    assert (powers >= plain).all()
    assert (powers < 2 * plain).all()


def test_maxima_of_blocks_at_the_edge() -> None:
    weight = np.zeros((130, 129), np.float32)
    weight[129, 128] = -3
    assert block_maxima(weight).tolist() == [[0, 0], [0, 3]]


def _with_scales(made: Fp8Block, scales: NDArray[np.float32]) -> Fp8Block:
    return Fp8Block(codes=made.codes, scales=scales)


FAULTS = {
    "dropped-scales": lambda made: _with_scales(made, np.ones_like(made.scales)),
    "inverted-scales": lambda made: _with_scales(made, 1 / made.scales),
    "transposed-scales": lambda made: _with_scales(made, made.scales.T.reshape(made.scales.shape)),
    "shifted-scales": lambda made: _with_scales(made, np.roll(made.scales, 1, axis=1)),
    "one-scale-twice": lambda made: _with_scales(
        made, made.scales * np.where(np.arange(3) == 1, np.float32(2), np.float32(1))
    ),
    "rows-shifted": lambda made: Fp8Block(codes=np.roll(made.codes, 1, 0), scales=made.scales),
    "one-byte": lambda made: Fp8Block(
        codes=made.codes ^ np.where(np.arange(384) == 7, np.uint8(0x10), np.uint8(0)),
        scales=made.scales,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_bound_sees_each_fault(fault: str) -> None:
    weight = _weight(3)
    broken = FAULTS[fault](encode(weight))
    assert (np.abs(broken.values() - weight) > bound(weight)).any()
