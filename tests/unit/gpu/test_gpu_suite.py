"""The GPU suite's machinery without a GPU: device, verdicts, margins, budget, variants."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu.harness import device, limits, plugin, run
from tests.gpu.harness.device import list_gpus, query, require_sku
from tests.gpu.harness.errors import (
    InputError,
    SuiteRedError,
    SuiteUndecidedError,
    WrongGpuError,
)
from tests.gpu.harness.variants import lay_over
from vllm_forge.gputest.launch import ENVIRONMENT, RUN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REPO = Path(__file__).parents[3]
H200 = "NVIDIA H200, GPU-1b2c, 9.0, 580.159.04, 143771\n"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put an nvidia-smi on the PATH that prints this, and its arguments to ``smi.txt``."""

    def put(text: str) -> None:
        path = tmp_path / "bin" / "nvidia-smi"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\necho \"$@\" >{tmp_path}/smi.txt\ncat <<'END'\n{text}END\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")

    return put


def test_gpus_are_listed_without_their_uuid(smi: Callable[[str], None]) -> None:
    smi(H200)
    (gpu,) = list_gpus()
    assert (gpu["name"], gpu["compute_capability"]) == ("NVIDIA H200", "9.0")
    assert (gpu["driver"], gpu["memory_mib"]) == ("580.159.04", 143771)
    assert "1b2c" not in json.dumps(gpu)
    assert len(gpu["uuid_sha256"]) == 64


def test_one_gpu_is_queried(smi: Callable[[str], None], tmp_path: Path) -> None:
    smi("9.0\n")
    assert query("compute_cap", gpu="GPU-1b2c") == [["9.0"]]
    assert "-i GPU-1b2c" in (tmp_path / "smi.txt").read_text()


@pytest.mark.parametrize(
    "text", ["NVIDIA H200\n", "a, b, c, d, [N/A]\n", "Failed, to, get, it, !\n", ""]
)
def test_a_failed_gpu_is_reported(smi: Callable[[str], None], text: str) -> None:
    smi(text)
    with pytest.raises(WrongGpuError, match="no GPU to test"):
        list_gpus()


@pytest.mark.parametrize(
    ("capability", "device"),
    [("10.0", "NVIDIA B200"), ("9.0", "NVIDIA H100"), ("9.0", "NVIDIA GH200")],
)
def test_the_wrong_gpu_is_refused(smi: Callable[[str], None], capability: str, device: str) -> None:
    smi(H200)
    plan = {"sku": "other", "compute_capability": capability, "device": device}
    with pytest.raises(WrongGpuError, match=r"this host has NVIDIA H200 with 9\.0"):
        require_sku(list_gpus(), plan)


def test_one_wrong_gpu_among_right_ones_is_refused(smi: Callable[[str], None]) -> None:
    smi(H200 + H200.replace("9.0", "10.0"))
    gpus, plan = list_gpus(), {"sku": "x", "compute_capability": "9.0", "device": "NVIDIA H200"}
    with pytest.raises(WrongGpuError):
        require_sku(gpus, plan)
    require_sku(gpus[:1], plan)


def test_a_run_has_the_gpus_that_it_was_given(
    smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that two tiers run side by side, each on its GPU and with a receipt of it."""
    rows = [H200.replace("1b2c", name) for name in ("aaaa", "bbbb", "cccc")]
    smi("".join(rows))
    everything = list_gpus()
    assert len(everything) == 3
    for given, places in (("1", [1]), ("2,0", [0, 2]), ("GPU-bbbb", [1]), ("", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert device.visible() == [name for name in given.split(",") if name]
        if places:
            assert list_gpus() == [everything[place] for place in places]
        else:
            with pytest.raises(WrongGpuError, match="CUDA_VISIBLE_DEVICES="):
                list_gpus()
    monkeypatch.setenv(device.VISIBLE, "0,1,2")  # an xdist worker, which has one for itself
    monkeypatch.setenv(device.RANKS, "2")
    assert device.parallel_variables()["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_each_worker_has_a_gpu_of_its_own(
    smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    pytestconfig.addinivalue_line("markers", "tier(*names): the conftest has one")
    conftest = importlib.import_module("tests.gpu.conftest")
    smi("0\n1\n2\n3\n")
    config: Any = SimpleNamespace(
        pluginmanager=SimpleNamespace(import_plugin=str), addinivalue_line=max, stash={}
    )
    for number in range(4):
        for name in (device.NAMED, device.VISIBLE):
            monkeypatch.setenv(name, "to be restored")
            monkeypatch.delenv(name)
        monkeypatch.setenv("PYTEST_XDIST_WORKER", f"gw{number}")
        conftest.pytest_configure(config)
        assert os.environ[device.NAMED] == str(number)
        assert device.visible() == list("0123")


def suite(folder: Path, body: str, *options: str, **variables: str) -> dict[str, Any]:
    """Run a test file under the plugin, as the runner does; what it wrote."""
    (folder / "test_it.py").write_text(body)
    results = folder / "results.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.gpu.harness.plugin", "-q", *options],
        cwd=folder,
        env={
            **os.environ, "PYTHONPATH": str(REPO), plugin.RESULTS: str(results), **variables,
        },
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert results.is_file(), done.stdout + done.stderr
    report: dict[str, Any] = json.loads(results.read_text())
    return report


OUTCOMES = """
import pytest
def test_green(): ...
def test_red(): assert 0, "broken"
@pytest.fixture
def bad(): raise RuntimeError("no set-up")
def test_setup(bad): ...
@pytest.fixture
def leaves():
    yield
    raise RuntimeError("no end")
def test_teardown(leaves): ...
def test_skip(): pytest.skip("no checkpoint")
def test_other(): pytest.skip("needs sm_100, this is NVIDIA H200")
def test_soak(): pytest.skip("tier soak: `--tier soak` runs it")
@pytest.mark.xfail
def test_xfail(): assert 0
@pytest.mark.xfail
def test_xpass(): ...
"""


def test_outcomes(tmp_path: Path) -> None:
    found = suite(tmp_path, OUTCOMES)
    outcomes = {name.rpartition("test_")[2]: row["outcome"] for name, row in found["tests"].items()}
    assert outcomes == {
        "green": "passed", "red": "failed", "setup": "failed", "teardown": "failed",
        "skip": "not run", "other": "other GPU", "xfail": "failed", "xpass": "failed",
    }  # fmt: skip
    assert found["tests"]["test_it.py::test_red"]["why"].startswith("AssertionError: broken")
    assert found["tests"]["test_it.py::test_skip"]["why"] == "no checkpoint"
    assert found["exit"] == 1
    assert run.verdict(found) == "red"


MARGINS = """
import math, pytest
def test_under(margin, record_property):
    margin("drafts", 3, 16)
    record_property("row", {"acceptance": 0.5})
def test_over(margin): margin("error", 2.0, 1.0)
def test_nan(margin): margin("error", math.nan, 1.0)
"""


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_margins_are_kept_and_bind(tmp_path: Path, options: tuple[str, ...]) -> None:
    found = suite(tmp_path, MARGINS, *options)["tests"]
    under, over = found["test_it.py::test_under"], found["test_it.py::test_over"]
    assert under["margins"] == {"drafts": {"measured": 3.0, "bound": 16.0}}
    assert under["facts"] == {"acceptance": 0.5}
    assert over["outcome"] == "failed"
    assert over["margins"]["error"] == {"measured": 2.0, "bound": 1.0}
    assert found["test_it.py::test_nan"]["outcome"] == "failed"


BUDGET = """
import pytest
order = []
@pytest.mark.value(1, 10)
def test_poor(): assert order == ["rich"]
@pytest.mark.value(10, 10)
def test_rich(): order.append("rich")
@pytest.mark.value(99, 9000)
def test_long(): raise AssertionError("begun")
"""


def test_budget_orders_by_value_and_begins_nothing_too_long(tmp_path: Path) -> None:
    import time

    found = suite(tmp_path, BUDGET, **{limits.DEADLINE: str(time.time() + 600)})["tests"]
    assert found["test_it.py::test_poor"]["outcome"] == "passed"
    assert found["test_it.py::test_long"]["outcome"] == "not run"
    assert "run with more --minutes" in found["test_it.py::test_long"]["why"]


@pytest.mark.parametrize(
    ("outcomes", "code", "verdict"),
    [
        (["passed", "other GPU"], 0, "green"),
        (["passed", "failed"], 2, "red"),
        (["passed", "not run"], 0, "undecided"),
        (["passed"], 2, "undecided"),
        ([], 0, "undecided"),
    ],
)
def test_a_verdict_is_red_green_or_undecided(outcomes: list[str], code: int, verdict: str) -> None:
    tests = {str(number): {"outcome": outcome} for number, outcome in enumerate(outcomes)}
    assert run.verdict({"tests": tests, "exit": code}) == verdict


def test_a_tier_without_a_verdict_is_not_red(bundle: Path) -> None:
    (bundle / "tests/gpu/mtp/test_it.py").write_text(
        "import pytest\ndef test_it(): pytest.skip('no checkpoint')\n"
    )
    assert run_all(bundle)[0] == SuiteUndecidedError.exit_code
    assert run_all(bundle, "--tier=other")[0] == InputError.exit_code


def test_tests_get_the_rows_of_the_matrix_that_their_tier_lists(bundle: Path) -> None:
    (bundle / "tests/gpu/mtp/test_it.py").write_text(
        "import os\ndef test_it(): assert 'h200' in os.environ['VLLM_FORGE_GPU_MATRIX']\n"
    )
    code, result = run_all(bundle)
    assert code == 0
    assert "tiers" not in result["plan"]
    before = result["suite_sha256"]
    with (bundle / "tests/gpu/conftest.py").open("a") as file:
        file.write("# changed\n")
    assert run_all(bundle)[1]["suite_sha256"] != before


def test_the_table_has_red_ones_first_and_margins(tmp_path: Path) -> None:
    found = suite(tmp_path, MARGINS) | {"tier": "server"}
    rows = run.table(found).splitlines()
    assert rows[0].startswith("failed")
    assert "drafts 3/16" in rows[2]
    assert rows[-1] == "tier server: 2 failed, 1 passed"


class TestVariants:
    @pytest.fixture
    def package(self, tmp_path: Path) -> Path:
        folder = tmp_path / "site" / "vllm"
        (folder / "models").mkdir(parents=True)
        (folder / "__init__.py").write_text("state = 'patched'\n")
        (folder / "models" / "other.py").write_text("")
        return folder

    def test_only_the_variants_files_differ(self, package: Path, tmp_path: Path) -> None:
        files = tmp_path / "files" / "vllm"
        files.mkdir(parents=True)
        (files / "__init__.py").write_text("state = 'published'\n")
        over = lay_over(package, tmp_path / "files", tmp_path / "over")
        said = subprocess.run(
            [sys.executable, "-c", "import vllm, vllm.models.other; print(vllm.state)"],
            env={**os.environ, "PYTHONPATH": f"{over}{os.pathsep}{package.parent}"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert said == "published\n"
        assert (package / "__init__.py").read_text() == "state = 'patched'\n"

    def test_a_file_that_is_not_there_is_refused(self, package: Path, tmp_path: Path) -> None:
        files = tmp_path / "files" / "vllm"
        files.mkdir(parents=True)
        (files / "new.py").write_text("")
        with pytest.raises(FileNotFoundError):
            lay_over(package, tmp_path / "files", tmp_path / "over")


def test_a_runner_without_a_gpu_is_refused(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.harness.run", str(plan), str(tmp_path / "out")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == WrongGpuError.exit_code
    assert "nox -s forge -- gpu kit" in done.stderr


@pytest.fixture
def bundle(tmp_path: Path, smi: Callable[[str], None]) -> Path:
    """What the real runner runs from, without a test yet, and an nvidia-smi that says H200."""
    smi(H200)
    root = tmp_path / "bundle"
    (root / "tests/gpu/mtp").mkdir(parents=True)
    for name in ("tests/__init__.py", "tests/gpu/__init__.py"):
        (root / name).touch()
    shutil.copytree(REPO / "tests/gpu/harness", root / "tests/gpu/harness")
    (root / "tests/gpu/conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--tier', action='append')\n"
    )
    plan = {
        "sku": "h200", "compute_capability": "9.0", "device": "NVIDIA H200", "tree": "7c43",
        "subject": {"name": "x", "sha256": "0" * 64},
        "caches": {"folders": {"triton": "TRITON_CACHE_DIR"}, "key": {"tree": "7c43"}},
        "tiers": {
            "server": {
                "folders": ["tests/gpu/mtp"], "minutes": 1, "files": ["tests/gpu/conftest.py"],
                "rows": {
                    "matrix": {"sku": {"h200": "9.0"}}, "tier": {"gpus": 2, "on_request": False},
                },
            }
        },
    }  # fmt: skip
    (root / "plan.json").write_text(json.dumps(plan))
    return root


def run_all(bundle: Path, *options: str) -> tuple[int, dict[str, Any]]:
    out = bundle.parent / "out"
    code = run.main([str(bundle / "plan.json"), str(out), f"--root={bundle}", *options])
    path = out / "server.json"
    return code, json.loads(path.read_text()) if path.exists() else {}


def test_a_tier_from_end_to_end(bundle: Path) -> None:
    (bundle / "tests/gpu/mtp/test_it.py").write_text(
        "import os, pathlib\n"
        "def test_it(margin):\n"
        "    margin('error', 1, 2)\n"
        "    boot = pathlib.Path(os.environ['VLLM_FORGE_GPU_FOLDER']) / 'boot' / 'one.log'\n"
        "    boot.write_text(\"Using 'MARLIN' NvFp4 MoE backend out of\")\n"
    )
    code, result = run_all(bundle)
    assert code == 0
    assert result["tests"]["tests/gpu/mtp/test_it.py::test_it"]["outcome"] == "passed"
    assert result["configurations"]["one"]["moe"] == ["NvFp4: MARLIN"]
    assert result["plan"]["subject"]["sha256"]
    assert result["gpus"][0]["name"] == "NVIDIA H200"
    assert (bundle.parent / "out" / "server.xml").is_file()
    (bundle / "tests/gpu/mtp/test_it.py").write_text("def test_it(): assert 0\n")
    assert run_all(bundle)[0] == SuiteRedError.exit_code


def test_auto_is_a_worker_for_each_gpu(
    bundle: Path, smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    smi(H200 * 4)
    given: list[str] = []
    monkeypatch.setattr(run, "_pytest", lambda _root, arguments, _: given.extend(arguments))
    run_all(bundle, "-n", "auto")
    assert given[-4:] == ["-n", "4", "--dist", "loadgroup"]


def test_the_suite_does_not_import_from_the_working_directory(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an image, which sets PYTHONSAFEPATH: its working directory is the volume."""
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"].replace("/forge", str(bundle)))
    (bundle / "tests/gpu/mtp/test_it.py").write_text("import tests.gpu\ndef test_it(): ...\n")
    code, result = run_all(bundle)
    assert code == 0, result
    help_of = [sys.executable, *RUN, "--help"]
    done = subprocess.run(help_of, cwd=bundle, text=True, check=True, capture_output=True)
    assert "tests.gpu.harness.run" in done.stdout


@pytest.fixture
def _ignores_interrupts() -> Iterator[None]:
    """What a script starts in the background ignores SIGINT, and its children inherit that."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ignores_interrupts")
def test_a_run_that_is_ended_has_the_verdicts_so_far(bundle: Path) -> None:
    """SIGTERM, as a kit sends before its limit: pytest ends its tests and what they started."""
    (bundle / "tests/gpu/mtp/test_it.py").write_text(
        "import os, pytest, signal\n"
        "@pytest.fixture(scope='session')\n"
        "def engine(tmp_path_factory):\n"
        "    yield\n"
        "    open(os.environ['VLLM_FORGE_GPU_FOLDER'] + '/ended', 'w').close()\n"
        "def test_first(engine): ...\n"
        "def test_hangs(engine):\n"
        f"    os.kill({os.getpid()}, signal.SIGTERM)\n"
        "    while True: signal.pause()\n"
        "def test_never(): ...\n"
    )
    code, result = run_all(bundle)
    assert code == SuiteUndecidedError.exit_code
    assert result["exit"] == 2
    assert result["tests"]["tests/gpu/mtp/test_it.py::test_first"]["outcome"] == "passed"
    assert "tests/gpu/mtp/test_it.py::test_never" not in result["tests"]
    assert (bundle.parent / "out" / "server" / "ended").exists()


def test_compilers_find_their_caches_and_the_second_start_is_reported(bundle: Path) -> None:
    (bundle / "tests/gpu/mtp/test_it.py").write_text(
        "import os, pathlib\n"
        "def test_it():\n"
        "    assert os.environ['VLLM_FORGE_COMPILED_FILES'] == os.environ['EXPECTED']\n"
        "    pathlib.Path(os.environ['TRITON_CACHE_DIR'], 'kernel').touch()\n"
    )
    caches = bundle.parent / "caches"
    with pytest.MonkeyPatch.context() as variables:
        for expected in "01":
            variables.setenv("EXPECTED", expected)
            assert run_all(bundle, f"--caches={caches}")[0] == 0
    key = json.loads((caches / "caches.json").read_text())
    (caches / "caches.json").write_text(json.dumps(key | {"tree": "other"}))
    assert run_all(bundle, f"--caches={caches}")[0] == InputError.exit_code


def test_caches_are_cold_until_a_run_of_the_tier_was_green(bundle: Path) -> None:
    """Another tier's kernels are others, and those of a start without time are not complete."""
    test, caches = bundle / "tests/gpu/mtp/test_it.py", bundle.parent / "caches"
    caches.mkdir()
    body = "import os, pytest\ndef test_it(): assert os.environ['VLLM_FORGE_COLD'] == '{}'\n"
    late = "def test_late(): pytest.skip('dsv4 did not start in 9 s; caches were cold')\n"
    some = body.format(1) + "def test_other(): pytest.skip('budget')\n"
    for number, (text, options, code) in enumerate([
        (body.format(1), [], 0),
        (body.format(1) + late, [f"--caches={caches}"], SuiteUndecidedError.exit_code),
        (some, [f"--caches={caches}", "--only=not test_other"], 0),
        (body.format(1), [f"--caches={caches}"], 0),
        (body.format(0), [f"--caches={caches}"], 0),
    ]):  # fmt: skip
        # Of another size each time: pytest keeps compiled tests by time, in seconds, and size.
        test.write_text(text + "#" * number)
        assert run_all(bundle, *options)[0] == code
    (caches / "warm-server").rename(caches / "warm-kernel")
    test.write_text(body.format(1) + "#" * 9)
    assert run_all(bundle, f"--caches={caches}")[0] == 0
