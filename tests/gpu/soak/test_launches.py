"""The nightly gate: ten million launches of the Marlin MoE kernel, every one with the same bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gpu.race.bitwise import IDS, RUNS, check_repeats
from tests.gpu.reference.marlin_weights import FORMATS, WeightFormat

if TYPE_CHECKING:
    from tests.gpu.conftest import Record
    from tests.gpu.race.cells import Cell
    from tests.gpu.race.conftest import Bench

pytestmark = [pytest.mark.gpu, pytest.mark.tier("soak"), pytest.mark.value(10, 10)]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize(("cell", "mode"), RUNS, ids=IDS)
def test_bits_repeat_ten_million_times(
    bench: Bench, record: Record, cell: Cell, mode: str, form: WeightFormat
) -> None:
    check_repeats(bench, record, cell, mode, form)
