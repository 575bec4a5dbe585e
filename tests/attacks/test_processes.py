"""Ends of the process: by a signal, a reader that has gone, a full disk; with a word and no orphan.

Commands have sessions of their own: nothing that they send to their process group reaches us.
"""

from __future__ import annotations

import errno
import multiprocessing.synchronize
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vllm_forge.host import Runner, worker_pool
from vllm_forge.host.errors import CommandFailedError, CommandLimitError, FileAccessError
from vllm_forge.images.engines import Buildx, ContainerRun

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
        assert process.returncode == 128 + number, err
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


def test_working_directory_that_is_gone_is_reported(root: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            "sh",
            "-c",
            'cd "$1"; rmdir "$1"; exec "$0" -m vllm_forge plan h200',
            sys.executable,
            tmp_path,
        ],
        env=os.environ | {"PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 33
    assert "FileAccessError" in done.stderr


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


GPU_RUN = """
import sys
from types import SimpleNamespace
from vllm_forge import cli
from vllm_forge.commands.parsers import command
import vllm_forge.host.run as run
run.CONTAINER_GRACE_S = 1

def work(project, args):
    "Run a container."
    run.run_container([sys.argv[1], "run", "--rm", "image"])

cli.MODULES = [SimpleNamespace(register=lambda choices: command(choices, "work", work))]
sys.exit(cli.main(["work"]))
"""


# A client of docker. Its container is a process of its own, which hears SIGTERM through the client.
DOCKER = f"""#!{sys.executable}
import os, signal, subprocess, sys
from pathlib import Path
record = Path(__file__).with_name(sys.argv[-1])  # of `rm --force NAME`
if sys.argv[1] == "run":
    (name,) = [word[7:] for word in sys.argv if word.startswith("--name=")]
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    container = subprocess.Popen(
        ["sh", "-c", os.environ["CONTAINER"]], start_new_session=True, **quiet)
    signal.signal(signal.SIGTERM, lambda *_: container.terminate())
    Path(__file__).with_name(name).write_text(str(container.pid))
    sys.exit(container.wait())
if sys.argv[1] == "rm" and record.exists():
    os.kill(int(record.read_text()), signal.SIGKILL)
"""
HEARS, IGNORES = "exec sleep 300", "trap '' TERM; exec sleep 300"


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The client, first on PATH; beside it are files named by containers, with their processes."""
    client = tmp_path / "bin" / "docker"
    client.parent.mkdir()
    client.write_text(DOCKER)
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{client.parent}:{os.environ['PATH']}")
    return client


def is_gone(pid: str) -> bool:
    for _ in range(50):
        if not alive(pid):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("container", "number"),
    [(HEARS, signal.SIGTERM), (IGNORES, signal.SIGTERM), (HEARS, signal.SIGKILL)],
)
def test_container_of_the_suite_ends_with_the_program(
    root: Path, docker: Path, container: str, number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It holds all GPUs of the host."""
    monkeypatch.setenv("CONTAINER", container)
    with program(root, str(docker), script=GPU_RUN) as process:
        (pid,) = lines_of(docker.with_name(f"vllm-forge-{process.pid}"), 1)
        process.send_signal(number)
        process.communicate(timeout=30)
        assert process.returncode == (128 + number if number != signal.SIGKILL else -number)
    assert is_gone(pid)


def test_container_of_the_checks_ends_without_its_client(
    docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ignores SIGTERM, by this run; one of a killed build, by the next."""
    monkeypatch.setenv("CONTAINER", IGNORES)
    monkeypatch.setattr("vllm_forge.host.run.GRACE_S", 1)
    run = ContainerRun(
        layout=tmp_path, name="image", lower_dirs=(), inputs=tmp_path, argv=("true",),
        seconds=1, work=tmp_path / "work", bytecode=tmp_path,
    )  # fmt: skip
    record = docker.with_name(run.container)
    with subprocess.Popen(["sleep", "300"], start_new_session=True) as former:
        record.write_text(str(former.pid))
        with pytest.raises(CommandLimitError, match="docker was ended, because it ran longer"):
            Buildx().run_in_image(Runner(), run)
        assert former.wait(10) == -signal.SIGKILL
    (pid,) = lines_of(record, 1)
    assert pid != str(former.pid)
    assert is_gone(pid)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("sleep 300", "ran longer than 1 s"),
        ("exec >&- 2>&-; sleep 300", "ran longer than 1 s"),
        ("echo so far >&2; sleep 300", "so far"),
        ("yes", "printed more than 67108864 bytes"),
        ("yes >&2", "printed more than 67108864 bytes"),
    ],
)
def test_command_without_end_is_ended(script: str, words: str) -> None:
    """A check inside an image is code of that image."""
    seconds = 60 if "yes" in script else 1
    with pytest.raises(CommandLimitError, match=words) as ended:
        Runner().run(["sh", "-c", script], seconds=seconds)
    assert ended.value.remedy


def test_output_is_read_from_both_streams() -> None:
    script = "seq 200000; seq 200000 >&2; printf '\\303'"
    assert Runner().run(["sh", "-c", script]).splitlines()[-2:] == ["200000", "\ufffd"]


# A container of the files that its shell needs; the shell is process 1, so SIGTERM is ignored.
CONTAINER = """
import sys
from pathlib import Path
from vllm_forge import cli
from types import SimpleNamespace
from vllm_forge.commands.parsers import command
from vllm_forge.host import Runner
from vllm_forge.images.engines import Buildah, ContainerRun
import vllm_forge.host.run as run
run.GRACE_S = 1

def work(project, args):
    "Run a container."
    base = Path(sys.argv[1])
    layers = (base / "rootfs", base / "empty")
    config = {"User": "0:0", "Env": ["PATH=/bin"]}
    script = f"sleep {sys.argv[2]} & sleep {sys.argv[2]} & wait"
    Buildah().run_in_image(Runner(), ContainerRun(
        layout=base, name="killed", lower_dirs=layers, config=config, inputs=base / "empty",
        argv=("/bin/sh", "-c", script), work=base / "work", bytecode=base / "bytecode"))

cli.MODULES = [SimpleNamespace(register=lambda choices: command(choices, "work", work))]
sys.exit(cli.main(["work"]))
"""
MOUNTED = ("proc", "dev", "tmp", "cache", "srv", "mnt")


def copy_with_libraries(tool: str, rootfs: Path) -> None:
    path = shutil.which(tool)
    assert path is not None
    libraries = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    for file in [word for word in libraries.split() if word.startswith("/")]:
        (rootfs / file[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, rootfs / file[1:])
    shutil.copy(path, rootfs / "bin" / tool)


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("runc"), reason="mounts an overlay, needs root and runc"
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_container_ends_with_the_program(
    root: Path, tmp_path: Path, number: signal.Signals
) -> None:
    for name in ("rootfs/bin", "empty", *(f"rootfs/{place}" for place in MOUNTED)):
        (tmp_path / name).mkdir(parents=True)
    for tool in ("sh", "sleep"):
        copy_with_libraries(tool, tmp_path / "rootfs")

    seconds = str(10**6 + os.getpid() * 10 + number % 10)  # no other test sleeps as long

    def sleeping() -> list[str]:
        rows = subprocess.run(
            ["ps", "-eo", "stat,args"], capture_output=True, text=True, check=True
        )
        ends = f" sleep {seconds}"
        return [row for row in rows.stdout.splitlines() if row.endswith(ends) and row[0] != "Z"]

    with program(root, str(tmp_path), seconds, script=CONTAINER) as process:
        for _ in range(100):
            if len(sleeping()) == 2 or process.poll() is not None:
                break
            time.sleep(0.1)
        assert len(sleeping()) == 2, process.communicate()[1]
        process.send_signal(number)
        process.communicate(timeout=30)
    for _ in range(50):
        if not sleeping():
            break
        time.sleep(0.1)
    assert not sleeping()


POOL = """
import os, sys, time
from types import SimpleNamespace
from vllm_forge import cli
from vllm_forge.commands.parsers import command
from vllm_forge.host import worker_pool

def job(path):
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(300)

def work(project, args):
    "Run jobs."
    with worker_pool(2) as pool:
        jobs = [pool.submit(job, sys.argv[1]) for _ in range(8)]
        [each.result() for each in jobs]

if __name__ == "__main__":
    cli.MODULES = [SimpleNamespace(register=lambda choices: command(choices, "work", work))]
    sys.exit(cli.main(["work"]))
"""


def test_host_without_semaphores_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def lock(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))  # of sem_open, without a name

    monkeypatch.setattr(multiprocessing.synchronize, "Lock", lock)
    with pytest.raises(FileAccessError, match="semaphores for processes: Read-only"), worker_pool():
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_worker_processes_end_with_the_program(
    root: Path, tmp_path: Path, number: signal.Signals
) -> None:
    pids, file = tmp_path / "pids", tmp_path / "pool.py"
    file.write_text(POOL)
    with subprocess.Popen(
        [sys.executable, file, pids],
        env=os.environ | {"VLLM_FORGE_ROOT": str(root), "PYTHONPATH": str(root / "src")},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        started = lines_of(pids, 2)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        _, err = process.communicate(timeout=30)
    code = -number if number == signal.SIGKILL else 128 + number
    assert process.returncode == code
    assert "Traceback" not in err
    for _ in range(50):
        if not (left := [pid for pid in started if alive(pid)]):
            break
        time.sleep(0.1)
    assert not left


@pytest.mark.parametrize(
    ("closed", "arguments", "code"),
    [
        ("<&-", "ci buildkite", 0),
        (">&-", "ci buildkite", 0),
        (">&-", "plan nosuch --json", 10),
        ("2>&-", "ci buildkite", 0),
        ("2>&-", "plan nosuch", 10),
        ("<&- >&- 2>&-", "ci buildkite", 0),
        ("<&- >&- 2>&-", "plan nosuch --json", 10),
        ("2> /dev/full > /dev/full", "plan nosuch", 10),
        ("2> /dev/full > /dev/full", "plan nosuch --json", 10),
    ],
)
def test_closed_streams_keep_the_exit_code(
    root: Path, closed: str, arguments: str, code: int
) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m vllm_forge {arguments} {closed}"],
        env=os.environ | {"VLLM_FORGE_ROOT": str(root), "PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
