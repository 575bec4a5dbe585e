"""Where the code under test and the native helpers are, and how these are compiled.

The code under test is that of the installed vLLM. Helpers (tools, an allocator, and the mutants of
the kernel) are compiled from the release's source, once for a run of the suite, in the folder that
``VLLM_FORGE_RACE_FOLDER`` names. Each is one nvcc process of 10 to 20 seconds; several run at a
time, each with a time-out, and one that fails does not stop the others. What is there already, for
the same text, is kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.harness.device import query
from tests.gpu.race import sass
from tests.gpu.race.mutants import BY_NAME, FOLDER, Mutant, lay_out

VARIABLE = "VLLM_FORGE_RACE_FOLDER"
MOE, BASE = "_moe_C_stable_libtorch.abi3.so", "_C_stable_libtorch.abi3.so"
NATIVE = Path(__file__).with_name("native")
TOOLS = ("tools", "red_zones")
TIMEOUT = 240
TORCH_LIBRARIES = ("torch", "torch_cpu", "torch_cuda", "c10", "c10_cuda")
# As in the release's CMakeLists.txt for _moe_C_stable_libtorch.
DEFINES = ("-DTORCH_TARGET_VERSION=0x020B000000000000ULL", "-DUSE_CUDA")


def folder() -> Path:
    """Folder of what is compiled for this run; skips where none is named."""
    named = os.environ.get(VARIABLE)
    if not named:
        pytest.skip(f"{VARIABLE} is not set: run the suite with tests.gpu.harness.run")
    return Path(named)


def wheel_library(name: str = MOE) -> Path:
    """The library under test."""
    spec = importlib.util.find_spec("vllm")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(place) / name).is_file():
            return path
    pytest.skip(f"no {name}: run this where the line's vLLM is installed, as in its image")


@cache
def native() -> dict[str, dict[str, Any]]:
    """Name -> ``path`` or ``error`` of helpers and mutants; empty where none can be built."""
    source = release_source()
    if source is None or not source.is_dir() or (chain := toolchain()) is None:
        return {}
    out = folder() / "native"
    with _lock(out):
        built = build_all(out, source, chain)
    return {
        name: row | ({"path": out / row["library"]} if "library" in row else {})
        for name, row in built.items()
    }


def release_source() -> Path | None:
    """What of the release's source mutants are made of, if a folder with it is named."""
    named = os.environ.get("VLLM_FORGE_RELEASE_SOURCE")
    return Path(named) if named else None


def _lock(out: Path):  # type: ignore[no-untyped-def]
    """Held while compiling: several processes may want the same."""
    out.mkdir(parents=True, exist_ok=True)
    file = (out / "build.lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


@cache
def _arch() -> str:
    """The GPU's own code, e.g. ``90a``, asked of the driver.

    Not of torch: that would make its allocator, and another can be put in its place only before.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0]
    return query("compute_cap", gpu=first)[0][0].replace(".", "") + "a"


def native_library(name: str) -> Path:
    """A helper or mutant."""
    row = native().get(name, {})
    if "path" in row:
        return Path(row["path"])
    reason = row.get("error", "no nvcc, or no source of the release")
    pytest.skip(f"no {name}: {reason}")


@dataclass(frozen=True, kw_only=True)
class Toolchain:
    """What a build uses.

    Attributes:
        nvcc: the compiler.
        torch: the package's folder, with its headers and libraries.
        cuda: more folders of headers.
        arch: e.g. ``90a``.
    """

    nvcc: Path
    torch: Path
    cuda: tuple[Path, ...]
    arch: str


def toolchain() -> Toolchain | None:
    """What this machine has; None without nvcc or torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    torch = Path(spec.origin).parent
    site = torch.parent
    places = (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc", site / "nvidia/cu13/bin/nvcc")
    nvcc = next((Path(place) for place in places if place and Path(place).is_file()), None)
    if nvcc is None or not (torch / "include").is_dir():
        return None
    # torch_utils.h includes cuBLAS's header, which a toolkit may lack and torch's wheels bring.
    more = [site / "nvidia" / "cu13" / "include", NATIVE / "headers"]
    cuda = tuple(path for path in more if path.is_dir())
    return Toolchain(nvcc=nvcc, torch=torch, cuda=cuda, arch=_arch())


def build_all(out: Path, source: Path, chain: Toolchain) -> dict[str, dict[str, Any]]:
    """Build what is missing.

    Args:
        out: gets ``NAME.so`` and ``build.json``.
        source: the release's tree.
        chain: the tools.

    Returns:
        Name -> ``library`` or ``error``, ``seconds``, ``sass`` (what the audit says of a mutant).
    """
    known = json.loads((out / "build.json").read_text()) if (out / "build.json").exists() else {}
    names = [*TOOLS, *BY_NAME]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        rows = list(pool.map(lambda name: _build(name, out, source, chain, known), names))
    result = dict(zip(names, rows, strict=True))
    (out / "build.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _build(
    name: str, out: Path, source: Path, chain: Toolchain, known: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    mutant = BY_NAME.get(name)
    text = _text(name, mutant, source)
    key = hashlib.sha256(text + chain.arch.encode()).hexdigest()
    library = out / f"{name}.so"
    if library.exists() and known.get(name, {}).get("key") == key:
        return known[name]
    started = time.monotonic()
    try:
        if mutant is None:
            _compile(chain, NATIVE / f"{name}.cu", library, ["-cudart", "static"])
        else:
            _compile_mutant(mutant, source, chain, library)
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        return {"error": f"{type(error).__name__}: {reason[-1500:]}"}
    seconds = round(time.monotonic() - started, 1)
    row: dict[str, Any] = {"library": library.name, "key": key, "seconds": seconds}
    if mutant is not None:
        row["sass"] = sass.audit_library(library, chain.torch)
    return row


def _text(name: str, mutant: Mutant | None, source: Path) -> bytes:
    if mutant is None:
        return (NATIVE / f"{name}.cu").read_bytes()
    parts = [repr(mutant).encode()]
    parts += [path.read_bytes() for path in sorted((source / FOLDER).iterdir()) if path.is_file()]
    return b"".join(parts)


def _compile_mutant(mutant: Mutant, source: Path, chain: Toolchain, library: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f"forge-{mutant.name}-") as scratch:
        folder = Path(scratch)
        includes = [folder, source / "csrc"]
        system = [chain.torch / "include", chain.torch / "include/torch/csrc/api/include"]
        options = ["--expt-relaxed-constexpr", "-lineinfo", *DEFINES]
        options += [f"-I{path}" for path in includes]
        options += [f"-isystem={path}" for path in (*system, *chain.cuda)]
        options += ["-cudart", "static", f"-L{chain.torch / 'lib'}"]
        options += [f"-l{name}" for name in TORCH_LIBRARIES]
        _compile(chain, lay_out(mutant, source, folder), library, options)


def _compile(chain: Toolchain, text: Path, library: Path, options: list[str]) -> None:
    aside = library.with_suffix(".part")
    target = f"-gencode=arch=compute_{chain.arch},code=sm_{chain.arch}"
    common = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-Xcompiler", "-w", "-w"]
    subprocess.run(
        [str(chain.nvcc), *common, target, *options, "-o", str(aside), str(text)],
        check=True, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    aside.replace(library)
