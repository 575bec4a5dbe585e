"""Partial products of ranks, each on its GPU, add up to the layer of one rank; no fault does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gpu.conftest import PARALLEL, Margin, Record
from tests.gpu.harness.device import ranks
from tests.gpu.numerics.conftest import each_backend
from tests.gpu.reference.marlin_reference import Sums
from tests.gpu.reference.marlin_reference import margin as share
from tests.gpu.reference.nvfp4_moe import expected
from tests.gpu.tensor_parallel.shards import CELLS, Fault, cell_of, due

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    Read = Callable[[str], dict[str, NDArray[np.float64]]]

pytestmark = [pytest.mark.gpu, PARALLEL, pytest.mark.xdist_group("shards")]


@each_backend
@pytest.mark.value(10, 10)
@pytest.mark.parametrize("routed", CELLS)
def test_ranks_add_up_to_one_rank(routed: str, backend: str, sums: Read, margin: Margin) -> None:
    found, cell = sums(backend), cell_of(routed, backend)
    total, alone = found[f"{routed}-NONE"], found[f"{routed}-whole"]
    right = due(routed, backend, ranks())
    one = expected(cell.experts, cell.rows, cell.experts_of, cell.router)
    margin("sum of ranks", share(total, right), 1)
    margin("one rank", share(alone, one), 1)
    margin("apart", share(total - alone, Sums(exact=0 * total, bound=right.bound + one.bound)), 1)


@each_backend
@pytest.mark.value(10, 10)
@pytest.mark.parametrize("routed", CELLS)
@pytest.mark.parametrize("fault", [fault for fault in Fault if fault is not Fault.NONE])
def test_a_fault_of_a_rank_is_found(
    fault: Fault, routed: str, backend: str, sums: Read, record: Record
) -> None:
    found = share(sums(backend)[f"{routed}-{fault.name}"], due(routed, backend, ranks()))
    record(share_of_bound=found)
    assert found > 1
