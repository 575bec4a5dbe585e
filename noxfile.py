"""The door: ``nox -l`` is the menu. Thin sessions, each one call into vllm_forge."""

from __future__ import annotations

import fcntl
import hashlib
import sys
import tomllib
from pathlib import Path

import nox

ROOT = Path(__file__).parent
MATRIX = tomllib.loads((ROOT / "matrix.toml").read_text(encoding="utf-8"))

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "test"]


def tool(session: nox.Session, name: str, extras: str = "") -> str:
    """Path of a command in an environment that all sessions share, made on first use.

    An environment per session would install the project a dozen times, and asking an installer
    on every call costs more than most commands; so a stamp says for which pyproject.toml the
    environment was made. ``extras`` (for tests and linters) have one of their own.
    """
    folder = ROOT / ".nox" / ("develop" if extras else "vllm-forge")
    stamp = folder / hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)  # two sessions may start at once
        if not stamp.exists():
            # virtualenv comes with nox; venv may lack ensurepip (Debian's python3 without -venv)
            session.run(sys.executable, "-m", "virtualenv", "--quiet", "--clear", str(folder))
            pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
            session.run(*pip, "--editable", f"{ROOT}{extras}")
            stamp.touch()
    return str(folder / "bin" / name)


def develop(session: nox.Session, name: str) -> str:
    """Path of a test or lint command."""
    return tool(session, name, "[test,lint]")


def forge(session: nox.Session, *command: str) -> None:
    """Run one vllm-forge command with the arguments after ``--``."""
    session.run(tool(session, "vllm-forge"), *command, *session.posargs)


def _build_session(sku: str, arch: str) -> None:
    short = arch.replace("_", "")

    @nox.session(name=f"build-{short}")
    def build(session: nox.Session) -> None:
        forge(session, "build", sku)

    build.__doc__ = build.func.__doc__ = (
        f"Build the image for {sku} ({arch}). Options: --line, --engine, --prewarm, --dry-run"
    )


for _sku, _row in MATRIX["sku"].items():
    _build_session(_sku, _row["arch"])


@nox.session
def lock(session: nox.Session) -> None:
    """Resolve a line with uv and write its hash-pinned lock. Options: --line."""
    forge(session, "lock")


@nox.session
def fetch(session: nox.Session) -> None:
    """Download a line's wheels, resumable and hash-checked. Options: --line."""
    forge(session, "fetch")


@nox.session
def patches(session: nox.Session) -> None:
    """Apply every series: no fuzz, no offset, locked trees. Options: --line, --update, --export."""
    forge(session, "patches")


@nox.session
def prove(session: nox.Session) -> None:
    """Run each patch's proof without it (red) and with it (green), as root. Options: --line."""
    forge(session, "prove")


@nox.session
def drift(session: nox.Session) -> None:
    """Say what each release does to each patch. Options: --from, --to."""
    forge(session, "drift")


@nox.session
def wheel(session: nox.Session) -> None:
    """Write a line's patched wheel. Options: --line, --output."""
    forge(session, "wheel")


@nox.session
def oracle(session: nox.Session) -> None:
    """Ask each line's vLLM which kernels it selects, as root. Options: --line, --update."""
    forge(session, "oracle")


@nox.session
def plan(session: nox.Session) -> None:
    """Say what a cell is: pins, kernels, needs, command. Options: --sku, --line, --json."""
    forge(session, "plan")


@nox.session(name="why-rebuild")
def why_rebuild(session: nox.Session) -> None:
    """Say which input of an image changed since its last build. Options: --sku, --line."""
    forge(session, "why-rebuild")


@nox.session
def doctor(session: nox.Session) -> None:
    """Say what a host lacks to serve a preset. Options: --sku, --line, --preset, --artifact."""
    forge(session, "doctor")


@nox.session
def serve(session: nox.Session) -> None:
    """Serve a preset in its image. Options: --sku, --preset, --artifact, --line, --print."""
    forge(session, "serve")


@nox.session
def census(session: nox.Session) -> None:
    """Say which kernels each line has code for, on each SKU. Options: --line, --update."""
    forge(session, "census")


@nox.session
def docs(session: nox.Session) -> None:
    """Write all generated pages from the records. Options: --check."""
    forge(session, "docs")


@nox.session
def quantize(session: nox.Session) -> None:
    """Quantize a BF16 DeepSeek-V4. Options: --model, --recipe, --output, --data, --device."""
    forge(session, "quantize")


@nox.session(name="inspect-checkpoint")
def inspect_checkpoint(session: nox.Session) -> None:
    """Say what a checkpoint is and what each line does with it. Options: --line, --json."""
    forge(session, "inspect-checkpoint")


@nox.session
def verdicts(session: nox.Session) -> None:
    """Let every line's vLLM load every tiny checkpoint, as root."""
    forge(session, "verdicts")


@nox.session
def tiny(session: nox.Session) -> None:
    """Make tiny checkpoints, good and broken, in the cache. Options: names of variants."""
    forge(session, "tiny")


@nox.session(name="test-gpu")
def test_gpu(session: nox.Session) -> None:
    """Run the GPU suite and write receipts. Options: --sku, --image, --env, --tier, -n."""
    forge(session, "test-gpu")


@nox.session(name="gpu-kit")
def gpu_kit(session: nox.Session) -> None:
    """Write the suite for a GPU host offline. Options: --sku, --output, --freeze, --max-part."""
    forge(session, "gpu-kit")


@nox.session
def receipts(session: nox.Session) -> None:
    """Verify all receipts, on any host. Options: --result, --key, --signed, --update."""
    forge(session, "receipts")


@nox.session
def clean(session: nox.Session) -> None:
    """Delete what the cache holds and no line needs any more. Options: --all."""
    forge(session, "clean")


@nox.session
def test(session: nox.Session) -> None:
    """Run the tests: unit, and a small real image where an engine is. Options: --provision."""
    args = list(session.posargs)
    if "--provision" in args:
        args.remove("--provision")
        session.run(tool(session, "vllm-forge"), "provision", "--registry")
    session.run(develop(session, "pytest"), "-n", "auto", "--dist", "loadgroup", *args)


@nox.session(name="test-checkpoints")
def test_checkpoints(session: nox.Session) -> None:
    """Run the tests that need the quantization tools, which are installed apart."""
    printed = session.run(tool(session, "vllm-forge"), "tools", silent=True)
    python = str(printed).split()[-1]
    session.run(python, "-m", "pytest", "tests/checkpoints", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check types (mypy --strict), style (ruff), and every preset by what each line's vLLM says."""
    session.run(develop(session, "ruff"), "check", ".")
    session.run(develop(session, "ruff"), "format", "--check", ".")
    session.run(develop(session, "mypy"))
    session.run(tool(session, "vllm-forge"), "lint-presets")


@nox.session
def bench(session: nox.Session) -> None:
    """Time a full build and its parts; writes benchmarks/results. Options: --line, --sku."""
    session.run(tool(session, "python"), "benchmarks/build.py", *session.posargs)
