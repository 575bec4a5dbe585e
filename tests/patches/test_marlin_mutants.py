"""The race tests' mutants are written for the text that the release has, and change it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.gpu.race.mutants import MUTANTS, TEMPLATE, AnchorError, Mutant, lay_out

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.lines("0.26")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_text_is_there_once(mutant: Mutant, source: Path, tmp_path: Path) -> None:
    whole = lay_out(mutant, source, tmp_path).read_text()
    assert f"STABLE_TORCH_LIBRARY_IMPL(forge_{mutant.name}, CUDA, m)" in whole
    assert "STABLE_TORCH_LIBRARY_IMPL(_moe_C" not in whole
    assert len(re.findall(r"moe_wna16_marlin_gemm\(Tensor! a", whole)) == 1
    changed = whole + (tmp_path / TEMPLATE).read_text()
    for old, new in mutant.edits:
        assert new in changed
        assert new != old


def test_a_release_with_another_text_is_refused(source: Path, tmp_path: Path) -> None:
    mutant = replace(MUTANTS[1], edits=(("void a_function_that_is_not_there(", ""),))
    with pytest.raises(AnchorError, match=r"0 times in marlin_template\.h"):
        lay_out(mutant, source, tmp_path)
    with pytest.raises(AnchorError, match="times in"):
        lay_out(replace(mutant, edits=(("__syncthreads();", ""),)), source, tmp_path)
