"""FP8 linear layers with block scales, through vLLM's own layer, activations quantized on the way.

On Hopper vLLM takes FlashInfer's kernel below 32 rows and DeepGEMM's from there on; the first
quantizes with float32 scales, the second with powers of two. On Blackwell it is DeepGEMM's alone.
Weights have float32 scales, as in the card; at load they become powers of two where DeepGEMM is
used with E8M0, on Hopper too. The bound is that of ``numerics/fp8_linear.py``.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.gpu.numerics.layers import (
    accumulator,
    capability,
    codes,
    fp8_weight,
    linear,
    random_rows,
    run_linear,
)
from tests.gpu.numerics.selected import LINEAR
from tests.gpu.reference import planted
from tests.gpu.reference.fp8_linear import known, one_of_each_block, products
from tests.gpu.reference.marlin_reference import margin as worst
from vllm_forge.checkpoints.codecs import fp8_block

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tests.gpu.conftest import Margin, Record
    from tests.gpu.reference.marlin_reference import Sums
    from vllm_forge.checkpoints.codecs.fp8_block import Fp8Block

pytestmark = [pytest.mark.gpu, pytest.mark.tier("kernel")]

FLASHINFER = LINEAR["sm_90"]
FEW = 32  # rows from which on Hopper takes DeepGEMM's kernel
# A rank's layers at tensor parallel 4: output, input.
SHAPES = {"fused_wqa_wkv": (1536, 4096), "wq_b": (8192, 1024), "wo_b": (4096, 2048)}
SMALL = (512, 1024)  # where faults are planted
# Kernels are compiled with their first launch, which may take longer than all the rest.
SIZES = pytest.mark.parametrize(
    "tokens",
    [
        pytest.param((1, 8, 31), id="few", marks=pytest.mark.value(8, 10)),
        pytest.param((100,), id="many", marks=pytest.mark.value(8, 10)),
    ],
)


@cache
def weight_of(shape: tuple[int, int]) -> Fp8Block:
    """Under float32 scales."""
    return fp8_weight(shape, shape[0], 32)


@cache
def layer_of(name: str, shape: tuple[int, int]) -> Any:
    return linear(weight_of(shape), name=name)


def kernel_of(layer: Any) -> Any:
    """The kernel that vLLM selected."""
    return layer.scheme.fp8_linear


def uses_e8m0(layer: Any) -> bool:
    """Whether weights and, in DeepGEMM's kernel, activations are under powers of two."""
    kernel = kernel_of(layer)
    return bool(getattr(kernel, "fallback", kernel).use_deep_gemm_e8m0)


def as_loaded(weight: Fp8Block, layer: Any) -> Fp8Block:
    """The weight that the kernel has, from the one in the checkpoint."""
    return fp8_block.encode(weight.values(), powers_of_two=True) if uses_e8m0(layer) else weight


def reference(layer: Any, weight: Fp8Block, rows: NDArray[np.float64]) -> Sums:
    small = type(kernel_of(layer)).__name__ == FLASHINFER and len(rows) < FEW
    quantized = known(rows, powers_of_two=uses_e8m0(layer) and not small)
    return products(quantized, as_loaded(weight, layer).values(), accumulator())


@pytest.mark.value(10, 5)
def test_the_kernel_is_the_one_that_the_oracle_found() -> None:
    """docs/generated/selection.md has it for each SKU."""
    major, minor = capability()
    kernel = type(kernel_of(layer_of("wq_b", SHAPES["wq_b"]))).__name__
    assert kernel == LINEAR[f"sm_{major}{minor}"]


@pytest.mark.value(10, 5)
def test_weights_are_loaded_bit_for_bit() -> None:
    """Under other scales than in the checkpoint, if the kernel wants powers of two."""
    layer, weight = layer_of("wq_b", SHAPES["wq_b"]), weight_of(SHAPES["wq_b"])
    assert np.array_equal(codes(layer.weight), as_loaded(weight, layer).codes)


@SIZES
@pytest.mark.parametrize("name", SHAPES)
def test_products_are_within_the_bound(margin: Margin, name: str, tokens: tuple[int, ...]) -> None:
    layer, weight = layer_of(name, SHAPES[name]), weight_of(SHAPES[name])
    for count in tokens:
        rows = random_rows(count, SHAPES[name][1])
        margin(f"{count} rows", worst(run_linear(layer, rows), reference(layer, weight, rows)), 1)


@pytest.mark.value(8, 10)
def test_every_weight_is_read(margin: Margin) -> None:
    layer, weight = layer_of("wo_b", SMALL), weight_of(SMALL)
    rows = np.eye(SMALL[1])
    margin("weights", worst(run_linear(layer, rows), reference(layer, weight, rows)), 1)


@SIZES
@pytest.mark.parametrize(
    "fault",
    [planted.InBlocks.ONE_SCALE, planted.InBlocks.TRANSPOSED_SCALES, planted.InBlocks.SWAPPED_ROWS],
)
def test_a_fault_in_the_weight_is_noticed(
    record: Record, fault: planted.InBlocks, tokens: tuple[int, ...]
) -> None:
    """By one row per block, and as many again for the kernel that wants more rows."""
    right, rows = weight_of(SMALL), one_of_each_block(SMALL[1])
    rows = np.tile(rows, (FEW // len(rows), 1)) if tokens[0] >= FEW else rows
    expected = reference(layer_of("wo_b", SMALL), right, rows)
    assert worst(run_linear(layer_of("wo_b", SMALL), rows), expected) <= 1
    rng, noticed = np.random.default_rng(11), []
    for _ in range(planted.PLACES):
        broken = linear(planted.in_blocks(fault, right, rng), name="wo_b")
        noticed.append(worst(run_linear(broken, rows), expected) > 1)
    planted.require_noticed(record, fault.name, noticed, rows=len(rows))


@SIZES
@pytest.mark.parametrize("fault", planted.InResult)
def test_a_fault_in_the_result_is_noticed(
    record: Record, fault: planted.InResult, tokens: tuple[int, ...]
) -> None:
    layer, weight = layer_of("wo_b", SMALL), weight_of(SMALL)
    rows = random_rows(tokens[0], SMALL[1])
    results = run_linear(layer, rows), run_linear(layer, -rows[:, ::-1].copy())
    expected = reference(layer, weight, rows)
    planted.require_result_noticed(record, fault, results, expected, 13, rows=len(rows))
