"""Commands: printed, run, checked; or only recorded, for a dry run."""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vllm_forge.host import errors
from vllm_forge.host.console import console, printable
from vllm_forge.host.files import MOST_BYTES, exclusive

T = TypeVar("T")
TAIL_LINES = 30
DAY_S = 86400
PIECE = 1 << 16
POLL_S = 1.0  # between two looks at what a command has written
GRACE_S = 10  # from SIGTERM to SIGKILL; an engine unmounts what it has mounted
CONTAINER_GRACE_S = 60  # a run of the GPU suite ends its servers and writes its results
UNLABELLED = "--security-opt=label=disable"
PR_SET_PDEATHSIG = 1  # prctl(2)
OTHER_REPOSITORY = re.compile(r"GIT_(?!CONFIG)")


# Held while a command is started, so that `end_commands` misses none.
_starting = threading.RLock()
_running: set[subprocess.Popen[bytes]] = set()
stopping = threading.Event()  # no command may start any more


def end_commands() -> None:
    """End the commands that run, with all they started, and let no other start."""
    with _starting:
        stopping.set()
        for process in tuple(_running):  # a thread takes its command out when that has ended
            threading.Thread(target=_end, args=(process,)).start()


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)


def _start(
    argv: Sequence[str], death: str, env: Mapping[str, str] | None, **settings: Any
) -> "subprocess.Popen[bytes]":
    """Start a command, which gets the signal ``death`` where this program is killed."""
    program = which(argv[0])
    if program is None:
        what = f"{argv[0]} is not installed"
        remedy = "install it, or let the build do so with --provision"
        raise errors.ToolMissingError(what, where=shlex.join(argv), remedy=remedy)
    with _starting:
        if stopping.is_set():
            raise errors.CommandFailedError(f"{argv[0]} was not started", where="interrupted")
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", death, program, *argv[1:]],
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # mmdebstrap, when it fails, kills its whole process group
            **settings,
        )
        _running.add(process)
    return process


def _output(
    process: subprocess.Popen[bytes], seconds: float, excess: Callable[[], str]
) -> tuple[str, str, str]:
    """Stdout and stderr of a process until it has ended; and which limit it passed, if one."""
    end, limit = time.monotonic() + seconds, ""
    outputs = {process.stdout: bytearray(), process.stderr: bytearray()}
    with selectors.DefaultSelector() as pipes:
        for pipe, output in outputs.items():
            assert pipe is not None  # noqa: S101 - `Runner.run` opened both
            pipes.register(pipe, selectors.EVENT_READ, output)
        while pipes.get_map() and not limit:
            for key, _ in pipes.select(min(POLL_S, max(0, end - time.monotonic()))):
                key.data.extend(piece := os.read(key.fd, PIECE))
                if not piece:
                    pipes.unregister(key.fileobj)
                if len(key.data) > MOST_BYTES:
                    limit = f"printed more than {MOST_BYTES} bytes"
            if time.monotonic() >= end:
                limit = f"ran longer than {seconds:g} s"
            limit = limit or excess()
    if not limit:
        try:
            process.wait(max(0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            limit = f"ran longer than {seconds:g} s"
    stdout, stderr = (output.decode(errors="replace") for output in outputs.values())
    return stdout, stderr, limit


def run_container(argv: Sequence[str]) -> int:
    """Run a ``gpu_container`` on our own terminal; return its exit code.

    Where this program is to end, also by SIGKILL, the engine's client is asked to, passes that on,
    and gets a while. A client that is killed leaves its container behind, so that is removed.
    """
    engine, run, *options = argv
    name = f"vllm-forge-{os.getpid()}"
    client = ["setpriv", "--pdeathsig", "TERM", engine, run, f"--name={name}", *options]
    with subprocess.Popen(client) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(CONTAINER_GRACE_S)
            process.kill()
            subprocess.run([engine, "rm", "--force", name], capture_output=True, check=False)
            raise


@contextlib.contextmanager
def background(
    argv: Sequence[str], *, env: Mapping[str, str], log: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a command beside this program, its output in ``log``; it ends with the block.

    With it ends all that it started, also where this program is killed. ToolMissingError.
    """
    with log.open("wb") as out:
        # SIGTERM: an engine's client passes it on to its container.
        process = _start(argv, "TERM", env, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        _end(process)
        _running.discard(process)


def which(tool: str) -> str | None:
    """Path of a tool, also in the sbin folders that a plain user's PATH lacks."""
    path = os.environ.get("PATH", os.defpath)
    return shutil.which(tool, path=f"{path}:/usr/sbin:/sbin")


def git(root: Path, *argv: str) -> str | None:
    """What a git command prints of a checkout; None where it fails.

    Settings are kept: safe.directory may be one. GIT_DIR of a hook's repository is not.
    """
    command = ["git", "-C", str(root), *argv]
    env = {key: value for key, value in os.environ.items() if not OTHER_REPOSITORY.match(key)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def head_commit(root: Path) -> tuple[str | None, list[str]]:
    """The commit of a checkout, None where git has none; and the files that differ from it."""
    commit = git(root, "rev-parse", "--verify", "HEAD^{commit}")
    status = git(root, "status", "--porcelain", "--untracked-files=normal")  # see git-config(1)
    if commit is None or status is None:
        return None, []
    return commit.strip(), [row[3:] for row in status.splitlines()]


def gpu_container(
    engine: str,
    gpus: int | Sequence[str] | None,
    options: Sequence[str],
    image: str,
    command: Sequence[str],
) -> list[str]:
    """Docker's or podman's ``run``; ``command``: for the entrypoint.

    ``gpus``: their number, ids (index or UUID), or None for all.
    """
    # Docker counts GPUs itself; podman takes the names of the container device interface.
    if engine == "docker":
        chosen = "all" if gpus is None else str(gpus)
        if isinstance(gpus, Sequence):
            chosen = f'"device={",".join(gpus)}"'  # a row of CSV: the quotes are docker's
        devices = [f"--gpus={chosen}"]
    else:
        names = ["all"] if gpus is None else range(gpus) if isinstance(gpus, int) else gpus
        # SELinux hosts refuse the device nodes to a labelled container.
        devices = [*(f"--device=nvidia.com/gpu={name}" for name in names), UNLABELLED]
    return [engine, "run", *devices, *options, image, *command]


@contextlib.contextmanager
def worker_pool(workers: int | None = None, nice: int = 0) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes; they end with this one, and at once where it is interrupted.

    FileAccessError: the host has no place for their semaphores.
    """
    spawn = multiprocessing.get_context("spawn")
    try:
        processes = ProcessPoolExecutor(workers, spawn, _start_worker, (os.getpid(), nice))
    except OSError as error:
        what = f"cannot make semaphores for processes: {error.strerror}"
        remedy = "mount a tmpfs there that can be written"
        raise errors.FileAccessError(what, where="/dev/shm", remedy=remedy) from None  # noqa: S108 - a name
    with processes as pool:
        try:
            yield pool
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
            raise


def _start_worker(parent: int, nice: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before that
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: one of them reports it
    gc.disable()  # it would walk the entries of a layer again and again; a worker ends soon
    os.nice(nice)


@dataclass
class Runner:
    """Runs commands, which it prints first, and the project's own actions between them."""

    commands: list[list[str]] = field(default_factory=list)

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        seconds: float = DAY_S,
        excess: Callable[[], str] = str,
    ) -> str:
        """Run ``argv``, at most so many seconds; return its stdout.

        ``excess``: asked now and then, which limit of the caller it has passed, if one.

        Raises ToolMissingError; CommandFailedError: its exit code is not 0, the message has its
        output; CommandLimitError: it ran longer, printed more than MOST_BYTES, or see ``excess``.
        """
        self.commands.append(list(argv))
        console.print(f"  $ {shlex.join(argv)}", style="dim", markup=False)
        # A killed build takes its commands along: one that went on would write into the folders
        # of the next build.
        process = _start(argv, "KILL", env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            stdout, stderr, limit = _output(process, seconds, excess)
        finally:
            if process.returncode is None:
                _end(process)
            for pipe in filter(None, (process.stdout, process.stderr)):
                pipe.close()
            _running.discard(process)
        tail = "\n".join((stdout + stderr).strip().splitlines()[-TAIL_LINES:])
        if limit:
            what = f"{argv[0]} was ended, because it {limit}\n{tail}"
            remedy = "see its output above for what it waits for or repeats, then run this again"
            raise errors.CommandLimitError(what, where=shlex.join(argv), remedy=remedy)
        if (code := process.returncode) != 0:
            by = f"exited with {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
            what = f"{argv[0]} {by}\n{tail}"
            remedy = "see its output above; run the command by hand to see all of it"
            raise errors.CommandFailedError(what, where=shlex.join(argv), remedy=remedy)
        return stdout

    def act(self, what: str, action: Callable[[], T]) -> Callable[[], T]:
        """Do a step that is not a command; ``what`` is shown either way.

        Returns a function that gives the action's result. A dry run has none: there it raises.
        """
        console.print(f"  · {what}", style="dim", markup=False)
        result = action()
        return lambda: result

    def exclusive(self, name: str) -> AbstractContextManager[None]:
        """Hold the lock ``name`` while a step runs, after waiting for it."""
        return exclusive(name, wait=True)


class RecordingRunner(Runner):
    """The dry run: the same calls, printed to stdout, nothing done."""

    def run(self, argv: Sequence[str], **_: Any) -> str:
        self.commands.append(list(argv))
        self._line(shlex.join(argv))
        return ""

    def act(self, what: str, action: Callable[[], T]) -> Callable[[], T]:
        del action
        self._line(f"# {what}")

        def result() -> T:
            raise RuntimeError(f"not done in a dry run: {what}")

        return result

    def exclusive(self, name: str) -> AbstractContextManager[None]:
        del name
        return nullcontext()

    def _line(self, text: str) -> None:
        """One write: steps run in threads, and print() writes its newline on its own."""
        sys.stdout.write(f"{printable(text)}\n")
