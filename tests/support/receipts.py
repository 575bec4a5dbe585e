"""A small repository with a GPU suite, the result of its green run, and edits of its receipt."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from vllm_forge.patches import read_tree_lock
from vllm_forge.project import Project
from vllm_forge.receipts.receipt import DIGEST
from vllm_forge.receipts.suite import CASES as CASES_FILE
from vllm_forge.receipts.suite import RUNNER, read_suite, sources_hash, suite_hash

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vllm_forge.matrix import Matrix

IMAGE = "d19e57" + "0" * 58
NOW = datetime.now(UTC).replace(microsecond=0)
IDENTITY = "1d" * 32
SERVED = {"preset": "h200-mtp", "artifact": "flash-nvfp4-fp8-mtp", "identity": IDENTITY}
SUITE = """
release_sources = []
[tier.server]
folders = ["tests/gpu/mtp"]
minutes = 1
[tier.soak]
folders = ["tests/gpu/mtp"]
minutes = 9
[tier.tp2]
folders = ["tests/gpu/mtp"]
minutes = 1
gpus = 2
"""
TESTS = """
import pytest
pytestmark = [pytest.mark.gpu]
def test_one(margin): ...
@pytest.mark.parametrize("k", [1, 2])
def test_two(k): ...
@pytest.mark.sm_120
def test_elsewhere(): ...
class TestGroup:
    @pytest.mark.sm_90
    def test_three(self): ...
def helper(): ...
"""
FILE = "tests/gpu/mtp/test_it.py"


def _case(*, archs: list[str], engines: list[str], margins: bool = False) -> dict[str, Any]:
    return {"archs": archs, "engines": engines, "margins": margins}


CASES = {
    f"{FILE}::test_one": _case(archs=[], engines=["plain"], margins=True),
    f"{FILE}::test_two[1]": _case(archs=[], engines=[]),
    f"{FILE}::test_two[2]": _case(archs=[], engines=[]),
    f"{FILE}::test_elsewhere": _case(archs=["sm_120"], engines=["other"]),
    f"{FILE}::TestGroup::test_three": _case(archs=["sm_90"], engines=[]),
}


def small_project(root: Path, folder: Path) -> Project:
    """A repository with the real series and locks, a suite of four tests, and a pinned artifact."""
    (folder / FILE).parent.mkdir(parents=True)
    (folder / FILE).write_text(TESTS)
    (folder / RUNNER).parent.mkdir()
    (folder / RUNNER).touch()
    (folder / "tests/gpu/suite.toml").write_text(SUITE)
    for name in ("patches", "docker"):
        shutil.copytree(root / name, folder / name)
    row = f"[artifact.{SERVED['artifact']}]\n"
    matrix = (root / "matrix.toml").read_text()
    assert row in matrix
    (folder / "matrix.toml").write_text(matrix.replace(row, f'{row}identity = "{IDENTITY}"\n'))
    (folder / CASES_FILE).parent.mkdir()
    list_cases(folder)
    return Project(folder)


def list_cases(folder: Path, sources: str | None = None) -> None:
    """What ``python -m tests.support.list_gpu_cases`` would write."""
    rows = {
        name: {"sources_sha256": sources or sources_hash(folder, name), "cases": CASES}
        for name in read_suite(folder).tier
    }
    (folder / CASES_FILE).write_text(json.dumps(rows))


def row(**changes: Any) -> dict[str, Any]:
    """A test's row."""
    blank = {"outcome": "passed", "seconds": 1.5, "margins": {}, "facts": {}, "why": ""}
    return {**blank, **changes}


def green_run(project: Project, tier: str = "server", **facts: str) -> dict[str, Any]:
    """The result of a green run of that suite in an image of line 0.26 on two H200."""
    line = project.matrix.line["0.26"]
    return green_result(
        project.matrix,
        {
            f"{FILE}::test_one": row(
                margins={"drafts": {"measured": 1.0, "bound": 16.0}}, facts=facts
            ),
            f"{FILE}::test_two[1]": row(),
            f"{FILE}::test_two[2]": row(),
            f"{FILE}::test_elsewhere": row(outcome="other GPU", why="needs sm_120, this is H200"),
            f"{FILE}::TestGroup::test_three": row(),
        },
        tier=tier,
        tree=read_tree_lock(project.root / line.series, "0.26").result,
        lock=project.lock("0.26").digest,
        suite=suite_hash(project, tier, "h200"),
    )


def green_result(
    matrix: Matrix,
    tests: dict[str, Any],
    *,
    tier: str = "server",
    tree: str = "a" * 40,
    lock: str = "b" * 64,
    suite: str = "c" * 64,
) -> dict[str, Any]:
    """What ``tests.gpu.harness.run`` writes of a green tier on two H200, line 0.26."""
    sku = matrix.sku["h200"]
    return {
        "schema": 1,
        "plan": {
            "sku": "h200",
            "line": "0.26",
            "tree": tree,
            "lock_sha256": lock,
            "subject": {"name": "kit", "sha256": IMAGE},
        },
        "tier": tier,
        "suite_sha256": suite,
        "started": (NOW - timedelta(minutes=5)).isoformat(),
        "finished": NOW.isoformat(),
        "exit": 0,
        "gpus": [
            {
                "name": sku.device,
                "uuid_sha256": number * 64,
                "compute_capability": sku.compute_capability,
                "driver": "580.159.04",
                "memory_mib": 143771,
            }
            for number in "01"
        ],
        "host": {"python": "3.12.3", "cuda": "13.0", "packages": {"torch": "2.11.0+cu130"}},
        "configurations": {"plain": {"moe": []}},
        "tests": tests,
    }


def edit(path: Path, change: Callable[[dict[str, Any]], Any], *, consistent: bool) -> None:
    """Change the payload; ``consistent``: as a forger does, its digest too."""
    data = json.loads(path.read_text())
    payload = json.loads(base64.b64decode(data["payload"]))
    change(payload)
    raw = json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()
    data["payload"] = base64.b64encode(raw).decode()
    if consistent:
        data[DIGEST] = hashlib.sha256(raw).hexdigest()
    path.write_text(json.dumps(data))


def body(payload: dict[str, Any]) -> dict[str, Any]:
    """vllm-forge's part of a statement."""
    inner = payload["predicate"]["vllmForge"]
    assert isinstance(inner, dict)
    return inner
