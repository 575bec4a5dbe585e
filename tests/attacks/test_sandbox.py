"""Answers with code: what a hostile program does to the host, to its judge, and to its verdict."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.isolation import require_isolation
from vllm_forge.bench import sandbox
from vllm_forge.bench.errors import SandboxError, WorkloadFileError
from vllm_forge.bench.sandbox import Verdict, judge
from vllm_forge.bench.workloads import Item
from vllm_forge.host import which

SECRET = "the-expected-value"  # noqa: S105
EQUAL = "class E:\n    def __eq__(self, other): return True\n    __hash__ = object.__hash__\n"
# Programs, and how they must be judged: `f` is to return SECRET.
CHEATS = {
    "right": (f"def f(): return {SECRET!r}", ""),
    "wrong": ("def f(): return 'x'", "AssertionError"),
    "exits": ("import os\nos._exit(0)", "ended early"),
    "exits when called": ("import os\ndef f(): os._exit(0)", "ended early"),
    "raises SystemExit": ("def f(): raise SystemExit(0)", "ended early"),
    "prints a verdict": (
        "print('{\"right\": true}\\npassed')\ndef f(): return 1", "AssertionError",
    ),
    "writes a verdict to all files": (
        "import os\nfor n in range(3, 64):\n    try: os.write(n, b'{\"right\": true}\\n')\n"
        "    except OSError: pass\ndef f(): return 1",
        "AssertionError",
    ),
    "is equal to all": (f"{EQUAL}def f(): return E()", "TypeError"),
    "is a text that is equal to all": (
        EQUAL.replace("class E", "class E(str)") + "def f(): return E('x')", "AssertionError",
    ),
    "hides in a list": (f"{EQUAL}def f(): return [E()]", "TypeError"),
    "patches assertions": (
        "import builtins, sys\nbuiltins.AssertionError = type('A', (BaseException,), {})\n"
        "sys.settrace(lambda *a: None)\ndef f(): return 1",
        "AssertionError",
    ),
    "patches JSON": (
        "import json\njson.dumps = lambda *a: '{\"right\": true}'\ndef f(): return 1",
        "AssertionError",
    ),
    "looks for the test": (
        "import gc, sys\ndef f():\n    sign, equal = 'etadidnac tressa'[::-1], ' =='[::-1]\n"
        "    texts = [str(o) for o in gc.get_objects()]\n"
        "    texts += [str(sys._getframe(n).f_locals) for n in (1, 2)]\n"
        "    found = [t for t in texts if sign in t and equal in t]\n"
        "    return found[0].split(equal)[1].strip()[1:-1] if found else 'not found'",
        "AssertionError",
    ),
    "nests deeply": ("def f():\n    x = []\n    for _ in range(9000): x = [x]\n    return x", ""),
    "raises a name of its own": (
        "def f(): raise type('right\\n\\x1b[2J' * 99, (Exception,), {})", "right \\x1b[2Jright",
    ),
    "returns a large result": ("def f(): return 'x' * (1 << 21)", "too large"),
    "has no function": ("g = 1", "KeyError"),
    "is not Python": ("def f(:", "SyntaxError"),
}  # fmt: skip
# What `f` does to the host, and what it must see of that.
DENIED = {
    "fork": ("import os\ndef f(): os.fork()", "BlockingIOError: 11"),
    "thread": ("import threading\ndef f(): threading.Thread(target=int).start()", "RuntimeError"),
    "memory": ("def f(): bytearray(1 << 30)", "MemoryError"),
    "memory in a file": (
        "import os\ndef f(): os.write(os.memfd_create('x'), b'x')", "OSError: 27"
    ),
    "shared memory": (
        "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\ndef f():\n"
        "    assert c.shmget(0, 4096, 0o1600) == -1\n    raise OSError(ctypes.get_errno(), '')",
        "OSError: 28",
    ),
    "write into the root": ("def f(): open('/x', 'w')", "OSError: 30"),
    "write into the system": ("def f(): open('/usr/x', 'w')", "OSError: 30"),
    "write into /tmp": ("def f(): open('/tmp/x', 'w')", "FileNotFoundError: 2"),
    "link": ("import os\ndef f(): os.symlink('/etc/shadow', '/usr/x')", "OSError: 30"),
    "read passwords": ("def f(): return open('/etc/shadow').read()", "FileNotFoundError: 2"),
    "read processes": ("import os\ndef f(): return os.listdir('/proc')", "FileNotFoundError: 2"),
    "read devices": ("import os\ndef f(): return os.listdir('/dev')", "FileNotFoundError: 2"),
    "become root": ("import os\ndef f(): os.setuid(0)", "OSError: 22"),
    "kill all": ("import os\ndef f(): os.kill(-1, 9)", "ProcessLookupError: 3"),
    "make namespaces": (
        "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\ndef f():\n"
        "    assert c.unshare(0x10000000) == -1\n    raise OSError(ctypes.get_errno(), '')",
        "OSError: 28",
    ),
    "mount": (
        "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\ndef f():\n"
        "    assert c.mount(b'x', b'/usr', b'tmpfs', 0, None) == -1\n"
        "    raise OSError(ctypes.get_errno(), '')",
        "PermissionError: 1",
    ),
    "trace process 1": (
        "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\ndef f():\n"
        "    assert c.ptrace(16, 1, 0, 0) == -1\n    raise OSError(ctypes.get_errno(), '')",
        "PermissionError: 1",
    ),
    "raise a limit": (
        "import resource\ndef f(): resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))",
        "ValueError",
    ),
}  # fmt: skip
REPORTED = """
try:
    f0()
except BaseException as error:
    seen = type(error).__name__ + (f": {error.errno}" if isinstance(error, OSError) else "")
else:
    seen = "allowed"
def f(): return seen
"""


@pytest.fixture(autouse=True, scope="module")
def isolation() -> None:
    require_isolation()


def verdict(program: str, expected: str, *, cpu: int = 10, seconds: float = 60.0) -> Verdict:
    test = f"def check(candidate):\n    assert candidate() == {expected!r}"
    item = Item("i", prompt="", test=test, entry="f")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "SECONDS", seconds)
        for name, most in (("RLIMIT_CPU", cpu), ("RLIMIT_AS", 1 << 28)):
            patch.setitem(sandbox.LIMITS, name, most)
        return judge(item, program)


@pytest.mark.parametrize("name", CHEATS)
def test_only_a_right_result_is_right(name: str) -> None:
    program, why = CHEATS[name]
    found = verdict(program, SECRET)
    assert found.right == (name == "right")
    assert why in found.why
    assert len(found.why) <= sandbox.MOST_REASON


@pytest.mark.parametrize("name", DENIED)
def test_program_is_denied(name: str) -> None:
    program, seen = DENIED[name]
    assert verdict(program.replace("def f()", "def f0()") + REPORTED, seen) == Verdict(right=True)


def test_program_is_nobody_without_groups_or_variables() -> None:
    program = (
        "import os\ndef f(): return [os.getresuid(), os.getresgid(), os.getgroups() in ([], "
        "[65534]), dict(os.environ), os.getpid() < 9, os.uname().nodename != '']"
    )
    nobody = (65534,) * 3
    expected = [nobody, nobody, True, {"LC_CTYPE": "C.UTF-8"}, True, True]
    found = verdict(program, "").why, verdict(program.replace("dict(os.environ)", "0"), "").why
    assert found == ("AssertionError", "AssertionError")
    test = f"def check(candidate):\n    assert candidate() in ({expected!r}, "
    test += f"{[*expected[:3], {}, *expected[4:]]!r})"
    item = Item("i", prompt="", test=test, entry="f")
    assert judge(item, program) == Verdict(right=True)


def test_program_sees_nothing_of_the_home_but_python() -> None:
    program = "import os\ndef f(path): return os.listdir(path) if os.path.isdir(path) else []"
    home, python = Path.home(), Path(sys.base_prefix)
    seen = [python.relative_to(home).parts[0]] if python.is_relative_to(home) else []
    test = f"def check(f):\n    assert f({str(home)!r}) == {seen!r}\n"
    test += f"    assert set(f('/')) <= {set(sandbox_roots(python))!r}"
    item = Item("i", prompt="", test=test, entry="f")
    assert judge(item, program) == Verdict(right=True)


def sandbox_roots(python: Path) -> list[str]:
    return ["usr", "lib", "lib64", python.parts[1]]


def test_program_reaches_no_network() -> None:
    name = f"\0vllm-forge-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(name)
        local.listen()
        port = server.getsockname()[1]
        program = (
            "import socket\ndef tried(family, address):\n"
            "    try: socket.socket(family).connect(address)\n"
            "    except OSError as error: return error.errno\n    return 0\n"
            f"def f(): return [tried(socket.AF_INET, ('127.0.0.1', {port})), "
            f"tried(socket.AF_UNIX, {name!r})]"
        )
        assert verdict(program, [101, 111]) == Verdict(right=True)  # type: ignore[arg-type]


ENDLESS: dict[str, tuple[str, dict[str, Any]]] = {
    "loop": ("def f():\n    while True: pass", {"cpu": 1}),
    "fork bomb": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        {"cpu": 1},
    ),
    "output": ("def f():\n    while True: print('x' * 65536)", {"cpu": 1}),
    "messages": (
        "import os\ndef f():\n    while True: os.write(FD, b'1' * 65536)", {"cpu": 1}
    ),
    "sleep in a session of its own": (
        "import ctypes, os, time, signal\nfor n in range(1, 65):\n"
        "    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "ctypes.CDLL(None).prctl(1, 0)\nos.setsid()\ndef f(): time.sleep(600)",
        {"seconds": 1.5},
    ),
}  # fmt: skip


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> bytes:
    """What the command lines of this test's sandboxes have."""
    word = f"mark-{os.getpid()}-{request.node.name.replace(' ', '-')}"
    argv = sandbox._argv
    monkeypatch.setattr(
        sandbox, "_argv",
        lambda *a: [x for y in argv(*a) for x in ((y, "-X", word) if y == "-B" else (y,))],
    )  # fmt: skip
    return word.encode()


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_program_is_ended_with_all_its_processes(name: str, mark: bytes) -> None:
    program, limits = ENDLESS[name]
    program = program.replace("FD", "int(__import__('sys').argv[-1])")
    assert not verdict(program, SECRET, **limits).right
    assert marked(mark) == []


def test_program_has_no_user_of_the_host(mark: bytes) -> None:
    """Seen from outside; inside, every user would be called nobody."""
    task = {"prompt": "", "program": "", "entry": "f"}
    with (
        sandbox._pipes(2) as (called, _, _, replies),
        sandbox._start("candidate", task, (called, replies), None),
    ):
        [status] = [
            (path.parent / "status").read_text()
            for path in marked(mark)
            if b"sandbox_init" not in content(path)
        ]
    fields = dict(line.split(":\t") for line in status.splitlines())
    user = "65534" if os.geteuid() == 0 else str(os.geteuid())
    assert fields["Uid"].split() == [user] * 4
    assert int(fields["CapBnd"], 16) >= int(fields["CapPrm"], 16) == int(fields["CapEff"], 16) == 0
    assert fields["NoNewPrivs"] == "1"


def marked(mark: bytes) -> list[Path]:
    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if mark in content(path)]


def content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


def test_files_of_a_judge_are_closed() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    verdict("import os\nos._exit(1)", SECRET)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_invalid_test_is_an_error_of_the_data() -> None:
    item = Item("i", prompt="", test="def check(f): pass", entry="f")
    with pytest.raises(WorkloadFileError, match="does not call"):
        judge(item, "def f(): return 1")


@pytest.mark.parametrize("missing", ["setpriv", "unshare"])
def test_missing_tool_is_refused(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "which", lambda name: None if name == missing else which(name))
    with pytest.raises(SandboxError, match=f"{missing} is not installed"):
        verdict(f"def f(): return {SECRET!r}", SECRET)


CALL = "from vllm_forge.bench.sandbox import require_sandbox as r; r(); print('isolated')"


def in_user_namespace(root: Path, script: str, *options: str) -> subprocess.CompletedProcess[str]:
    argv = ["unshare", "--user", *options, "sh", "-ec", f'{script} exec "$0" -c "$1"']
    environment = os.environ | {"PYTHONPATH": str(root / "src")}
    return subprocess.run(
        [*argv, sys.executable, CALL], env=environment, capture_output=True, text=True, check=False
    )


def test_plain_user_can_isolate(root: Path) -> None:
    done = in_user_namespace(root, "", "--map-user=1000", "--map-group=1000")
    assert done.stdout == "isolated\n", done.stderr


def test_host_without_user_namespaces_is_refused(root: Path) -> None:
    script = "echo 0 > /proc/sys/user/max_user_namespaces;"
    done = in_user_namespace(root, script, "--map-root-user")
    assert done.returncode
    assert (
        "SandboxError: cannot isolate a program: [Errno 28] unshare: No space left" in done.stderr
    )


@pytest.mark.parametrize("step", ["become_nobody", "build_root", "limit"])
def test_failing_step_is_refused(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step of the isolation can fail and leave a program running."""
    for name in ("sandbox_init.py", "sandbox_roles.py"):
        text = (sandbox.HERE / name).read_text()
        fault = f"def {step}(*_):\n    raise OSError('planted')\n\n\nif __name__"
        (tmp_path / name).write_text(text.replace("if __name__", fault))
    monkeypatch.setattr(sandbox, "HERE", tmp_path)
    with pytest.raises(SandboxError, match="cannot isolate a program: planted"):
        verdict(f"def f(): return {SECRET!r}", SECRET)
