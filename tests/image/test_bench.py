"""The benchmark of builds, whole, on a small project."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.project import REPO, Project

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine


def test_bench_times_every_stage_of_a_build(project: Project, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, str(REPO / "benchmarks" / "build.py"),
            "--line=mini", "--rounds=1", f"--scratch={tmp_path / 'not' / 'there'}",
        ],
        cwd=project.root, env=project.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    path = project.root / "benchmarks" / "results" / "build-mini.json"
    result = json.loads(path.read_text())
    stages = ["cold, one core", "download", "layers", "cold", "no-op", "next SKU: beta"]
    assert list(result["seconds"]) == [*stages, "(write the new tree lock)", "patch-only"]
    assert all(seconds > 0 for (seconds,) in result["seconds"].values())
    assert set(result["digests"]) == {"alpha", "beta"}
    assert str(path) in done.stdout
    assert not list((tmp_path / "not" / "there").iterdir())
