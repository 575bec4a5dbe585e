"""Sessions of benchmarks in a kit: they need no more than the image has, and run to their end."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.sessions import FOLDER, WORKLOADS
from vllm_forge.bench import turns
from vllm_forge.bench.errors import InvalidResultError, SessionFileError
from vllm_forge.bench.results import read_arm
from vllm_forge.bench.session import PLAN, read_session
from vllm_forge.bench.validity import require_comparable
from vllm_forge.gputest.sessions import write_sessions
from vllm_forge.host import Reply
from vllm_forge.sources import read_wheels

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SUBJECT = "4" * 64
GPU = "0, NVIDIA H200, 9.0, 580.1, 143771, Disabled, Completed, Success\n"
IMPORTED = """
import json, sys
from importlib.metadata import packages_distributions
import vllm_forge.bench.turns, vllm_forge.bench.null_server
names = packages_distributions()
print(json.dumps(sorted({n for m in sys.modules for n in names.get(m.partition(".")[0], [])})))
"""


class StubProbe:
    def ask(self, name: str, argv: Sequence[str]) -> Reply:
        return Reply(code=0, text=GPU)


@pytest.fixture
def suite_plan() -> dict[str, Any]:
    """What `launch.make_plan` says of the image."""
    return {"subject": {"name": "x", "sha256": SUBJECT}, "tree": "1" * 40, "lock_sha256": "0" * 64,
            "caches": {"key": {"tree": "7c43"}}}  # fmt: skip


def sessions(folder: Path, port: int) -> list[Path]:
    """Those of the checkout, on another port and shorter."""
    shutil.copytree(FOLDER, folder)
    paths = sorted(folder.glob("*.toml"))
    for path in paths:
        text = re.sub(r"(?m)^port = .*\n", "", path.read_text())
        text = re.sub(r"\b800[0-3]\b", str(port), text)
        text = re.sub(r"(?m)^starts = .*", f"starts = 1\nport = {port}", text)
        path.write_text(text.replace("max_tokens = 128", "max_tokens = 4"))
    return paths


def bundle_of(root: Path, tmp_path: Path, plan: dict[str, Any], paths: list[Path]) -> Path:
    bundle = tmp_path / "bundle"
    (bundle / "src" / "vllm_forge").mkdir(parents=True)
    shutil.copyfile(root / "src/vllm_forge/__init__.py", bundle / "src/vllm_forge/__init__.py")
    inputs = {f"checkpoints/{name}": tmp_path for name in ("card", "exact")}
    write_sessions(bundle, plan, root=root, paths=paths, inputs=inputs)
    return bundle


@pytest.mark.parametrize("name", WORKLOADS)
def test_workload_is_the_generated_one(name: str) -> None:
    assert (FOLDER / name).read_bytes() == WORKLOADS[name](), (
        "run: python -m tests.support.sessions"
    )


def test_sessions_of_the_checkout_can_run_side_by_side() -> None:
    ports = [read_session(path).port for path in FOLDER.glob("*.toml")]
    assert len(set(ports)) == len(ports) > 1


def test_carried_code_needs_only_packages_of_the_images(
    root: Path, tmp_path: Path, suite_plan: dict[str, Any]
) -> None:
    bundle = bundle_of(root, tmp_path, suite_plan, sorted(FOLDER.glob("*.toml")))
    assert json.loads((bundle / "caches.json").read_text()) == suite_plan["caches"]["key"]
    site = [path for path in sys.path if "site-packages" in path]
    done = subprocess.run(
        [sys.executable, "-S", "-c", IMPORTED], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": os.pathsep.join([str(bundle / "src"), *site])},
    )  # fmt: skip
    imported = {re.sub(r"[-_.]+", "-", name).lower() for name in json.loads(done.stdout)}
    assert {"aiohttp", "pydantic", "rich"} <= imported
    for lock in sorted((root / "docker" / "locks").glob("0.*.txt")):
        assert imported - {"vllm-forge"} <= {w.name for w in read_wheels(lock, "")[1]}, lock


@pytest.mark.parametrize("fault", ["", "drafts"])
def test_sessions_of_the_checkout_run_to_their_end(
    fault: str, root: Path, tmp_path: Path, suite_plan: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With a fake server; the counters of the exact model are those that the workload predicts."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    paths = sessions(tmp_path / "sessions", port)
    if fault:  # the model drafts one token more than its file was made for
        path = tmp_path / "sessions" / "exact.jsonl"
        path.write_text(path.read_text().replace('"drafts":31', '"drafts":32'))
    program = tmp_path / "vllm"
    other = '[ "$1" = bench ] && { echo "$@" > "$(dirname "$0")/bench"; exit; }'
    program.write_text(
        f'#!/bin/sh\n{other}\nexec {sys.executable} -m tests.support.bench_server "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr(turns, "POLL_S", 0.02)
    monkeypatch.setattr("vllm_forge.bench.measure.client_rate", lambda *_: 1e12)
    folder = bundle_of(root, tmp_path, suite_plan, paths) / "bench"
    for path in folder.glob(f"*/{PLAN}"):  # /cache is the image's
        path.write_text(path.read_text().replace('"/cache/', f'"{tmp_path}/cache/'))
    output = tmp_path / "out"

    def run(name: str) -> None:
        turns.run_plan(folder / name, output / name, probe=StubProbe())

    if fault:
        with pytest.raises(InvalidResultError, match=r"counted, .* predicted"):
            run("exact-mtp")
        return
    for name in ("exact-mtp", "tiny-again", "tiny-mtp", "tiny-tp2"):
        run(name)
    paths = [*output.glob("exact-mtp/*-c*.json"), *output.glob("tiny-mtp/*-c*.json")]
    arms = {path.stem: read_arm(path) for path in paths}
    assert arms.keys() == {"exact-c4", "plain-c8", "mtp-c8"}
    assert {path.name for path in output.glob("tiny-again/*-c*.json")} == {
        "again-c8.json",
        "mtp-c8.json",
    }
    pair = [read_arm(output / "tiny-tp2" / f"tp{number}-c8.json") for number in (1, 2)]
    assert [arm.result.server.gpus for arm in pair] == [1, 2]
    require_comparable(*pair)
    kernels = {start.kernels for arm in pair for start in arm.result.starts}
    assert kernels == {("Using AttentionBackendEnum.TRITON_ATTN backend",)}
    assert {arm.result.server.image for arm in arms.values()} == {f"sha256:{SUBJECT}"}
    (start,) = arms["exact-c4"].result.starts
    assert start.window is not None and start.window.predicted is not None
    change = start.window.change
    assert change["per_position"] == start.window.predicted.per_position
    assert 0 < change["per_position"][1] <= change["per_position"][0] < change["drafts"]
    asked = (tmp_path / "bench").read_text()
    assert f"--base-url=http://127.0.0.1:{port}" in asked
    assert f"--result-dir={output / 'tiny-tp2' / 'crosscheck' / '00'}" in asked
    assert len(arms["plain-c8"].rows) == len(arms["mtp-c8"].rows) == 64


def test_session_that_a_kit_cannot_run_is_refused(
    root: Path, tmp_path: Path, suite_plan: dict[str, Any]
) -> None:
    path, *_ = sessions(tmp_path / "sessions", 8000)
    text = path.read_text()
    for old, new, message in (
        ('checkpoint = "exact"', 'checkpoint = "other"', "--checkpoint other=DIR"),
        ("starts = 1", 'starts = 1\ndiffers = ["gpus"]', "GPUs of the arms: exact 1"),
        (text[text.index("[arm.exact]") :], '[arm.exact]\npreset = "mtp"', "needs a container"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(SessionFileError) as error:
            bundle_of(root, tmp_path / message, suite_plan, [path])
        assert message in str(error.value)
