"""Plans, commands, findings and verdicts are those of the golden files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.golden.cases import KINDS, read
from tests.golden.compare import summary

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("kind", KINDS)
def test_outcomes_equal_the_golden_file(kind: str, tmp_path: Path) -> None:
    changed = summary(read(kind), KINDS[kind](tmp_path.resolve()))
    assert not changed, (
        f"{kind} changed:\n{changed}\n"
        f"if this is meant, give the reason and run: python -m tests.golden.record {kind}"
    )
