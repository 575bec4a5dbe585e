"""Launches that must repeat bit for bit, and the check of them; soak makes more of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.gpu.race import cells
from tests.gpu.reference.power import excluded, exclusion

if TYPE_CHECKING:
    from tests.gpu.conftest import Record
    from tests.gpu.race.cells import Cell
    from tests.gpu.race.conftest import Bench
    from tests.gpu.race.repeat import Counts
    from tests.gpu.reference.marlin_weights import WeightFormat

MODES = ("EAGER", "GRAPH", "GRAPH_L2", "GRAPH_NOISE")
RUNS = [
    *((cell, mode) for cell in cells.CORE for mode in MODES),
    *((cell, "GRAPH_NOISE") for cell in cells.MORE),
    (cells.CORE[1], "GRAPH_CHURN"),
]
IDS = [f"{cell.name}-{mode.lower()}" for cell, mode in RUNS]


def fields(cell: Cell, form: WeightFormat, mode: str, counts: Counts) -> dict[str, Any]:
    """Of a test's row of results."""
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


def check_repeats(bench: Bench, record: Record, cell: Cell, mode: str, form: WeightFormat) -> None:
    """Assert that a cell's first results are within their bounds, and that all others are equal."""
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
