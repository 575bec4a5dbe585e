"""Recorded hosts, and what the doctor says of them."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from vllm_forge.host import RecordedProbe
from vllm_forge.kernels.selection.record import read_selection
from vllm_forge.matrix import image_cell, load
from vllm_forge.serve.deployment import find_deployment, needs_of
from vllm_forge.serve.doctor import ask_host, judge
from vllm_forge.sources import read_lock

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vllm_forge.serve.machine import HostFinding

    Diagnose = Callable[..., list[HostFinding]]


@pytest.fixture
def recorded(root: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a recording, with some replies replaced (None: the program is not there)."""

    def copy(name: str, **replies: str | None) -> Path:
        folder = tmp_path / f"host-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(root / "tests" / "fixtures" / "doctor" / name, folder)
        for question, text in replies.items():
            path = folder / f"{question.replace('_', '-')}.txt"
            if text is None:
                path.unlink()
            else:
                path.write_text(text)
        return folder

    return copy


@pytest.fixture
def diagnose(root: Path) -> Diagnose:
    """Judge a recording."""

    def run(
        folder: Path, sku: str, preset: str = "mtp", artifact: str | None = None
    ) -> list[HostFinding]:
        matrix = load(root)
        cell = image_cell(matrix, sku)
        deployment = find_deployment(matrix, cell, preset, artifact)
        lock = read_lock(root, cell.line_name, cell.line, matrix.base)
        host = ask_host(RecordedProbe(folder))
        rows = read_selection(root / "records", cell.line_name).rows
        return judge(host, deployment, needs_of(lock, deployment, rows))

    return run
