"""The quantization tools: a virtual environment of their own, hash-pinned and patched.

Its lock is plain requirements with the hashes of every file of each version, so that one lock
serves each Python from 3.11 on. It is made in the checkout's ``.nox`` by uv, without root.
"""

import hashlib
import os
import sys
import tomllib
from functools import partial
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from uv import find_uv_bin

from vllm_forge.checkpoints.errors import ToolEnvironmentError
from vllm_forge.host import Runner, exclusive, report, require_disk, write_whole
from vllm_forge.host.errors import CommandFailedError
from vllm_forge.host.files import file_digest
from vllm_forge.patches import read_series
from vllm_forge.patches.wheel import patch_installed
from vllm_forge.project import Project
from vllm_forge.sources.errors import LockFileError
from vllm_forge.sources.index import CHECK_INDEX, index_url
from vllm_forge.sources.lock import INPUT_DIGEST, RESOLVED

INPUT = Path("docker/locks/quantize.in")
LOCK = Path("docker/locks/quantize.txt")
SERIES = Path("patches/transformers/5.17")
FOLDER = Path(".nox/quantize")
COMMAND = "nox -s lock -- --tools"
OLDEST_PYTHON = "3.11"
BYTES = 6_000_000_000  # installed; with uv's cache on the same disk most of it is shared
# Their progress bars and hints are not our commands' output; what they warn of is looked at.
# Threads that spin while they wait cost a factor of ten where cores are shared.
SETTINGS = {
    "COMPRESSED_TENSORS_LOG_LEVEL": "ERROR",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "LLM_COMPRESSOR_LOG_LEVEL": "ERROR",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


def prepare(project: Project) -> Path:
    """Make the environment, unless it is there and current; return its interpreter."""
    folder, lock = project.root / FOLDER, project.root / LOCK
    python = folder / "bin" / "python"
    _check_lock(project)
    patches = read_series(project.root / SERIES)
    # The project is installed from its folder: a checkout that was moved needs another environment.
    parts = [lock.read_bytes(), sys.version.encode(), os.fsencode(project.root.resolve())]
    parts += [patch.path.read_bytes() for patch in patches]
    stamp = folder / hashlib.sha256(b"\0".join(parts)).hexdigest()
    with exclusive("tools-quantize", wait=True):
        if stamp.exists():
            return python
        require_disk(folder, BYTES)
        with report("install the quantization tools"):
            _uv("venv", "--clear", f"--python={sys.executable}", str(folder))
            install = ("pip", "install", f"--python={python}")
            _uv(*install, "--require-hashes", f"--requirements={lock}")
            _uv(*install, "--no-deps", f"--editable={project.root}")
            patch_installed(next((folder / "lib").glob("python3.*/site-packages")), patches)
        stamp.touch()
    return python


def enter(project: Project, argv: list[str]) -> None:
    """Become ``python -m vllm_forge <argv>`` of the environment, unless we are it already."""
    if Path(sys.prefix).resolve() == (project.root / FOLDER).resolve():
        return
    python = prepare(project)
    os.execve(python, [str(python), "-m", "vllm_forge", *argv], {**SETTINGS, **os.environ})  # noqa: S606


def make_lock(project: Project) -> Path:
    """Resolve the input file and the project's dependencies, and write the lock."""
    text = _uv(
        "pip", "compile", str(INPUT), "pyproject.toml", "--quiet", "--universal", "--no-header",
        "--no-annotate", "--generate-hashes", "--only-binary=:all:",
        f"--python-version={OLDEST_PYTHON}", cwd=project.root,
    )  # fmt: skip
    header = [
        "# The quantization tools, for every Python from 3.11 on. Made by:",
        f"#     {COMMAND}",
        f"# Do not edit: change {INPUT.name} and make it again.",
        f"# input: {file_digest(project.root / INPUT)}",
    ]
    write_whole(project.root / LOCK, "\n".join([*header, text]))
    return project.root / LOCK


def _check_lock(project: Project) -> None:
    path = project.root / LOCK
    refused = partial(LockFileError, where=path, remedy=f"run: {COMMAND}")
    if not path.is_file():
        raise refused("the quantization tools have no lock")
    text = path.read_text(encoding="utf-8")
    stated = INPUT_DIGEST.search(text)
    if stated is None or stated["digest"] != file_digest(project.root / INPUT):
        raise refused(f"the lock was not made for what {INPUT.name} now says")
    locked = {canonicalize_name(row["name"]): row["version"] for row in RESOLVED.finditer(text)}
    pyproject = tomllib.loads((project.root / "pyproject.toml").read_text(encoding="utf-8"))
    for need in map(Requirement, pyproject["project"]["dependencies"]):
        version = locked.get(canonicalize_name(need.name))
        if version is None or version not in need.specifier:
            raise refused(f"pyproject.toml asks for {need}, the lock has {version or 'none'}")


def _uv(*arguments: str, cwd: Path | None = None) -> str:
    # The index is not an option: every user of the host can read a command line.
    settings = {"UV_DEFAULT_INDEX": index_url()}
    try:
        return Runner().run([find_uv_bin(), *arguments], cwd=cwd, env=settings)
    except CommandFailedError as error:
        remedy = f"{CHECK_INDEX}; a file whose hash differs is not the one that was locked"
        raise ToolEnvironmentError(error.what, where=error.where, remedy=remedy) from None
