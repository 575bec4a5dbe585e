"""Tests with NVIDIA's tools: the line's compiler and cuobjdump, from their wheels. No GPU.

They use the host's cache: about 100 MB of wheels on first use, none afterwards.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from vllm_forge.errors import ForgeError
from vllm_forge.host import atomic_path, cache_root, exclusive
from vllm_forge.images.content import wheel_groups
from vllm_forge.images.store import usable
from vllm_forge.images.wheels import site_packages
from vllm_forge.matrix import image_cell, load
from vllm_forge.sources import LockedWheel, Wheelhouse, read_lock, read_wheels
from vllm_forge.sources.errors import (
    DistributionNotFoundError,
    DownloadInterruptedError,
    IndexUnreachableError,
)

ROOT = Path(__file__).parents[2]
COMPILER = ("nvidia-cuda-crt", "nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-nvvm")
NO_INDEX = (IndexUnreachableError, DownloadInterruptedError, DistributionNotFoundError)
KERNEL = """
__global__ void add(float *x) { x[threadIdx.x] += 1.0f; }
__global__ void scale(float *x, float by) { x[threadIdx.x] *= by; }
"""


@dataclass(frozen=True)
class Toolkit:
    """A folder like CUDA's own: bin, include, nvvm."""

    home: Path

    def run(self, tool: str, *args: str | Path, cwd: Path | None = None) -> str:
        """The output of a tool that must succeed."""
        done = subprocess.run(
            [self.home / "bin" / tool, *args], capture_output=True, text=True, check=False, cwd=cwd
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def accepts(self, tool: str, *args: str | Path) -> bool:
        """Whether a tool succeeds."""
        done = subprocess.run([self.home / "bin" / tool, *args], capture_output=True, check=False)
        return done.returncode == 0

    def referee(self, library: Path) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
        """What cuobjdump says of a library: (kind, target), and (target, kernel) of its cubins."""
        codes: Counter[tuple[str, str]] = Counter()
        names: Counter[tuple[str, str]] = Counter()
        kind = target = ""
        for line in self.run("cuobjdump", "--dump-elf-symbols", library).splitlines():
            words = line.split()
            if line.startswith("Fatbin "):
                kind = {"elf": "cubin", "ptx": "ptx", "nvvm": "lto"}[words[1]]
            elif line.startswith("arch = "):
                target = words[2].removeprefix("sm_")
                codes[kind, target] += 1
            elif words[:1] == ["FUNC"] and "ENTRY" in words:
                names[target, words[-1]] += 1
        return codes, names


@pytest.fixture(scope="session")
def toolkit() -> Toolkit:
    """nvcc of the default line's lock, with cuobjdump."""
    if shutil.which("g++") is None:
        pytest.skip("nvcc needs the host's g++: install it to run this")
    matrix = load(ROOT)
    name = matrix.default_line
    lock = read_lock(ROOT, name, matrix.line[name], matrix.base)
    _, own = read_wheels(Path(__file__).parent / "requirements.txt", "sorted, with hashes")
    wheels = [*(lock.find(wanted) for wanted in COMPILER), *own]
    try:
        Wheelhouse().fetch(wheels)
    except NO_INDEX as error:
        pytest.skip(f"with a package index that answers, this would run: {error.what}")
    return Toolkit(_unpacked(wheels) / "nvidia" / "cu13")


def _unpacked(wheels: list[LockedWheel]) -> Path:
    key = hashlib.sha256("".join(wheel.sha256 for wheel in wheels).encode()).hexdigest()
    home = cache_root() / "toolkit" / key
    with exclusive("toolkit", wait=True):
        if not home.exists():
            with atomic_path(home) as aside:
                for wheel in wheels:
                    with zipfile.ZipFile(Wheelhouse().verify(wheel)) as archive:
                        archive.extractall(aside)
                for tool in (*aside.glob("nvidia/cu*/bin/*"), *aside.glob("nvidia/cu*/nvvm/bin/*")):
                    if tool.is_file():
                        tool.chmod(0o755)
    return home


@pytest.fixture(scope="session")
def compiled(
    toolkit: Toolkit, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, tuple[str, ...]], Path]:
    """A function that makes a library of two kernels for some targets, with some options."""
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "kernels.cu").write_text(KERNEL)

    def make(targets: str, options: tuple[str, ...] = ()) -> Path:
        name = hashlib.sha256(repr((targets, options)).encode()).hexdigest()[:16]
        library = folder / f"{name}.so"
        if not library.exists():
            codes = [
                argument
                for target in targets.split()
                for argument in ("-gencode", _gencode(target))
            ]
            shared = ["-shared", "-cudart=none", "-Xcompiler=-fPIC", "-o", str(library)]
            toolkit.run("nvcc", *codes, *options, *shared, "kernels.cu", cwd=folder)
        return library

    return make


def _gencode(target: str) -> str:
    """``120f`` is machine code, ``ptx:80`` PTX, ``lto:90`` LTO code."""
    kind, _, name = target.rpartition(":")
    prefix = {"": "sm", "ptx": "compute", "lto": "lto"}[kind]
    return f"arch=compute_{name},code={prefix}_{name}"


def line_sites(name: str) -> tuple[Path, ...]:
    """The site-packages of a line's layers, those with device code last.

    The test is skipped where they were not written.
    """
    matrix = load(ROOT)
    line = matrix.line[name]
    cell = image_cell(matrix, line.skus[0], name)
    try:
        lock = read_lock(ROOT, name, line, matrix.base)
        layers = [usable(group.key) for group in wheel_groups(cell, lock)]
    except ForgeError as error:
        pytest.skip(f"with a current lock of line {name} this would run: {error.what}")
    if None in layers:
        pytest.skip(f"after a build of line {name} this would run: its layers are not in the cache")
    folders = [folder for layer in layers if layer for folder in (layer.files, layer.code)]
    return tuple(folder / site_packages(line.python) for folder in folders)
