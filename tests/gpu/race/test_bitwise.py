"""Concurrent decode corrupts nothing: every launch of the Marlin MoE kernel gives the same bits.

Routing is frozen. ``moe_align_block_size`` takes slots with ``atomicAdd``, so two calls of
``fused_marlin_moe`` may differ by right. Named for the symptom; Marlin is the parameter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gpu.race import cells
from tests.gpu.race.bitwise import IDS, RUNS, check_repeats, fields
from tests.gpu.reference.marlin_weights import FORMATS, NVFP4, W4A16, WeightFormat

if TYPE_CHECKING:
    from tests.gpu.conftest import Record
    from tests.gpu.race.cells import Cell
    from tests.gpu.race.conftest import Bench

pytestmark = [pytest.mark.gpu, pytest.mark.tier("kernel")]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize(("cell", "mode"), RUNS, ids=IDS)
def test_bits_repeat_and_locks_are_given_back(
    bench: Bench, record: Record, cell: Cell, mode: str, form: WeightFormat
) -> None:
    check_repeats(bench, record, cell, mode, form)


@pytest.mark.parametrize("cell", [cells.CORE[1], cells.ONE_TILE], ids=lambda cell: cell.name)
def test_two_launches_at_a_time_with_workspaces_of_their_own(
    bench: Bench, record: Record, cell: Cell
) -> None:
    from tests.gpu.race.case import Case
    from tests.gpu.race.repeat import two_streams

    pair = [Case(cell, form, bench.op) for form in (NVFP4, W4A16)]
    total = two_streams(pair, bench.tools, bench.budget, shared=False)
    record(**fields(cell, NVFP4, "TWO_STREAMS", total) | {"format": "nvfp4 and w4a16"})
    assert total.launches > 100
    assert (total.differ, total.dirty) == (0, 0)
