"""Dense NVFP4 layers: shared experts, which one of the artifacts has in NVFP4.

Marlin keeps activations in bfloat16; the kernels that vLLM takes from sm_100 on quantize them with
the checkpoint's global scale. The bound is that of ``numerics/nvfp4_moe.py``, for one expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.gpu.numerics.layers import nvfp4_linear, random_rows, run_linear
from tests.gpu.reference import nvfp4_activations, planted
from tests.gpu.reference import nvfp4_moe_cells as cells
from tests.gpu.reference.marlin_reference import Sums
from tests.gpu.reference.marlin_reference import margin as worst
from tests.gpu.reference.nvfp4_moe import products

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tests.gpu.conftest import Margin, Record
    from tests.gpu.reference.marlin_weights import Weights

pytestmark = [pytest.mark.gpu, pytest.mark.tier("kernel"), pytest.mark.value(9, 3)]

# (K, N) of a rank at tensor parallel 4; and a size that no large tile divides.
SHAPES = {"gate_up": (4096, 1024), "down": (512, 4096), "tail": (192, 384)}
SIZE = 2.0**-9  # of the multiplier: a power of two is exact in every dtype
DIVISOR = 256.0


def weights_of(shape: tuple[int, int]) -> Weights:
    return cells.weights(np.random.default_rng(shape[0]), (1, *shape), SIZE, spread=False)


def reference(layer: Any, weights: Weights, rows: NDArray[np.float64]) -> Sums:
    low = high = rows
    if "Marlin" not in type(layer.scheme.kernel).__name__:
        low, high = nvfp4_activations.spans(rows, rows, DIVISOR)
    return products(weights, np.zeros(len(rows), int), Sums.between(low, high))


@pytest.mark.parametrize("name", SHAPES)
def test_products_are_within_the_bound(margin: Margin, name: str) -> None:
    weights = weights_of(SHAPES[name])
    layer = nvfp4_linear(weights, DIVISOR)
    for tokens in (1, 9, 100):
        rows = random_rows(tokens, weights.size_k)
        margin(f"{tokens} rows", worst(run_linear(layer, rows), reference(layer, weights, rows)), 1)


@pytest.mark.parametrize("name", ["down", "tail"])
def test_every_weight_is_read(margin: Margin, name: str) -> None:
    weights = weights_of(SHAPES[name])
    layer, rows = nvfp4_linear(weights, DIVISOR), np.eye(weights.size_k) * cells.READ_VALUE
    margin("weights", worst(run_linear(layer, rows), reference(layer, weights, rows)), 1)


@pytest.mark.parametrize(
    "fault", [planted.InWeights.ONE_SCALE, planted.InWeights.TRANSPOSED_SCALES]
)
def test_a_fault_in_the_weight_is_noticed(record: Record, fault: planted.InWeights) -> None:
    right = weights_of(SHAPES["tail"])
    rows, rng = np.eye(right.size_k) * cells.READ_VALUE, np.random.default_rng(3)
    expected = reference(nvfp4_linear(right, DIVISOR), right, rows)
    noticed = []
    for _ in range(planted.PLACES):
        broken = nvfp4_linear(planted.in_weights(fault, right, rng), DIVISOR)
        noticed.append(worst(run_linear(broken, rows), expected) > 1)
    planted.require_noticed(record, fault.name, noticed)


@pytest.mark.parametrize("fault", planted.InResult)
def test_a_fault_in_the_result_is_noticed(record: Record, fault: planted.InResult) -> None:
    weights = weights_of(SHAPES["down"])
    layer, rows = nvfp4_linear(weights, DIVISOR), random_rows(9, weights.size_k)
    results = run_linear(layer, rows), run_linear(layer, rows[::-1].copy())
    planted.require_result_noticed(record, fault, results, reference(layer, weights, rows), 4)
