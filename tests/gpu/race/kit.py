"""Where the code under test and the native helpers are.

The code under test is that of the installed vLLM, or of a folder that
``tests.support.prepare_race`` made, packed. Helpers are compiled from the release's source, if
there is nvcc, or taken from that folder.
``VLLM_FORGE_RACE_KIT`` names another folder than ``dist/gpu/race``.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.harness.device import query
from tests.gpu.race.build import build_all, toolchain

VARIABLE = "VLLM_FORGE_RACE_KIT"
REPO = Path(__file__).parents[3]
ARCHIVE, MANIFEST = "kit.tar.xz", "manifest.json"
MOE, BASE = "_moe_C_stable_libtorch.abi3.so", "_C_stable_libtorch.abi3.so"
HOW_TO_MAKE = "`python -m tests.support.prepare_race dist/gpu/race` makes it"


def folder() -> Path:
    """The kit's folder; it may not be there."""
    return Path(os.environ.get(VARIABLE) or REPO / "dist" / "gpu" / "race")


@cache
def unpacked() -> Path | None:
    """The kit, unpacked once for all processes; None where there is no kit."""
    archive = folder() / ARCHIVE
    if not archive.is_file():
        return None
    target = folder() / "unpacked"
    with (folder() / "unpack.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = target / f"{archive.stat().st_size}-{archive.stat().st_mtime_ns}"
        if not stamp.exists():
            with tarfile.open(archive, "r:xz") as tar:
                tar.extractall(target, filter="data")
            stamp.touch()
    return target


def manifest() -> dict[str, Any]:
    """What the kit holds, with digests; empty without one."""
    path = folder() / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def wheel_library(name: str = MOE) -> Path:
    """The library under test: that of the installed vLLM, else the folder's."""
    spec = importlib.util.find_spec("vllm")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(place) / name).is_file():
            return path
    kit = unpacked()
    if kit is not None and (path := kit / "lib" / name).is_file():
        return path
    pytest.skip(f"no {name}: install the line's vLLM, or bring a kit; {HOW_TO_MAKE}")


@cache
def native() -> dict[str, dict[str, Any]]:
    """Name -> ``path`` or ``error`` of the helpers and mutants; compiled if the kit has none."""
    kit = unpacked()
    prebuilt = kit / "native" if kit is not None else None
    if prebuilt is not None and (prebuilt / "build.json").is_file():
        known = json.loads((prebuilt / "build.json").read_text())
        if all("library" in row and _arch() in row["archs"] for row in known.values()):
            return {name: row | {"path": prebuilt / row["library"]} for name, row in known.items()}
    source = release_source()
    chain = toolchain((_arch(),))
    if chain is None or source is None or not source.is_dir():
        return {}
    out = folder() / "native"
    with _lock(out):
        built = build_all(out, source, chain)
    return {
        name: row | ({"path": out / row["library"]} if "library" in row else {})
        for name, row in built.items()
    }


def release_source() -> Path | None:
    """What of the release's source mutants are made of: the kit's, or the folder named."""
    if (kit := unpacked()) is not None:
        return kit / "source"
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
    reason = row.get("error", f"no nvcc or no release source; {HOW_TO_MAKE}")
    pytest.skip(f"no {name}: {reason}")
