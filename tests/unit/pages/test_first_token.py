"""The table of starts is that of the measurements."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from vllm_forge.errors import UsageError
from vllm_forge.pages.first_token import RESULT, TABLE, starts

if TYPE_CHECKING:
    from pathlib import Path


def test_the_page_has_the_table(root: Path) -> None:
    page = (root / TABLE.page).read_text()
    result = json.loads((root / RESULT).read_text())
    assert TABLE.put_into(page, result) == page, "run: python benchmarks/first_token.py"


def test_a_start_that_was_ended_has_no_figure() -> None:
    row = {"start": "cold", "gpu": "X", "line": "1", "first_token": None, "stages": {},
           "ended": "none in 9 s"}  # fmt: skip
    assert starts({"rows": [row]}).splitlines()[-1] == "| cold | X, 1 | none in 9 s |"


def test_a_page_without_the_marks_is_refused() -> None:
    with pytest.raises(UsageError, match="starts"):
        TABLE.put_into("# Page\n", {"rows": []})
