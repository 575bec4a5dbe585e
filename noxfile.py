"""The everyday menu; `nox -s forge -- COMMAND ...` reaches every command of vllm-forge."""

from __future__ import annotations

import fcntl
import hashlib
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nox

if sys.version_info < (3, 11):  # noqa: UP036  (nox itself may run on an older one)
    sys.exit(f"vllm-forge needs Python 3.11 or newer; nox runs on {sys.version.split()[0]}")

import tomllib

ROOT = Path(__file__).parent
try:
    SKUS = tomllib.loads((ROOT / "matrix.toml").read_text(encoding="utf-8"))["sku"]
    ARCHES = {name: row["arch"] for name, row in SKUS.items()}
except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
    sys.exit(f"cannot read the [sku] rows of matrix.toml: {error!r}")

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "test"]


def tool(session: nox.Session, name: str, extras: str = "") -> str:
    """Path of a command in an environment that all sessions share, made on first use.

    An environment per session would install the project a dozen times, and asking an installer
    on every call costs more than most commands; so a stamp says for which pyproject.toml the
    environment was made. ``extras`` (for tests and linters) have one of their own; without them,
    it is for every command.
    """
    folder = ROOT / ".nox" / ("develop" if extras else "vllm-forge")
    stamp = folder / hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)  # two sessions may start at once
        if not stamp.exists():
            # virtualenv comes with nox; venv may lack ensurepip (Debian's python3 without -venv)
            session.run(
                sys.executable, "-m", "virtualenv", "--quiet", "--clear", str(folder),
                stdout=sys.stderr,
            )  # fmt: skip
            session.run(
                str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet",
                "--editable", f"{ROOT}{extras or '[bench]'}", stdout=sys.stderr,
            )  # fmt: skip
            stamp.touch()
    return str(folder / "bin" / name)


def run(*argv: str) -> None:
    """Run a command on our own stdout and stderr; a failure ends nox with its exit code.

    Session.run would write stderr to stdout too, and turn every exit code into 1.
    """
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: object) -> None:
        if not started:
            sys.exit(128 + number)
        started[0].send_signal(number)

    for number in (signal.SIGTERM, signal.SIGHUP):  # before the command can be waited for
        signal.signal(number, pass_on)
    with subprocess.Popen(argv, cwd=ROOT) as process:
        started.append(process)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the command by itself
        code = process.wait()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def forge(session: nox.Session, *command: str) -> None:
    """Run a vllm-forge command with the arguments after ``--``."""
    run(tool(session, "vllm-forge"), *command, *session.posargs)


def menu(name: str, text: str, *command: str) -> None:
    """Add a session that is one command of vllm-forge."""

    def call(session: nox.Session) -> None:
        forge(session, *command)

    call.__doc__ = text
    nox.session(name=name)(call)


for _sku, _arch in ARCHES.items():
    _only = Counter(ARCHES.values())[_arch] == 1  # SKUs that share an arch go by their own names
    _name = _arch.replace("_", "") if _only else _sku
    menu(f"build-{_name}", f"Build the image for {_sku} ({_arch}).", "build", _sku)
menu("doctor", "Check whether this host can serve a preset.", "doctor")
menu("plan", "Show what a cell is: pins, kernels, needs, command.", "plan")
menu("serve", "Serve a preset in its image, or --print the command.", "serve")
menu("patches", "Apply every series: no fuzz, no offset, locked trees.", "patch", "check")
menu(
    "prove",
    "Run each patch's proof without it (red) and with it (green), as root.",
    "patch",
    "prove",
)
menu("lock", "Resolve a line with uv and write its hash-pinned lock.", "wheels", "lock")
menu("test-gpu", "Run the GPU suite on this host and write receipts.", "gpu", "test")
menu("release", "Build, sign, push and verify an image, then name it.", "release")
menu("verify", "Verify an image: bytes, statements, who signed them.", "verify")
menu("docs", "Write all generated pages from the records, or --check them.", "docs")
menu("bench", "Measure and compare: run, quality, workload, gate, ...; alone lists all.", "bench")
menu("forge", "Run any other command: dispatch, gpu, kernels, ...; -- --help lists all.")


@nox.session
def test(session: nox.Session) -> None:
    """Run the tests. Options: --provision, --checkpoints, --cov; others are pytest's."""
    args = list(session.posargs)
    if args == ["--help"]:
        print(
            f"{test.__doc__}\n\n"
            "  --provision    install the tools that the tests of real images need (apt, as root)\n"
            "  --checkpoints  run only tests/checkpoints, with the quantization tools (5 GB)\n"
            "  --cov          report coverage and the slowest tests\n"
            "  -h             pytest's own options"
        )
        return
    if "--provision" in args:
        args.remove("--provision")
        run(tool(session, "vllm-forge"), "provision", "--registry")
    if "--cov" in args:
        args.remove("--cov")
        args += ["--cov=vllm_forge", "--durations=25"]
    if "--checkpoints" in args:
        args.remove("--checkpoints")
        argv = [tool(session, "vllm-forge"), "checkpoint", "tools"]
        python = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        run(python[-1], "-m", "pytest", "tests/checkpoints", *args)
        return
    run(tool(session, "pytest", "[test,lint]"), "-n", "auto", "--dist", "loadgroup", *args)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, spelling, types (mypy --strict) and every preset. Options: --line."""
    if "--help" not in session.posargs:
        for argv in (
            ["ruff", "check", "."],
            ["ruff", "format", "--check", "."],
            ["codespell"],
            ["mypy"],
        ):
            run(tool(session, argv[0], "[test,lint]"), *argv[1:])
    forge(session, "lint")
