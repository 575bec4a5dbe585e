"""Ends of the process: by a signal, a reader that has gone, a full disk; with a word and no orphan.

Commands have sessions of their own: nothing that they send to their process group reaches us.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vllm_forge.host import Runner
from vllm_forge.host.errors import CommandFailedError

# A command of the program that runs SCRIPT in a worker thread, as builds do.
PROGRAM = """
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from vllm_forge import cli
from vllm_forge.commands.parsers import command
from vllm_forge.host import Runner

def work(project, args):
    "Run a script twice."
    with ThreadPoolExecutor(1) as pool:
        jobs = [pool.submit(Runner().run, ["sh", "-c", sys.argv[1]]) for _ in range(2)]
        [job.result() for job in jobs]

cli.MODULES = [SimpleNamespace(register=lambda choices: command(choices, "work", work))]
sys.exit(cli.main(["work"]))
"""
TREE = "sleep 300 & echo $! >> {pids}; sleep 300 & echo $! >> {pids}; wait"


@contextmanager
def program(root: Path, *arguments: str, script: str = PROGRAM) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"VLLM_FORGE_ROOT": str(root), "PYTHONPATH": str(root / "src")}
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def lines_of(path: Path, count: int) -> list[str]:
    for _ in range(300):
        if path.exists() and len(lines := path.read_text().split()) >= count:
            return lines
        time.sleep(0.1)
    pytest.fail(f"nothing was written to {path}")


def alive(pid: str) -> bool:
    try:
        return "\nState:\tZ" not in Path("/proc", pid, "status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signal_ends_commands_and_their_children(
    root: Path, tmp_path: Path, number: signal.Signals
) -> None:
    pids = tmp_path / "pids"
    with program(root, TREE.format(pids=pids)) as process:
        started = lines_of(pids, 2)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 128 + number
        assert f"interrupted; what was finished is kept ({number.name})" in err
        assert "Traceback" not in err
    assert not [pid for pid in started if alive(pid)]
    assert pids.read_text().split() == started  # the second command was not started


def test_command_that_ignores_sigterm_is_killed(root: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = PROGRAM.replace(
        "\nsys.exit", "\nimport vllm_forge.host.run as run\nrun.GRACE_S = 1\nsys.exit"
    )
    with program(root, "trap '' TERM; " + TREE.format(pids=pids), script=script) as process:
        started = lines_of(pids, 2)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 128 + signal.SIGTERM
    assert not [pid for pid in started if alive(pid)]


def test_command_that_kills_its_group_does_not_kill_us() -> None:
    """As mmdebstrap does when the disk is full."""
    with pytest.raises(CommandFailedError) as failed:
        Runner().run(["sh", "-c", "echo no space left >&2; kill -HUP 0"])
    assert "was ended by SIGHUP" in str(failed.value)
    assert "no space left" in str(failed.value)


@pytest.mark.parametrize("arguments", [["plan", "b300"], ["plan", "b300", "--json"]])
def test_reader_that_has_gone_is_reported(root: Path, arguments: list[str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "vllm_forge", *arguments],
        env=os.environ | {"VLLM_FORGE_ROOT": str(root), "PYTHONPATH": str(root / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
    assert process.returncode == 128 + signal.SIGPIPE
    assert err.splitlines()[-1] == "stdout was closed: the output is incomplete (SIGPIPE)"


def test_full_disk_behind_stdout_is_reported(root: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vllm_forge", "plan", "b300"],
            env=os.environ | {"VLLM_FORGE_ROOT": str(root), "PYTHONPATH": str(root / "src")},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 33
    assert "FileAccessError" in done.stderr
    assert "No space left on device" in done.stderr


FOREGROUND = """
import sys
from types import SimpleNamespace
from vllm_forge import cli
from vllm_forge.commands.parsers import command
from vllm_forge.host import run_foreground

def work(project, args):
    "Run a script."
    run_foreground(["sh", "-c", sys.argv[1]])

cli.MODULES = [SimpleNamespace(register=lambda choices: command(choices, "work", work))]
sys.exit(cli.main(["work"]))
"""


def test_foreground_command_is_asked_to_end_before_it_is_killed(root: Path, tmp_path: Path) -> None:
    """A client of docker that is killed leaves its container behind."""
    pids, end = tmp_path / "pids", tmp_path / "end"
    script = (
        f"trap 'echo removed > {end}; exit' TERM; echo $$ $$ > {pids}; while :; do sleep 1; done"
    )
    with program(root, script, script=FOREGROUND) as process:
        started = lines_of(pids, 2)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 128 + signal.SIGTERM
    assert end.read_text() == "removed\n"
    assert not alive(started[0])
