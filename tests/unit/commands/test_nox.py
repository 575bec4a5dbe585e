"""noxfile.py: a menu made of rows; sessions that pass stdout, stderr and exit codes through."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[3]
ROW = """
[sku.{name}]
arch = "{arch}"
compute_capability = "7.7"
device = "Test Chip"
memory_gb = 1
"""
# Prints its name and arguments as JSON, and what it was asked to print or exit with.
FAKE = """#!{python}
import json, os, signal, sys, time
print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), flush=True)
print("a note", file=sys.stderr, flush=True)
if os.environ.get("WAIT"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("waiting", flush=True)
    time.sleep(30)
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose environments hold fakes."""
    for name in ("noxfile.py", "pyproject.toml", "matrix.toml"):
        shutil.copy(REPO / name, tmp_path / name)
    stamp = hashlib.sha256((REPO / "pyproject.toml").read_bytes()).hexdigest()
    for folder, names in (("vllm-forge", ["vllm-forge"]), ("develop", ["pytest", "ruff", "mypy"])):
        bin_folder = tmp_path / ".nox" / folder / "bin"
        bin_folder.mkdir(parents=True)
        (bin_folder.parent / stamp).touch()
        for name in [*names, "codespell"]:
            (bin_folder / name).write_text(FAKE.format(python=sys.executable))
            (bin_folder / name).chmod(0o755)
    return tmp_path


def nox(checkout: Path, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nox", *argv],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def menu(checkout: Path) -> dict[str, str]:
    lines = nox(checkout, "-l").stdout.splitlines()
    return dict(line[2:].split(" -> ") for line in lines if line[:2] in {"- ", "* "})


def add_row(checkout: Path, name: str, arch: str) -> None:
    path = checkout / "matrix.toml"
    text = path.read_text()
    path.write_text(text.replace("# --- lines", ROW.format(name=name, arch=arch) + "# --- lines"))


def test_menu_is_short() -> None:
    lines = nox(REPO, "-l").stdout.splitlines()
    sessions = [line for line in lines if line[:2] in {"- ", "* "}]
    assert 10 < len(sessions) <= 18
    assert max(map(len, lines)) <= 90
    assert all(" -> " in line for line in sessions)


def test_sku_is_a_row(checkout: Path) -> None:
    add_row(checkout, "testchip", "sm_77")
    sessions = menu(checkout)
    assert sessions["build-sm77"] == "Build the image for testchip (sm_77)."
    assert "build-sm120" in sessions


def test_second_sku_of_an_arch_gets_its_own_session(checkout: Path) -> None:
    add_row(checkout, "testchip", "sm_120")
    sessions = menu(checkout)
    assert "build-sm120" not in sessions
    for name in ("testchip", "rtxpro6000"):
        assert name in sessions[f"build-{name}"]
        done = nox(checkout, "-s", f"build-{name}")
        assert json.loads(done.stdout) == ["vllm-forge", "build", name]


SESSIONS = {
    "build": (["build-sm120", "--", "--provision"], ["build", "rtxpro6000", "--provision"]),
    "test-gpu": (["test-gpu", "--", "--sku", "b300"], ["gpu", "test", "--sku", "b300"]),
    "patches": (["patches"], ["patch", "check"]),
    "prove": (["prove", "--", "--line=0.26"], ["patch", "prove", "--line=0.26"]),
    "plan": (["plan", "--", "--sku", "b300", "--json"], ["plan", "--sku", "b300", "--json"]),
    "forge": (["forge", "--", "kernels", "select"], ["kernels", "select"]),
    "lock": (["lock", "--", "--line", "0.33"], ["wheels", "lock", "--line", "0.33"]),
    "docs": (["docs", "--", "--check"], ["docs", "--check"]),
    "release": (
        ["release", "--", "--sku", "b300", "--stage", "release"],
        ["release", "--sku", "b300", "--stage", "release"],
    ),
    "verify": (["verify", "--", "host/name:tag"], ["verify", "host/name:tag"]),
}


@pytest.mark.parametrize("name", SESSIONS)
def test_stdout_is_that_of_the_command(checkout: Path, name: str) -> None:
    argv, command = SESSIONS[name]
    done = nox(checkout, "-s", *argv)
    assert done.returncode == 0
    assert json.loads(done.stdout) == ["vllm-forge", *command]
    assert "a note" in done.stderr


@pytest.mark.parametrize("code", ["1", "2", "93"])
def test_exit_code_is_that_of_the_command(checkout: Path, code: str) -> None:
    assert nox(checkout, "-s", "plan", CODE=code).returncode == int(code)


def test_two_sessions_both_run(checkout: Path) -> None:
    done = nox(checkout, "-s", "patches", "prove")
    assert [json.loads(line)[2] for line in done.stdout.splitlines()] == ["check", "prove"]


def test_sigterm_reaches_the_command(checkout: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "nox", "-s", "plan"],
        cwd=checkout,
        env={**os.environ, "WAIT": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    while process.stdout.readline() != "waiting\n":
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143


@pytest.mark.parametrize("name", ["build-sm120", "test", "lint", "patches", "forge", "bench"])
def test_every_session_has_help(checkout: Path, name: str) -> None:
    done = nox(checkout, "-s", name, "--", "--help")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) < 30
    assert lines[0].startswith("Run the tests.") or json.loads(lines[0])[-1] == "--help"


def test_provision_installs_before_the_tests(checkout: Path) -> None:
    done = nox(checkout, "-s", "test", "--", "--provision", "-k", "word")
    install, tests = map(json.loads, done.stdout.splitlines())
    assert install == ["vllm-forge", "provision", "--registry"]
    assert tests[0] == "pytest"
    assert tests[-2:] == ["-k", "word"]
    assert "--provision" not in tests


@pytest.mark.parametrize("text", ["[sku", "", "[sku]\nb300 = 1\n", "[sku.b300]\n"])
def test_broken_matrix_is_not_a_traceback(checkout: Path, text: str) -> None:
    (checkout / "matrix.toml").write_text(text)
    done = nox(checkout, "-l")
    assert done.returncode == 1
    assert "matrix.toml" in done.stderr
    assert "Traceback" not in done.stderr
