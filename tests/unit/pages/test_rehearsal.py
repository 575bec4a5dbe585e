"""The page of rehearsals: what was foretold beside what valid receipts of the tier measured."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_forge.host.files import GIB
from vllm_forge.pages import rehearsal
from vllm_forge.project import Project
from vllm_forge.receipts.errors import ReceiptUnreadableError
from vllm_forge.receipts.verification import Receipts
from vllm_forge.serve.memory import Group, KvPool, Memory

SERVED = {"preset": "h200-mtp", "rehearsal": "flash-nvfp4-fp8-mtp"}
START = {"weights_gib": [92.58], "kv_cache_gib": [21.0], "concurrency": [2.0], "ready_s": 301.5}
MEMORY = Memory(
    total=100 * GIB, utilization=0.9, weights=50 * GIB, max_model_len=10, limit=10,
    pool=KvPool(
        block_bytes=GIB, stored_bytes=GIB, in_flight=0,
        groups=(Group(tokens=1, window=None, count=1, share=Fraction(1)),),
    ),
)  # fmt: skip


def receipt(tier: str, *rows: dict[str, Any]) -> Any:
    tests = {str(at): SimpleNamespace(facts=facts) for at, facts in enumerate(rows)}
    detail = SimpleNamespace(sku="h200", line="0.26", tier=tier, tests=tests)
    statement = SimpleNamespace(detail=detail)
    return SimpleNamespace(statement=statement, path=Path("receipt.json"), signed_by=())


def page(root: Path, monkeypatch: pytest.MonkeyPatch, *receipts: Any) -> str:
    monkeypatch.setattr(rehearsal, "read_receipts", lambda _: Receipts(valid=receipts))
    return rehearsal.rehearsals(Project(root))


def test_measured_values_are_compared(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = {"together": 4, "tokens_per_s": 77.5}
    compiled = {"compiled": {"triton": 3, "vllm": 4}}
    rows = (SERVED | speed, SERVED | START | compiled)
    text = page(root, monkeypatch, receipt("soak", {}), receipt("rehearsal", *rows))
    place = "| h200 | 0.26 | h200-mtp | flash-nvfp4-fp8-mtp |"
    assert text.count(place) == 4
    assert f"{place} weights, GiB | 84.16 | 92.58 | +10.0% |" in text
    assert text.endswith("| receipt | vouched for |\n|---|---|\n| receipt.json | unsigned |")
    last = next(line for line in text.splitlines() if line.startswith(f"{place} 301.5"))
    assert last.split(" | ")[-4:] == ["unknown", "77.5", "unknown", "7 |"]


def test_without_a_receipt_nothing_is_measured(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = page(root, monkeypatch, receipt("soak", SERVED)).splitlines()[2:]
    assert {row.split(" | ")[6] for row in rows} == {"not run"}
    assert any(row.startswith("| h200 | 0.26 | h200-plain | flash-nvfp4") for row in rows)
    # Nobody recorded how many shards it has, so that it cannot be rehearsed.
    assert not any("redhat" in row for row in rows)


def test_memory_is_compared_part_by_part() -> None:
    start = {"weights_gib": [55.0], "kv_cache_gib": [24.0], "concurrency": [2.0]}
    facts = rehearsal.Facts.model_validate(SERVED | start)
    assert [row[1:] for row in rehearsal.compare(MEMORY, [facts])] == [
        ["50.00", "55.00", "+10.0%"], ["2.40", "2.00", "-16.7%"], ["30.00", "11.00", ""],
    ]  # fmt: skip
    before = list(rehearsal.compare(MEMORY, []))[1]
    assert before[1:] == ["4.00", "not run", ""]  # of the 40 GiB beside the weights
    assert [row[1:] for row in rehearsal.compare(None, [])] == [["unknown", "not run", ""]] * 3


@pytest.mark.parametrize(
    "facts", [{}, SERVED | {"weights_gib": ["<b>"]}, SERVED | {"ready_s": "soon"}], ids=str
)
def test_facts_of_no_test_are_refused(
    facts: dict[str, Any], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ReceiptUnreadableError, match="invalid facts of 0"):
        page(root, monkeypatch, receipt("rehearsal", facts))
