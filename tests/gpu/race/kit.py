"""Where the code under test and the native helpers are.

The code under test is that of the installed vLLM. Helpers are compiled from the release's source,
once for a run of the suite, in the folder that ``VLLM_FORGE_RACE_FOLDER`` names.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.harness.device import query
from tests.gpu.race.build import build_all, toolchain

VARIABLE = "VLLM_FORGE_RACE_FOLDER"
MOE, BASE = "_moe_C_stable_libtorch.abi3.so", "_C_stable_libtorch.abi3.so"


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
