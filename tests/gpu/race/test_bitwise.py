"""Concurrent decode corrupts nothing: every launch of the Marlin MoE kernel gives the same bits.

Routing is frozen. ``moe_align_block_size`` takes slots with ``atomicAdd``, so two calls of
``fused_marlin_moe`` may differ by right. Named for the symptom; Marlin is the parameter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu.race import cells
from vllm_forge.numerics.marlin_weights import FORMATS, NVFP4, W4A16, WeightFormat
from vllm_forge.numerics.power import excluded, exclusion

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gpu.race.cells import Cell
    from tests.gpu.race.conftest import Bench
    from tests.gpu.race.repeat import Counts

pytestmark = [pytest.mark.gpu, pytest.mark.tier("kernel")]

MODES = ("EAGER", "GRAPH", "GRAPH_L2", "GRAPH_NOISE")
RUNS = [
    *((cell, mode) for cell in cells.CORE for mode in MODES),
    *((cell, "GRAPH_NOISE") for cell in cells.MORE),
    (cells.CORE[1], "GRAPH_CHURN"),
]


def fields(cell: Cell, form: WeightFormat, mode: str, counts: Counts) -> dict[str, Any]:
    return {
        "kind": "bitwise",
        "cell": cell.name,
        "format": form.name,
        "mode": mode.lower(),
        "launches": counts.launches,
        "differ": counts.differ,
        "dirty": counts.dirty,
        "excluded_p": excluded(counts.launches),
    }


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize(("cell", "mode"), RUNS, ids=[f"{c.name}-{m.lower()}" for c, m in RUNS])
def test_bits_repeat_and_locks_are_given_back(
    bench: Bench, record: Callable[..., None], cell: Cell, mode: str, form: WeightFormat
) -> None:
    from tests.gpu.race.case import shared_case
    from tests.gpu.race.repeat import Mode, repeat

    case = shared_case(cell, form, bench.op)
    margins = [case.margin(case.launch(which, out=case.new_output()), which) for which in (0, 1)]
    counts = repeat(case, bench.tools, Mode[mode], bench.budget)
    record(**fields(cell, form, mode, counts), margin=max(margins), experts=case.hit)
    assert max(margins) <= 1, f"the first result is {max(margins):.2f} of its bound"
    assert counts.launches > 100
    assert counts.differ == 0, f"{counts.differ} of {counts.launches} results differ"
    assert counts.dirty == 0, f"a lock was left by {counts.dirty} of {counts.launches} launches"
    print(exclusion(counts.launches))


@pytest.mark.parametrize("cell", [cells.CORE[1], cells.ONE_TILE], ids=lambda cell: cell.name)
def test_two_launches_at_a_time_with_workspaces_of_their_own(
    bench: Bench, record: Callable[..., None], cell: Cell
) -> None:
    from tests.gpu.race.case import Case
    from tests.gpu.race.repeat import two_streams

    pair = [Case(cell, form, bench.op) for form in (NVFP4, W4A16)]
    counted = two_streams(pair, bench.tools, bench.budget, shared=False)
    total = counted[0] + counted[1]
    record(**fields(cell, NVFP4, "TWO_STREAMS", total) | {"format": "nvfp4 and w4a16"})
    assert total.launches > 100
    assert (total.differ, total.dirty) == (0, 0)
