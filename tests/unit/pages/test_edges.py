"""The block of tier edges on the page of rehearsals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_forge.pages import rehearsal
from vllm_forge.project import Project
from vllm_forge.receipts.verification import Receipts

CLAIM = {"edge": "k 0", "foretold": "nothing", "measured": "refused: <b> a | b"}


def page(root: Path, monkeypatch: pytest.MonkeyPatch, *tiers: str) -> str:
    tests = {"a": SimpleNamespace(facts={"errors": 0}), "b": SimpleNamespace(facts=CLAIM)}
    receipts: list[Any] = []
    for tier in tiers:
        detail = SimpleNamespace(sku="h200", line="0.26", tier=tier, tests=tests)
        statement = SimpleNamespace(detail=detail)
        row = SimpleNamespace(statement=statement, path=Path(f"{tier}.json"), signed_by=())
        receipts.append(row)
    monkeypatch.setattr(rehearsal, "read_receipts", lambda _: Receipts(valid=tuple(receipts)))
    return rehearsal.edges(Project(root))


def test_claims_are_listed_with_both_sides(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = page(root, monkeypatch, "rehearsal", "edges").splitlines()
    assert r"| h200 | 0.26 | k 0 | nothing | refused: \<b\> a \| b |" in rows
    assert sum(row.startswith("| h200") for row in rows) == 1
    assert rows[-1] == "| edges.json | unsigned |"


def test_without_a_receipt_it_is_not_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert page(root, monkeypatch, "rehearsal").startswith("not run: 14 tests")
