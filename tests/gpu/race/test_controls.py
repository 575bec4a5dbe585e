"""Detectors prove themselves: each planted fault is seen, and without one nothing is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gpu.race.experiments import CONTROLS, Control, Tool, audited, result, seen_by

if TYPE_CHECKING:
    from tests.gpu.conftest import Record

pytestmark = [pytest.mark.gpu, pytest.mark.tier("kernel"), pytest.mark.xdist_group("experiments")]

AT_RUN_TIME = frozenset(
    {
        Tool.BITWISE_ONE, Tool.BITWISE, Tool.REFERENCE, Tool.PARTITION, Tool.WORKSPACE,
        Tool.POISON, Tool.WATCHDOG,
    }
)  # fmt: skip
ELSEWHERE = {Tool.RED_ZONES, Tool.MEMCHECK, Tool.INITCHECK, Tool.RACECHECK, Tool.SYNCCHECK}


@pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS)
def test_a_fault_is_seen(control: Control, record: Record) -> None:
    said = result(control.name)
    seen = seen_by(said)
    asked = set(AT_RUN_TIME)
    if control.order["do"] in {"micro", "streams", "dirty_workspace"}:
        asked -= {Tool.BITWISE_ONE, Tool.PARTITION}
    if control.build is not None:
        asked.add(Tool.AUDIT)
        assert control.build in audited(), f"no audit of {control.build}: no cuobjdump at its build"
        if audited()[control.build]:
            seen.add(Tool.AUDIT)
    row = {key: value for key, value in said.row.items() if key != "hung"}
    record(
        kind="control",
        fault=control.name,
        what=control.what,
        tools=sorted(tool.value for tool in asked),
        seen=sorted(tool.value for tool in seen),
        counts=row,
        took=round(said.seconds, 1),
        launches=row.get("launches", 0),
    )
    assert said.row or said.hung, f"exit {said.code}\n{said.text[-3000:]}"
    if control.clean:
        assert not seen, f"set off without a fault: {[tool.value for tool in seen]}"
        assert row["launches"] > 100
        return
    blind = (control.must - ELSEWHERE) - seen
    assert not blind, f"not seen by {[tool.value for tool in blind]}"
    if control.any_of:
        assert seen & control.any_of
