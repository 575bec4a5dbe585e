"""The program of a node, as a process of its own: what it seals of each way a job can end."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_forge.dispatch import node
from vllm_forge.dispatch.results import Marker

NAME, HEX = "b300-0.26-kernel", "d1" * 32
WRITE = "printf result > @OUTPUT@/kernel.json"


class Run:
    """A run's folder with one job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "storage" / "runs" / "r1"
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.folder.mkdir(parents=True)
        self.images = folder / "storage" / "images"
        self.images.mkdir()
        self.job: dict[str, Any] = {
            "name": NAME, "image": f"sha256:{HEX}", "source": "registry", "archive": None,
            "scratch": str(self.scratch), "folders": [], "files": {}, "prepare": [],
            "cleanup": [["touch", f"{folder}/cleaned"]], "artifacts": ["kernel.json"],
        }  # fmt: skip

    def start(self, script: str, *options: str) -> subprocess.Popen[str]:
        jobs = {NAME: self.job | {"argv": ["sh", "-c", script]}}
        (self.folder / "jobs.json").write_text(json.dumps(jobs))
        argv = [sys.executable, "-I", node.__file__, str(self.folder), NAME, "--attempt=7_0"]
        return subprocess.Popen([*argv, *options], stdout=subprocess.PIPE, text=True)

    def marker(self, name: str = "7_0.done") -> Marker:
        return Marker.model_validate_json((self.folder / "results" / NAME / name).read_bytes())

    def code(self, script: str, *options: str) -> int:
        with self.start(script, *options) as process:
            return process.wait()

    def go(self, script: str) -> Marker:
        self.code(script)
        return self.marker()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.mark.parametrize("code", [0, 91])
def test_result_is_sealed_with_its_hash_and_code(run: Run, tmp_path: Path, code: int) -> None:
    assert run.code(f"{WRITE}; exit {code}") == code
    assert run.marker().exit == code
    assert run.marker().files == {"kernel.json": hashlib.sha256(b"result").hexdigest()}
    assert (tmp_path / "cleaned").exists()
    assert not list(run.scratch.glob("*/job-*"))


def test_job_that_is_restarted_is_not_run(run: Run) -> None:
    run.go(WRITE)
    first = run.marker()
    assert run.code("exit 1", "--restarts=1") == 1
    assert run.marker() == first
    again = run.marker("7_0-r1.done")
    assert (again.exit, again.restarts, again.files) == (None, 1, {})


def test_second_start_of_one_attempt_does_not_run(run: Run) -> None:
    (run.folder / "results" / NAME / "7_0").mkdir(parents=True)
    marker = run.go("exit 0")
    assert marker.exit is None
    assert marker.fault.startswith("FileExistsError")


def test_image_is_copied_once_and_compared(run: Run) -> None:
    (run.images / f"{HEX}.sqsh").write_bytes(b"squashfs")
    digest = hashlib.sha256(b"squashfs").hexdigest()
    run.job |= {"source": "archive", "archive": digest}
    assert run.go("cmp @IMAGE@ " + str(run.images / f"{HEX}.sqsh")).exit == 0
    assert len(list(run.scratch.glob(f"*/{digest}.sqsh"))) == 1
    run.job["archive"] = "0" * 64
    run.code("exit 0", "--attempt=8_0")
    assert f"has sha256 {digest}, expected 000" in run.marker("8_0.done").fault
    assert not list(run.scratch.glob("*/0*.sqsh"))


def test_kit_of_another_image_is_refused(run: Run) -> None:
    kit = run.images / f"{HEX}.kit"
    kit.mkdir()
    (kit / "manifest.json").write_text('{"digest": "sha256:00"}')
    run.job["source"] = "kit"
    assert "is of sha256:00, expected" in run.go("exit 0").fault


def test_failed_preparation_is_a_fault_with_its_output(run: Run) -> None:
    run.job["prepare"] = [["sh", "-c", "echo no space left; exit 3"]]
    marker = run.go(WRITE)
    assert marker.exit is None
    assert "sh exited with 3: no space left" in marker.fault


def test_scratch_of_others_is_not_used(run: Run) -> None:
    folder = run.scratch / f"vllm-forge-{Path('/proc/self').stat().st_uid}"
    folder.mkdir()
    folder.chmod(0o777)
    assert "can be written by others" in run.go(WRITE).fault


def test_sigterm_reaches_the_job(run: Run) -> None:
    trap = "trap 'printf part > @OUTPUT@/kernel.json; exit 92' TERM"
    script = f"{trap}; echo ready; while :; do sleep 0.05; done"
    with run.start(script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
    assert run.marker().exit == 92
    assert set(run.marker().files) == {"kernel.json"}


def test_sigterm_reaches_a_job_that_is_just_started(monkeypatch: pytest.MonkeyPatch) -> None:
    class Popen(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **settings: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            super().__init__(*args, **settings)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert node.wait_for(["sleep", "5"]) == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


def test_program_is_of_the_oldest_python_of_nodes() -> None:
    """docs/operate/cluster.md says so."""
    ast.parse(Path(node.__file__).read_text(), feature_version=(3, 9))
