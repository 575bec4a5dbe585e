"""Execution of answers with code, only isolated; without isolation refused.

Candidate and checker are a sandbox each: new namespaces (user, mount, PID, network, IPC, UTS), user
nobody without capabilities, a read-only root with /usr and Python, no /proc, /dev or /tmp, and
resource limits. They share two pipes. Only the checker has the tests, so what a candidate prints,
patches or exits with is not a verdict.
"""

import contextlib
import json
import os
import select
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from vllm_forge.bench.errors import SandboxError, WorkloadFileError
from vllm_forge.bench.sandbox_init import STARTED
from vllm_forge.bench.workloads import Item
from vllm_forge.host import parse_json, printable, which

HERE = Path(__file__).resolve().parent
NAMESPACES = ("--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child=KILL")
SECONDS = 60.0  # of both processes, by the clock: a busy host gives them less CPU time than that
LIMITS = {  # of each of the two processes, see getrlimit(2)
    "RLIMIT_CPU": 10, "RLIMIT_AS": 1 << 30, "RLIMIT_NPROC": 1, "RLIMIT_FSIZE": 0,
    "RLIMIT_NOFILE": 32, "RLIMIT_CORE": 0, "RLIMIT_MSGQUEUE": 0, "RLIMIT_MEMLOCK": 0,
}  # fmt: skip
MOST_VERDICT = 1 << 16
MOST_REASON = 100  # characters
GRACE_S = 10.0
REMEDY = (
    "run this as root, or allow user namespaces (sysctl user.max_user_namespaces, "
    "kernel.apparmor_restrict_unprivileged_userns=0), on Linux 5.14 or newer, outside a container"
)


@dataclass(frozen=True)
class Verdict:
    """``why``: what a wrong program did."""

    right: bool
    why: str = ""


PROBE = Item("probe", prompt="", test="def check(f): assert f(1) == 1", entry="f")


def require_sandbox() -> None:
    """SandboxError unless a right program is right here."""
    if (verdict := judge(PROBE, "def f(x): return x")) != Verdict(right=True):
        raise SandboxError(f"the sandbox does not run Python: {verdict.why}", remedy=REMEDY)


def judge(item: Item, program: str) -> Verdict:
    """Run a program against an item's test, which defines ``check(function)``.

    The item's prompt precedes both. SandboxError; WorkloadFileError for a test that is wrong.
    """
    end = time.monotonic() + SECONDS
    names = {"prompt": item.prompt, "entry": item.entry}
    with ExitStack() as stack:
        called, calls, replied, replies, verdict, said = stack.enter_context(_pipes(3))
        task = {**names, "program": program}
        stack.enter_context(_start("candidate", task, (called, replies), None))
        task = {**names, "test": item.test}
        stack.enter_context(_start("checker", task, (calls, replied), said))
        for end_of_child in (called, replies, calls, replied, said):
            end_of_child.close()  # each process is to see the end of the other
        text = _read(verdict, end)
    if not text:
        late = time.monotonic() >= end
        return Verdict(right=False, why="time limit" if late else "its results ended the checker")
    reply = parse_json(text)
    if "fault" in reply:
        what = f"invalid test of {item.entry}: {printable(reply['fault'])}"
        raise WorkloadFileError(what, remedy="correct the data of the workload")
    why = " ".join(printable(reply.get("why", "")).split())  # a name that the program chose
    return Verdict(right=reply["right"], why=why[:MOST_REASON])


@contextmanager
def _pipes(count: int) -> Iterator[list[FileIO]]:
    """Read and write end of each pipe."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(FileIO(end, mode))
            for _ in range(count)
            for end, mode in zip(os.pipe(), "rw", strict=True)
        ]


@contextmanager
def _start(
    role: str, task: dict[str, str], pipes: Sequence[FileIO], stdout: FileIO | None
) -> Iterator[None]:
    """A sandbox with a program of `sandbox_roles`; all its processes end with the block."""
    with (
        tempfile.TemporaryDirectory(prefix="vllm-forge-sandbox-") as root,
        subprocess.Popen(
            argv := _argv(role, root, [str(pipe.fileno()) for pipe in pipes]),
            stdin=subprocess.PIPE,
            stdout=stdout or subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[pipe.fileno() for pipe in pipes],
            cwd="/",
            start_new_session=True,
        ) as process,
    ):
        assert process.stdin is not None  # noqa: S101
        assert process.stderr is not None  # noqa: S101
        with contextlib.suppress(BrokenPipeError):  # the message has the reason
            process.stdin.write(json.dumps(task).encode() + b"\n")
            process.stdin.flush()
        try:
            message = process.stderr.readline().decode(errors="replace")
            if message != STARTED:
                what = f"cannot isolate a program: {printable(message).strip() or 'it was ended'}"
                raise SandboxError(what, where=shlex.join(argv[3:11]), remedy=REMEDY)
            yield
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # process 1 ends, and all others with it
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _argv(role: str, root: str, pipes: Sequence[str]) -> list[str]:
    tools = {name: which(name) for name in ("setpriv", "unshare")}
    for name, path in tools.items():
        if path is None:
            raise SandboxError(f"{name} is not installed", remedy="install util-linux")
    # Of a virtual environment, the Python that it was made of.
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    own = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    program = (HERE / "sandbox_roles.py").read_text(encoding="utf-8")
    isolated = [python, "-I", "-S", "-B", "-X", "utf8"]
    return [
        str(tools["setpriv"]), "--pdeathsig", "KILL", str(tools["unshare"]), *own, *NAMESPACES,
        *isolated, str(HERE / "sandbox_init.py"), root, os.path.realpath(sys.base_prefix),
        json.dumps(LIMITS), *isolated, "-c", program, role, *pipes,
    ]  # fmt: skip


def _read(pipe: FileIO, end: float) -> bytes:
    """All that is written into a pipe until then."""
    content = b""
    while len(content) < MOST_VERDICT:
        if not select.select([pipe], [], [], max(0, end - time.monotonic()))[0]:
            return b""
        if not (piece := pipe.read(MOST_VERDICT)):
            return content
        content += piece
    return b""
