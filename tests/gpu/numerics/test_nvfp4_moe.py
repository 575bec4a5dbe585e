"""NVFP4 experts through vLLM's own layer: right by a bound that planted faults exceed.

What is run is what serves: the scheme that compressed-tensors finds, the backend that the oracle
selects on this GPU, the weights in that kernel's layout, the modular kernel. The bound is that of
``numerics/nvfp4_moe.py``. Which backend a SKU has: docs/generated/selection.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.gpu.numerics.conftest import each_backend
from tests.gpu.numerics.layers import launch
from tests.gpu.numerics.selected import quantizes
from tests.gpu.reference import nvfp4_moe_cells as cells
from tests.gpu.reference import planted
from tests.gpu.reference.marlin_reference import margin as worst
from tests.gpu.reference.nvfp4_moe import expected
from tests.gpu.reference.swiglu import exceeds

if TYPE_CHECKING:
    from tests.gpu.conftest import Margin, Record
    from tests.gpu.reference.marlin_reference import Sums
    from tests.gpu.reference.nvfp4_moe_cells import Cell

pytestmark = [pytest.mark.gpu, pytest.mark.tier("kernel")]


# (hidden, intermediate); the second divides by none of the larger tiles along K.
READ = ((512, 256), (768, 192))
FAULTY = {"experts": 4, "hidden": 512, "intermediate": 256}


def reference(cell: Cell) -> Sums:
    return expected(cell.experts, cell.rows, cell.experts_of, cell.router)


@each_backend
@pytest.mark.value(10, 3)
@pytest.mark.parametrize("routed", ["even", "hot"])
@pytest.mark.parametrize("tokens", [1, 9, 257])
def test_sums_are_within_the_bound(margin: Margin, backend: str, routed: str, tokens: int) -> None:
    """Gates and ups beyond the clamp; "hot": one expert has every token, half of them have none."""
    cell = cells.dense(
        experts=8, hidden=1024, intermediate=512, tokens=tokens, top_k=2, routed=routed,
        quantized=quantizes(backend), seed=tokens,
    )  # fmt: skip
    assert exceeds(cells.both_branches(cell), cells.LIMIT)
    margin("error", worst(launch(cell, backend), reference(cell)), 1)


@each_backend
@pytest.mark.value(10, 6)
def test_as_served_at_tensor_parallel_4(margin: Margin, backend: str) -> None:
    cell = cells.dense(
        experts=8, hidden=4096, intermediate=512, tokens=8, top_k=6, routed="even",
        quantized=quantizes(backend),
    )  # fmt: skip
    margin("error", worst(launch(cell, backend), reference(cell)), 1)


@each_backend
@pytest.mark.value(10, 4)
@pytest.mark.parametrize(("hidden", "intermediate"), READ)
def test_every_weight_is_read(margin: Margin, backend: str, hidden: int, intermediate: int) -> None:
    for name, build in (("gate_up", cells.read_gate_up), ("down", cells.read_down)):
        cell = build(
            experts=2, hidden=hidden, intermediate=intermediate, quantized=quantizes(backend)
        )
        margin(name, worst(launch(cell, backend), reference(cell)), 1)


@each_backend
@pytest.mark.value(10, 6)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_make_up_the_whole(margin: Margin, backend: str, ranks: int) -> None:
    """The ranks' results add up to the same for each TP size: within their bounds' sum."""
    cell = cells.dense(
        experts=4, hidden=1024, intermediate=1024, tokens=9, top_k=2, routed="even",
        quantized=quantizes(backend),
    )  # fmt: skip
    total, slack, middle = (np.zeros_like(cell.rows) for _ in range(3))
    for rank in range(ranks):
        part = replace(cell, experts=cell.experts.shard(rank, ranks))
        total += launch(part, backend)
        of_rank = reference(part)
        slack += of_rank.bound
        middle += of_rank.exact
    whole = reference(cell)
    margin("sum of shards", float((np.abs(total - middle) / slack).max()), 1)
    margin(
        "against the whole", float((np.abs(total - whole.exact) / (slack + whole.bound)).max()), 1
    )


# --- the bound kills planted faults, on the real kernel -------------------------------------------


@each_backend
@pytest.mark.value(8, 3)
@pytest.mark.parametrize(
    ("fault", "part"), cells.FAULTS, ids=lambda value: getattr(value, "name", value)
)
def test_a_fault_in_the_weights_is_noticed(
    record: Record, backend: str, fault: planted.InWeights, part: str
) -> None:
    build = cells.read_gate_up if part == "gate_up" else cells.read_down
    cell, rng = build(**FAULTY, quantized=quantizes(backend)), np.random.default_rng(7)
    right, noticed = reference(cell), []
    for _ in range(planted.PLACES):
        broken = planted.in_weights(fault, getattr(cell.experts, part), rng)
        faulty = replace(cell, experts=replace(cell.experts, **dict[str, Any]({part: broken})))
        noticed.append(worst(launch(faulty, backend), right) > 1)
    planted.require_noticed(record, fault.name, noticed, backend=backend, part=part)


@each_backend
@pytest.mark.value(8, 3)
def test_a_lost_clamp_is_noticed(record: Record, backend: str) -> None:
    """A limit that nothing reaches: another than None, so that no other backend is selected."""
    cell = cells.dense(
        experts=4, hidden=512, intermediate=256, tokens=24, top_k=2, routed="even",
        quantized=quantizes(backend),
    )  # fmt: skip
    right = reference(cell)
    assert worst(launch(cell, backend), right) <= 1
    lost = replace(cell, experts=replace(cell.experts, limit=1e6))
    noticed = [worst(launch(lost, backend), right) > 1]
    planted.require_noticed(record, "clamp lost", noticed, backend=backend)


@each_backend
@pytest.mark.value(8, 3)
@pytest.mark.parametrize("fault", planted.InResult)
def test_a_fault_in_the_result_is_noticed(
    record: Record, backend: str, fault: planted.InResult
) -> None:
    first, other = (
        cells.dense(
            experts=4, hidden=512, intermediate=256, tokens=24, top_k=2, routed="even",
            quantized=quantizes(backend), seed=seed,
        )
        for seed in (1, 2)
    )  # fmt: skip
    results = launch(first, backend), launch(other, backend)
    planted.require_result_noticed(record, fault, results, reference(first), 9, backend=backend)
