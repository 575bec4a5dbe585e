"""The GPU race suite's own parts that need no GPU: cells, results of tools, the audit of SASS."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.harness.limits import COLD, DEADLINE, Limit, NotStartedError
from tests.gpu.race import cells, experiments, sass
from tests.gpu.race.experiments import (
    ANY_OF,
    CHECKED,
    CHECKS,
    CLEAN,
    CONTROLS,
    MUST,
    NOT_REQUIRED,
    SETS,
    Report,
    Said,
    Tool,
    reports,
    run_child,
    seen_by,
)
from tests.gpu.race.mutants import BY_NAME, MUTANTS, AnchorError, replace_once
from tests.gpu.reference.marlin_schedule import locks_used, schedule
from tests.gpu.reference.marlin_weights import FORMATS, NVFP4
from tests.support.marlin_host import faults

RACE = Path(cells.__file__).parent
SMS = (132, 148, 160, 188)
KNOWN = [
    cell for cell in (*cells.CORE, *cells.MORE, cells.ONE_TILE, cells.SANITIZED) if cell.config
]


# --- cells ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sms", SMS)
@pytest.mark.parametrize("cell", KNOWN, ids=lambda cell: cell.name)
def test_each_cell_splits_tiles_on_every_gpu(cell: cells.Cell, sms: int) -> None:
    for form in FORMATS:
        hit = cell.experts(form, sms)
        launch = cell.launch(form, sms, hit)
        assert cells.parts_of(launch) > 1, "a launch without a split tests no lock"
        assert cell.regime in {None, cells.regime_of(launch)}
        assert faults(launch, schedule(launch), workspace=4 * sms, c_tmp=10**9) == []


def test_all_regimes_are_launched() -> None:
    regimes = {cells.regime_of(c.launch(NVFP4, 132, c.experts(NVFP4, 132))) for c in KNOWN}
    assert regimes == {cells.Regime.SPLIT, cells.Regime.TWO_TILE, cells.Regime.REST}


@pytest.mark.parametrize("sms", SMS)
def test_two_launches_of_one_tile_fit_on_the_gpu_at_a_time(sms: int) -> None:
    """Else they follow each other, and what they do to a shared workspace is never seen."""
    launch = cells.ONE_TILE.launch(NVFP4, sms, 1)
    busy = sum(bool(parts) for parts in schedule(launch))
    assert 2 * busy <= sms
    assert locks_used(schedule(launch)) == 1
    assert cells.parts_of(launch) == 32


def test_a_regime_that_does_not_exist_is_said() -> None:
    cell = cells.Cell(name="small", size_n=128, size_k=4096, tokens=1, regime=cells.Regime.TWO_TILE)
    with pytest.raises(ValueError, match=r"small: .*no number of experts up to 1"):
        cell.experts(NVFP4, 132)


# --- controls -------------------------------------------------------------------------------------


def test_every_mutant_is_a_control_and_has_something_that_must_see_it() -> None:
    assert {control.build for control in CONTROLS.values()} - {None} == set(BY_NAME)
    for control in CONTROLS.values():
        assert control.clean != bool(control.must or control.any_of), control.name
    assert {*MUST, *ANY_OF, *CLEAN} == set(CONTROLS)
    assert {name for names in SETS.values() for name in names} == {"wheel", *BY_NAME}


def test_every_checker_has_a_fault_that_it_must_see() -> None:
    for checker in CHECKS:
        wanted = [name for name, tools in MUST.items() if Tool(checker) in tools]
        assert wanted, checker
        for name in wanted:
            assert checker in CHECKED[name if name in CHECKED else "builds"]


def test_what_a_checker_need_not_see_another_tool_must() -> None:
    for (name, tool), reason in NOT_REQUIRED.items():
        assert tool.value in CHECKED[name]
        assert MUST[name] - {tool}
        assert tool not in MUST[name]
        assert len(reason) > 30


def test_every_tool_has_a_control() -> None:
    must = {tool for control in CONTROLS.values() for tool in control.must}
    assert must | {Tool.BITWISE_ONE, Tool.PARTITION} == set(Tool)


def test_a_text_must_be_there_once() -> None:
    assert replace_once("abc", "b", "x", "f") == "axc"
    for text in ("ac", "abb"):
        with pytest.raises(AnchorError):
            replace_once(text, "b", "x", "f")


def test_no_mutant_is_another() -> None:
    edits = [repr(mutant.edits) for mutant in MUTANTS]
    assert len(set(edits)) == len(edits)


@pytest.mark.parametrize(
    ("row", "seen"),
    [
        ({}, set()),
        ({"differ": 1, "margin": 0.99}, {Tool.BITWISE}),
        ({"margin": 1e30, "nan": 2}, {Tool.REFERENCE, Tool.POISON}),
        ({"dirty": 1, "hung": True}, {Tool.WORKSPACE, Tool.WATCHDOG}),
        ({"differ_one_input": 3, "partition": 1.1}, {Tool.BITWISE_ONE, Tool.PARTITION}),
    ],
)
def test_what_a_row_sets_off(row: dict[str, object], seen: set[Tool]) -> None:
    assert seen_by(Said(row=row, code=0, seconds=1, text="")) == seen
    assert seen_by(Said(row=row, code=None, seconds=1, text="")) == seen | {Tool.WATCHDOG}


# --- processes ------------------------------------------------------------------------------------


def test_a_process_that_does_not_end_is_ended() -> None:
    prefix = ("bash", "-c", "echo '{\"a\": 1}'; sleep 60")
    said = run_child({}, limit=Limit(seconds=0.5), prefix=prefix)
    assert said.code is None
    assert said.hung
    assert said.row == {"a": 1}


def test_a_process_that_fails_says_why() -> None:
    prefix = ("bash", "-c", "echo '{broken'; echo no GPU; exit 3")
    said = run_child({}, limit=Limit(seconds=20), prefix=prefix)
    assert (said.code, said.row, said.hung) == (3, {}, False)
    assert "no GPU" in said.text


def test_an_experiment_without_time_is_undecided() -> None:
    limit = Limit(seconds=0.5, undecided="caches were cold")
    with pytest.raises(NotStartedError, match="caches were cold"):
        run_child({"do": "warm"}, limit=limit, prefix=("bash", "-c", "sleep 60"))


def test_the_sanitizer_waits_for_its_process_as_long_as_the_experiment_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: dict[str, tuple[str, list[str]]] = {}

    class Begun:
        def start(self, name: str, order: object, **given: Any) -> None:
            begun[name] = given.get("kind", "control"), list(given.get("prefix", ()))

    monkeypatch.setattr(experiments, "jobs", Begun)
    monkeypatch.setattr(experiments, "sanitizer", lambda: Path("/compute-sanitizer"))
    monkeypatch.setenv(COLD, "1")
    monkeypatch.setenv(DEADLINE, str(time.time() + 600))
    experiments.start_all()
    patience = {
        name: (kind, int(prefix[prefix.index("--launch-timeout") + 1]))
        for name, (kind, prefix) in begun.items()
        if prefix
    }
    kind, seconds = patience["initcheck-wheel"]
    assert kind == "sanitizer"
    assert seconds > 500
    # These hang on purpose: they must not take the whole budget.
    assert patience["synccheck-foreign_mask"] == ("broken build", 200)
    assert patience["synccheck-half_barrier"] == ("blind sanitizer", 60)


# --- compute-sanitizer ----------------------------------------------------------------------------

SAID = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 16 bytes
=========     at void marlin_short_c_tmp::Marlin<(long)11, (int)4>(const int4 *)+0x1230 in marlin_template.h:1775
=========     by thread (0,0,0) in block (95,0,0)
=========     Address 0x7f936fa001e8 is out of bounds
========= Invalid __global__ write of size 16 bytes
=========     at void marlin_short_c_tmp::Marlin<(long)11, (int)4>(const int4 *)+0x1230 in marlin_template.h:1775
=========     by thread (1,0,0) in block (95,0,0)
========= Program hit cudaErrorNotReady (error 600) due to "device not ready" on CUDA API call.
========= Error: Race reported between Read access at void marlin_clean::Marlin<(long)1>()+0x10 in marlin_template.h:1100
=========     and Write access at void marlin_clean::Marlin<(long)1>()+0x20 in /a/b/marlin_template.h:1528 [384 hazards]
=========
========= Uninitialized __global__ memory read of size 16 bytes
=========     at void marlin_moe_wna16::Marlin<(long)1>()+0x30
=========     by thread (1,0,0) in block (0,0,0)
========= Barrier error detected. Divergent thread(s) in block
=========     at _ZN19marlin_half_barrier6MarlinILl11EEvPK4int4+0x1
========= ERROR SUMMARY: 5 errors
"""  # noqa: E501


def test_reports_are_read_and_equal_ones_counted() -> None:
    assert reports(SAID) == [
        Report(kind="Barrier error detected", build="half_barrier", places=(), count=1),
        Report(
            kind="Invalid __global__ write of size",
            build="short_c_tmp",
            places=("marlin_template.h:1775",),
            count=2,
        ),
        Report(
            kind="Race reported between Read access",
            build="clean",
            places=("marlin_template.h:1100", "marlin_template.h:1528"),
            count=1,
        ),
        Report(kind="Uninitialized __global__ memory read", build="moe_wna16", places=(), count=1),
    ]
    assert reports("========= ERROR SUMMARY: 0 errors\n") == []


def test_the_baseline_has_reasons_and_no_report_of_a_missing_barrier() -> None:
    rows = json.loads((RACE / "sanitizer_baseline.json").read_text())
    assert rows
    copy = "marlin.cuh: asm volatile("
    for row in rows:
        assert row["tool"] in CHECKS
        assert len(row["reason"]) > 30
        assert not any(re.search(pattern, copy) for pattern in row["lines"])


# --- the audit ------------------------------------------------------------------------------------

RIGHT = """
        Function : _ZN12marlin_clean6MarlinILl1EEvPK4int4
        /*0000*/                   LDG.E.STRONG.GPU R1, desc[UR4][R2.64] ;
        /*0010*/                   CCTL.IVALL ;
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/               @P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   MEMBAR.ALL.GPU ;
        /*0070*/              @!P1 REDG.E.ADD.S32.STRONG.GPU desc[UR4][R2.64], R9 ;
        /*0080*/                   LDG.E.STRONG.GPU R1, desc[UR4][R2.64] ;
        /*0090*/                   CCTL.IVALL ;
        /*00a0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
"""


def audited(text: str) -> list[str]:
    (operations,) = sass.kernels(text).values()
    return sass.audit(operations)


def test_the_right_code_passes() -> None:
    assert audited(RIGHT) == []


@pytest.mark.parametrize(
    ("gone", "found"),
    [
        ("MEMBAR.ALL.GPU", "no fence before release"),
        ("REDG.E.ADD.S32.STRONG.GPU", "no release"),
        ("CCTL.IVALL", "data is loaded before the cache is invalidated"),
        ("LDG.E.STRONG.GPU", "0 loads with acquire, not 2"),
        ("BAR.SYNC.DEFER_BLOCKING", "no barrier before the fence"),
    ],
)
def test_what_is_gone_is_noticed(gone: str, found: str) -> None:
    left = "\n".join(line for line in RIGHT.splitlines() if gone not in line)
    assert found in audited(left)


def test_a_weaker_load_and_a_late_store_are_noticed() -> None:
    weak = RIGHT.replace("CCTL.IVALL ;\n        /*0020*/", "NOP ;\n        /*0020*/")
    assert "data is loaded before the cache is invalidated" in audited(weak)
    late = RIGHT.replace("/*0070*/", "/*0068*/ STG.E.128 desc[UR4][R2.64], R4 ;\n        /*0070*/")
    assert audited(late) == ["a store between fence and release"]
    nc = RIGHT.replace("@P0 LDG.E.128 R4", "@P0 LDG.E.128.CONSTANT R4")
    assert audited(nc) == ["a load of 128 bits that is not coherent"]
