"""Compile the native parts of the race tests: tools, allocator, and the mutants of the kernel.

Each is one nvcc process of 10 to 20 seconds; several run at a time, each with a time-out, and one
that fails does not stop the others. What is there already, for the same text, is kept.
"""

from __future__ import annotations

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
from pathlib import Path
from typing import Any

from tests.gpu.race import sass
from tests.gpu.race.mutants import FOLDER, MUTANTS, Mutant, lay_out

NATIVE = Path(__file__).with_name("native")
TOOLS = ("tools", "red_zones")
TIMEOUT = 240
TORCH_LIBRARIES = ("torch", "torch_cpu", "torch_cuda", "c10", "c10_cuda")
# As in the release's CMakeLists.txt for _moe_C_stable_libtorch.
DEFINES = ("-DTORCH_TARGET_VERSION=0x020B000000000000ULL", "-DUSE_CUDA")


@dataclass(frozen=True, kw_only=True)
class Toolchain:
    """What a build uses.

    Attributes:
        nvcc: the compiler.
        torch: the package's folder, with its headers and libraries.
        cuda: more folders of headers.
        archs: e.g. ``90a``.
    """

    nvcc: Path
    torch: Path
    cuda: tuple[Path, ...]
    archs: tuple[str, ...]

    @property
    def targets(self) -> list[str]:
        return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]


def toolchain(archs: tuple[str, ...], torch: Path | None = None) -> Toolchain | None:
    """What this machine has; None without nvcc or torch."""
    if torch is None:
        spec = importlib.util.find_spec("torch")
        torch = Path(spec.origin).parent if spec is not None and spec.origin else None
    candidates = [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    site = torch.parent if torch is not None else Path("/nonexistent")
    candidates.append(str(site / "nvidia" / "cu13" / "bin" / "nvcc"))
    nvcc = next((Path(name) for name in candidates if name and Path(name).is_file()), None)
    if nvcc is None or torch is None or not (torch / "include").is_dir():
        return None
    # torch_utils.h includes cuBLAS's header, which a toolkit may lack and torch's wheels bring.
    more = [site / "nvidia" / "cu13" / "include", NATIVE / "headers"]
    return Toolchain(nvcc=nvcc, torch=torch, cuda=tuple(p for p in more if p.is_dir()), archs=archs)


def build_all(
    out: Path, source: Path, chain: Toolchain, *, jobs: int | None = None
) -> dict[str, dict[str, Any]]:
    """Build what is missing.

    Args:
        out: gets ``NAME.so`` and ``build.json``.
        source: the release's tree.
        chain: the tools.
        jobs: compilers at a time; by default one per processor.

    Returns:
        Name -> ``library`` or ``error``, ``seconds``, ``sass`` (what the audit says of a mutant).
    """
    out.mkdir(parents=True, exist_ok=True)
    known = json.loads((out / "build.json").read_text()) if (out / "build.json").exists() else {}
    names = [*TOOLS, *(mutant.name for mutant in MUTANTS)]
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        rows = list(pool.map(lambda name: _build(name, out, source, chain, known), names))
    result = dict(zip(names, rows, strict=True))
    (out / "build.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _build(
    name: str, out: Path, source: Path, chain: Toolchain, known: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    mutant = next((mutant for mutant in MUTANTS if mutant.name == name), None)
    text = _text(name, mutant, source)
    key = hashlib.sha256(text + " ".join(chain.archs).encode()).hexdigest()
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
        return {"error": _reason(error)}
    row: dict[str, Any] = {"library": library.name, "key": key, "archs": list(chain.archs)}
    row["seconds"] = round(time.monotonic() - started, 1)
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
    common = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-Xcompiler", "-w", "-w"]
    subprocess.run(
        [str(chain.nvcc), *common, *chain.targets, *options, "-o", str(aside), str(text)],
        check=True, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    aside.replace(library)


def _reason(error: Exception) -> str:
    said = getattr(error, "stderr", None)
    return f"{type(error).__name__}: {(said or str(error))[-1500:]}"
