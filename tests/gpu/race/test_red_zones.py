"""The kernel writes nothing outside its buffers and reads nothing that was not written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gpu.race.experiments import OVERRUN, Tool, result

if TYPE_CHECKING:
    from tests.gpu.conftest import Record

pytestmark = [pytest.mark.gpu, pytest.mark.tier("kernel"), pytest.mark.xdist_group("experiments")]


def test_nothing_outside_any_buffer(record: Record) -> None:
    """All formats and cells, between red zones, in memory full of NaN; ``c_tmp`` included."""
    said = result("zones-wheel")
    row = said.row
    assert row, said.text[-3000:]
    # Of c_tmp: the last float written, the last that the model of the kernel knows of, its size.
    used = {f"{cell} {form}": [most, end, size] for cell, form, [*most], end, size in row["used"]}
    record(
        kind="red_zones",
        launches=row["launches"],
        bad=row["bad"],
        nan=row["nan"],
        margin=row["margin"],
        c_tmp=used,
    )
    assert row["launches"] > 50
    assert row["bad"] == 0, row["outside"]
    assert row["nan"] == 0
    assert row["margin"] <= 1
    for name, (most, end, size) in used.items():
        assert most, f"{name}: c_tmp was not found among the freed buffers"
        assert max(most) <= end < size, f"{name}: wrote to float {max(most)} of {size}"


def test_an_overrun_of_20480_bytes_is_seen_to_the_byte(record: Record) -> None:
    """Positive control: ``c_tmp`` is that much shorter than what the launch uses."""
    said = result("zones-short_c_tmp")
    row = said.row
    assert row, said.text[-3000:]
    seen = [Tool.RED_ZONES.value] if row["bad"] else []
    record(kind="control", fault="short_c_tmp", tools=[Tool.RED_ZONES.value], seen=seen)
    assert row["bad"] > 0
    for size, first, last in row["outside"]:
        assert first >= size, "written before a buffer"
        assert last - size < OVERRUN
    assert max(last - size for size, _, last in row["outside"]) == OVERRUN - 1
