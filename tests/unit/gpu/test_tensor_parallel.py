"""Sums over ranks without a GPU: right ones are within the bound, faults of a rank are not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gpu.harness import device
from tests.gpu.reference.marlin_reference import margin
from tests.gpu.tensor_parallel import shards
from tests.gpu.tensor_parallel.shards import CELLS, Fault, due

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("count", "backend"), [(2, "MARLIN"), (4, "MARLIN"), (4, "FLASHINFER_TRTLLM")]
)
def test_only_right_shards_add_up(
    count: int, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "JOB", "tests.support.fake_shards")
    monkeypatch.setenv(device.RANKS, str(count))
    found = shards.run(backend, tmp_path)
    for routed in CELLS:
        right = due(routed, backend, count)
        for fault in Fault:
            share = margin(found[f"{routed}-{fault.name}"], right)
            assert (share > 1) == (fault is not Fault.NONE), (routed, fault, share)
        assert 0.01 < margin(found[f"{routed}-NONE"], right) < 0.5


def test_a_rank_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "JOB", "tests.support.no_such_module")
    monkeypatch.setenv(device.RANKS, "2")
    with pytest.raises(RuntimeError, match="No module named") as error:
        shards.run("MARLIN", tmp_path)
    assert str(error.value).count("No module named") == 2
