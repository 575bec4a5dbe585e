"""A BuildKit daemon elsewhere, by buildx: its address, its version, the layers it sends back."""

import os
import posixpath
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm_forge.errors import UsageError
from vllm_forge.host import Runner, console, hash_of, open_plain, remove
from vllm_forge.host.errors import CommandFailedError
from vllm_forge.images.docker_api import require_version
from vllm_forge.images.errors import EngineUnreachableError, LayoutError, SizeBudgetError
from vllm_forge.images.layer import OPAQUE, WHITEOUT, plain_path

# Schemes of buildx's remote driver (docker/buildx, driver/remote, and BuildKit's connhelpers).
SCHEMES = ("tcp", "kube-pod", "unix", "docker-container", "podman-container", "ssh")
ADDRESS = re.compile(rf"(?:{'|'.join(SCHEMES)})://[\w.~:/?&=@%\[\]-]+", re.ASCII)
PASSWORD = re.compile(r"[a-z-]+://[^/@]*:[^/@]*@")
LOOPBACK = re.compile(r"tcp://(localhost|127\.[\d.]+|\[::1\])(:\d+)?")
NAME = re.compile(r"[A-Za-z][\w.-]*", re.ASCII)  # docker/buildx, store/util.go
OLDEST_BUILDKIT = (0, 13)  # the first that knows rewrite-timestamp; an older one ignores it
UNKNOWN = "v0.0.0"  # of Debian's dockerd
ANSWER_S = 60
# Layers come as plain tars, and the budget of the system is of compressed ones: Debian's packages
# have 2.6 bytes for each.
PLAIN_RATIO = 5
LEAST_FILE = 4096  # bytes that a file takes, also an empty one
REMEDY_TLS = (
    "for TLS: docker buildx create --driver remote --driver-opt cacert=..,cert=..,key=.. "
    "--name NAME tcp://.., then --builder NAME"
)


def require_builder(text: str) -> None:
    """UsageError unless it is an address or a name."""
    if not ADDRESS.fullmatch(text) and not NAME.fullmatch(text):
        what = f"invalid --builder {text!r}: expected an address ({'://, '.join(SCHEMES)}://)"
        raise UsageError(f"{what} or the name of a builder of docker buildx")
    if PASSWORD.match(text):  # every user of the host reads command lines
        raise UsageError("invalid --builder: its address has a password", remedy=REMEDY_TLS)


@contextmanager
def remote_builder(runner: Runner, builder: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Name of a builder for buildx, and environment with which it is known.

    One for an address is made in a folder of its own, so that none of the user's is changed.
    """
    if "://" not in builder:
        yield builder, {}
        return
    name = f"vllm-forge-{hash_of(builder)[:12]}"
    with tempfile.TemporaryDirectory() as folder:
        env = {"BUILDX_CONFIG": folder}
        runner.run(
            ["docker", "buildx", "create", f"--name={name}", "--driver=remote", builder], env=env
        )
        yield name, env


def warn_of_plain_tcp(builder: str) -> None:
    """Say what an address without TLS means, unless it is of this host."""
    if builder.startswith("tcp://") and not LOOPBACK.fullmatch(builder):
        what = f"warning: {builder} has no TLS: who is on the network can change the system layers"
        console.print(f"{what}; {REMEDY_TLS}", markup=False)


def check_builder(runner: Runner, name: str, env: Mapping[str, str]) -> None:
    """Raises EngineUnreachableError: no BuildKit answers; EngineTooOldError."""
    argv = ["docker", "buildx", "inspect", "--bootstrap", name]
    try:
        answer = runner.run(argv, env=env, seconds=ANSWER_S)
    except CommandFailedError as error:
        remedy = f"check its address and that BuildKit runs there; {REMEDY_TLS}"
        raise EngineUnreachableError(error.what, where=error.where, remedy=remedy) from error
    version = re.search(r"^BuildKit(?: version)?:\s*(\S+)", answer, re.MULTILINE)
    if version is not None and not version[1].startswith(UNKNOWN):
        require_version(version[1], OLDEST_BUILDKIT, "BuildKit")


@contextmanager
def bounded(folder: Path, budget_mb: int) -> Iterator[Callable[[], str]]:
    """Bound what a daemon sends to a folder; yields ``excess`` of `Runner.run`.

    The folder is removed if the command fails. SizeBudgetError: more than the budget allows.
    """
    most = PLAIN_RATIO * budget_mb * 10**6

    def excess() -> str:
        return f"sent more than {most} bytes" if _size(folder) > most else ""

    failed: CommandFailedError | None = None
    try:
        yield excess
    except CommandFailedError as error:
        failed = error
    over = excess()
    if over or failed:
        remove(folder)
    if over:
        what = f"the builder {over}: {PLAIN_RATIO} times the system's budget of {budget_mb} MB"
        remedy = "see what that BuildKit sends; if the system has grown, raise the budget there"
        raise SizeBudgetError(what, where="matrix.toml, base.budget_mb", remedy=remedy) from failed
    if failed:
        raise failed


def _size(folder: Path) -> int:
    """Bytes below a folder that another program writes to."""
    size = 0
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with suppress(OSError):  # it was renamed meanwhile
                size += max(LEAST_FILE, os.lstat(f"{place}/{name}").st_size)
    return size


def unpack_layers(tars: Sequence[Path], root: Path) -> None:
    """Unpack plain layers, lowest first, with owners and modes, into a new folder.

    Raises LayoutError: a file or a whiteout leads out of it.
    """
    root.mkdir()
    for tar in tars:
        members = _members(tar)
        _require_inside(root, members)
        for member in members:
            folder, _, base = plain_path(member.name).rpartition("/")
            if base.startswith(WHITEOUT):
                _white_out(root / folder, base)
        # GNU tar refuses `..`, and makes links that lead out when all files are written.
        argv = ["tar", "--extract", f"--file={tar}", f"--directory={root}", "--numeric-owner"]
        argv.append(f"--exclude={WHITEOUT}*")
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise LayoutError(f"tar cannot unpack it: {done.stderr.strip()[-500:]}", where=tar)


def _members(tar: Path) -> list[tarfile.TarInfo]:
    try:
        with open_plain(tar) as file, tarfile.open(fileobj=file, mode="r:") as layer:
            return layer.getmembers()
    except (tarfile.TarError, ValueError) as error:
        raise LayoutError(f"not a plain tar: {error}", where=tar) from error


def _require_inside(root: Path, members: Sequence[tarfile.TarInfo]) -> None:
    """Raise LayoutError for a file or a whiteout behind a lower layer's link that leads out."""
    paths = {plain_path(member.name) for member in members if member.isdir()}
    for member in members:
        names = [member.name, member.linkname] if member.islnk() else [member.name]
        paths |= {posixpath.dirname(plain_path(name)) for name in names}
    top = root.resolve()
    for path in paths:
        if "\0" in path or not Path(os.path.realpath(top / path)).is_relative_to(top):
            raise LayoutError(f"{path} leads out of the image", where=root)


def _white_out(folder: Path, base: str) -> None:
    """Delete what a whiteout in a folder names."""
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()) if base == OPAQUE else [folder / base[len(WHITEOUT) :]]:
        remove(path)
