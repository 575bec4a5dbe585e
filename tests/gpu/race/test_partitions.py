"""The same sums, cut at other places by other grids and tiles, agree within their bound."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu.race import cells
from tests.gpu.reference.marlin_kernel import SMALL_BATCH
from tests.gpu.reference.marlin_weights import FORMATS, WeightFormat

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gpu.conftest import Record
    from tests.gpu.race.cells import Cell

pytestmark = [pytest.mark.gpu, pytest.mark.tier("kernel")]

LEAST = 6  # partitions that the op must take of the twelve; the rest have too little shared memory


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("cell", [*cells.CORE, cells.DEEP], ids=lambda cell: cell.name)
def test_every_partition_is_within_the_bound(
    op: Callable[..., Any], record: Record, cell: Cell, form: WeightFormat
) -> None:
    from tests.gpu.race.case import Options, shared_case, wait

    case = shared_case(cell, form, op)
    margins: dict[str, float] = {}
    refused = []
    for config, per_sm in itertools.product(SMALL_BATCH, (1, 2, 3, 4)):
        name = f"{config.k}x{config.n}/{per_sm}"
        out = case.new_output()
        try:
            case.launch(0, out=out, options=Options(config=config, blocks_per_sm=per_sm))
        except RuntimeError as error:
            assert "Invalid thread config" in str(error), error
            refused.append(name)
            continue
        wait()
        margins[name] = case.margin(out, 0)
        assert not case.workspace.any(), f"{name}: a lock was left"
    record(
        kind="partitions",
        cell=cell.name,
        format=form.name,
        margins=margins,
        refused=refused,
        margin=max(margins.values()),
        launches=len(margins),
    )
    assert len(margins) >= LEAST, f"refused: {refused}"
    assert max(margins.values()) <= 1, margins
