"""What a tier's hash covers: its tests, all that they import or name, its rows and its cases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu.harness import run
from vllm_forge.gputest.launch import copy_code
from vllm_forge.matrix import load
from vllm_forge.project import Project
from vllm_forge.receipts.errors import SuiteDescriptionError
from vllm_forge.receipts.suite import (
    CASES,
    FILE,
    MATRIX_ROWS,
    TESTS,
    Tier,
    plan_tier,
    read_suite,
    source_files,
    sources_hash,
    suite_hash,
)

if TYPE_CHECKING:
    from collections.abc import Callable

MTP = "tests/gpu/mtp"
# Tier -> a file of each kind that its verdicts depend on.
COVERED = {
    "kernel": [
        f"{TESTS}/numerics/test_wo_a.py",
        f"{TESTS}/conftest.py",
        f"{TESTS}/together.py",  # imported by a conftest
        f"{TESTS}/race/child.py",  # run by its name
        f"{TESTS}/race/native/tools.cu",  # in a folder of data
        f"{TESTS}/race/sanitizer_baseline.json",
        f"{TESTS}/harness/plugin.py",  # a plugin, named in a string
        f"{TESTS}/harness/run.py",
        f"{TESTS}/reference/planted.py",
        "src/vllm_forge/checkpoints/codecs/nvfp4.py",
    ],
    "server": [
        f"{MTP}/engine_job.py",
        f"{TESTS}/together.py",
        f"{TESTS}/race_server/stale_row.py",
        f"{TESTS}/harness/bands.toml",
        f"{TESTS}/models/exact_mtp.py",
        f"{TESTS}/reference/power.py",
    ],
    "soak": [
        f"{TESTS}/soak/artifact.py",
        f"{TESTS}/together.py",
        f"{TESTS}/harness/workloads.toml",
        f"{TESTS}/race/repeat.py",
        f"{TESTS}/race_server/verdicts.py",
    ],
}
ELSEWHERE = {
    "kernel": [f"{TESTS}/soak/", f"{TESTS}/models/", f"{MTP}/"],
    "server": [f"{TESTS}/soak/", f"{TESTS}/race/", f"{TESTS}/numerics/", "src/"],
    "soak": [f"{MTP}/", f"{TESTS}/numerics/"],
}


def test_tests_of_the_gpu_suite_import_nothing_of_the_project_but_the_codecs(root: Path) -> None:
    files = source_files(root, Tier(folders=(TESTS,), minutes=1))
    assert {name for name in files if not name.startswith(f"{TESTS}/")} == {
        path.relative_to(root).as_posix()
        for path in (root / "src/vllm_forge/checkpoints/codecs").glob("*.py")
        if path.stem in {"__init__", "fp8_block", "nvfp4", "small_floats"}
    }


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import vllm_forge.matrix", "must not import vllm_forge.matrix"),
        ("from vllm_forge import errors", "must not import vllm_forge"),
        ("def f():\n    from tests.support import wheels", "must not import tests.support"),
        ("from . import other", "relative import"),
        ("def f(:", "cannot read a test"),
    ],
)
def test_a_forbidden_import_is_refused(small: Project, code: str, message: str) -> None:
    (small.root / MTP / "helper.py").write_text(code)
    with pytest.raises(SuiteDescriptionError, match=message) as caught:
        source_files(small.root, read_suite(small.root).tier["server"])
    assert "helper.py" in caught.value.where


@pytest.mark.parametrize("tier", COVERED)
def test_a_tier_covers_what_its_verdicts_depend_on_and_no_more(root: Path, tier: str) -> None:
    files = source_files(root, read_suite(root).tier[tier])
    assert set(COVERED[tier]) <= set(files)
    assert not [name for name in files if name.startswith(tuple(ELSEWHERE[tier]))]


@pytest.fixture
def small(root: Path, tmp_path: Path) -> Project:
    """Two tiers; a test of the first imports a helper, names data, and has a conftest above it."""
    files = {
        f"{TESTS}/conftest.py": "from tests.gpu.together import x",
        f"{TESTS}/together.py": "x = 'tests.gpu.plugin'",
        f"{TESTS}/plugin.py": "",
        f"{TESTS}/harness/run.py": "",
        f"{TESTS}/unused.py": "",
        f"{MTP}/test_it.py": "from tests.gpu import helper",
        f"{TESTS}/helper.py": "HERE = 'bands.toml', 'data'",
        f"{TESTS}/bands.toml": "",
        f"{TESTS}/data/a.cu": "",
        f"{TESTS}/soak/test_long.py": "",
        FILE: f'release_sources = []\n[tier.server]\nfolders = ["{MTP}"]\nminutes = 1\n'
        f'[tier.soak]\nfolders = ["{TESTS}/soak"]\nminutes = 2\nmatrix = ["preset"]\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    shutil.copy(root / "matrix.toml", tmp_path)
    list_cases(tmp_path)
    return Project(tmp_path)


def list_cases(root: Path, count: int = 2) -> None:
    case = {"archs": [], "engines": [], "margins": False}
    cases: dict[str, Any] = {str(number): case for number in range(count)}
    rows = {
        name: {"sources_sha256": sources_hash(root, name), "cases": cases}
        for name in read_suite(root).tier
    }
    (root / CASES).parent.mkdir(exist_ok=True)
    (root / CASES).write_text(json.dumps(rows))


def append(name: str, text: str = "# changed\n") -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text((path.read_text() if path.exists() else "") + text)

    return change


def replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new))

    return change


TIER = f'[tier.other]\nfolders = ["{TESTS}/other"]\nminutes = 1\n'


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        (append(f"{MTP}/test_it.py"), {"server"}),
        (append(f"{MTP}/test_new.py", "def test_new(): ...\n"), {"server"}),
        (append(f"{TESTS}/helper.py"), {"server"}),
        (append(f"{TESTS}/bands.toml"), {"server"}),
        (append(f"{TESTS}/data/a.cu"), {"server"}),
        (append(f"{TESTS}/soak/test_long.py"), {"soak"}),
        (append(f"{TESTS}/together.py"), {"server", "soak"}),
        (append(f"{TESTS}/conftest.py"), {"server", "soak"}),
        (append(f"{TESTS}/plugin.py"), {"server", "soak"}),
        (append(f"{TESTS}/harness/run.py"), {"server", "soak"}),
        (append(f"{TESTS}/unused.py"), set()),
        (append(f"{TESTS}/other/test_new.py", "def test_new(): ...\n"), set()),
        (append(FILE, TIER), set()),
        (replace(FILE, "minutes = 1", "minutes = 9"), {"server"}),
    ],
)
def test_a_change_makes_the_tiers_stale_that_depend_on_it(
    small: Project, change: Callable[[Path], None], stale: set[str]
) -> None:
    before = {name: suite_hash(small, name, "b300") for name in ("server", "soak")}
    change(small.root)
    (small.root / TESTS / "other").mkdir(exist_ok=True)
    list_cases(small.root)
    after = Project(small.root)
    assert {name for name in before if suite_hash(after, name, "b300") != before[name]} == stale


def test_the_list_of_cases_is_part_of_the_suite(small: Project) -> None:
    """Else a list that was shortened would let a receipt with fewer tests pass."""
    before = suite_hash(small, "server", "b300")
    list_cases(small.root, count=1)
    assert suite_hash(small, "server", "b300") != before


def test_rows_of_the_matrix_are_part_of_the_tiers_that_read_them(small: Project) -> None:
    assert suite_hash(small, "server", "b300") == suite_hash(small, "server", "h200")
    assert suite_hash(small, "soak", "b300") != suite_hash(small, "soak", "h200")


def test_a_case_list_of_other_tests_is_refused(small: Project) -> None:
    append(f"{MTP}/test_it.py")(small.root)
    with pytest.raises(SuiteDescriptionError, match="changed since its cases were listed"):
        suite_hash(small, "server", "b300")
    suite_hash(small, "soak", "b300")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("minutes = 1", "", "tier.server.minutes: Field required"),
        ("minutes = 1", 'minutes = "soon"', "minutes: Input should be a valid integer"),
        ('["preset"]', '["line"]', "matrix.0: Input should be 'sku' or 'preset'"),
        ("[tier.server]", "[tier.server", "invalid suite: Expected"),
        (MTP, f"{MTP}s", "mtps is not a directory"),
    ],
)
def test_a_malformed_description_is_refused(
    small: Project, old: str, new: str, message: str
) -> None:
    replace(FILE, old, new)(small.root)
    with pytest.raises(SuiteDescriptionError, match=message):
        suite_hash(small, "server", "b300")


def test_the_runner_computes_the_same_hash(root: Path, tmp_path: Path) -> None:
    """From the plan, in what goes to a GPU host."""
    copy_code(root, tmp_path)
    project = Project(root)
    for name in read_suite(root).tier:
        plan: dict[str, Any] = json.loads(json.dumps(plan_tier(project, name, "h200")))
        assert run.suite_hash(tmp_path, plan) == suite_hash(project, name, "h200")


def test_the_suites_description_is_whole(root: Path) -> None:
    tiers = read_suite(root).tier
    widths = {"tp", "pcie", "replicas"}
    assert set(tiers) == {"kernel", "server", "upstream", "soak", "rehearsal", "edges"} | {
        f"{name}{gpus}" for name in widths for gpus in (2, 4)
    }
    for name in widths:
        rows = [tiers[f"{name}{gpus}"] for gpus in (2, 4)]
        assert [row.gpus for row in rows] == [2, 4]
        assert rows[0].model_copy(update={"gpus": 4}) == rows[1]
    assert read_suite(root).release_sources
    matrix = load(root)
    presets = [MATRIX_ROWS["preset"](matrix, sku) for sku in matrix.sku]
    assert any(row["speculative_tokens"] for rows in presets for row in rows)


@pytest.mark.parametrize(
    ("name", "error"),
    [("server", "duplicate tier server"), ("Kernel]", "invalid tiers")],
    ids=["duplicate", "malformed"],
)
def test_tiers_of_a_folder_are_added_and_checked(small: Project, name: str, error: str) -> None:
    path = small.root / "tests/gpu/mtp/suite.toml"
    row = '[tier.{}]\nfolders = ["tests/gpu/mtp"]\nminutes = 1\n'
    before = suite_hash(small, "server", "b300")
    path.write_text(row.format("other"))
    assert {"server", "other"} < set(read_suite(small.root).tier)
    path.unlink()
    assert suite_hash(small, "server", "b300") == before
    path.write_text(row.format(name))
    with pytest.raises(SuiteDescriptionError, match=error):
        read_suite(small.root)
