"""The rehearsal, made of the recipe that the run brought, and a server of it for each preset."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu.conftest import TOGETHER
from tests.gpu.harness.device import parallel_variables, ranks
from tests.gpu.harness.server import Server
from tests.gpu.rehearsal.checkpoint import find_recipe, make
from tests.gpu.rehearsal.measured import compiled_files, synthetic
from tests.gpu.soak.artifact import Preset, presets

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KINDS = ("plain", "mtp")
RATE = 0.8  # of drafts that are accepted; declared, not measured
ANSWER_S = 900  # the first ones may compile
# vLLM waits 600 s for its engine (envs.py): loading and compiling may take longer.
PATIENT = {"VLLM_ENGINE_READY_TIMEOUT_S": "3600"}


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server of the rehearsal that is up; ``facts`` go into each test's row."""

    server: Server
    kind: str
    preset: Preset
    ready_s: float
    compiled: tuple[dict[str, int], dict[str, int]]  # files before and after the start

    @property
    def facts(self) -> dict[str, Any]:
        return {"rehearsal": self.server.model.name, "preset": self.preset.name}

    def log(self) -> str:
        return self.server.log.read_text(errors="replace")


@pytest.fixture(scope="module")
def rehearsal(pytestconfig: pytest.Config) -> Iterator[Path]:
    """The checkpoint, on the disk of the results; it goes with the module."""
    recipe = find_recipe()
    folder = pytestconfig.stash[TOGETHER].logs.parent / "rehearsal"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir()
    try:
        make(recipe, folder / recipe.name)
        yield folder / recipe.name
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module", params=KINDS)
def served(
    request: pytest.FixtureRequest, pytestconfig: pytest.Config, rehearsal: Path
) -> Iterator[Served]:
    """A server of the SKU's preset for the tier's GPUs, with or without drafts."""
    fitting = [
        preset
        for preset in presets()
        if preset.tensor_parallel == ranks()
        and bool(preset.speculative_tokens) == (request.param == "mtp")
    ]
    if not fitting:
        pytest.skip(f"matrix.toml has no {request.param} preset of this SKU for {ranks()} GPUs")
    preset, before, begin = fitting[0], compiled_files(), time.monotonic()
    server = Server(
        model=rehearsal,
        arguments=synthetic(preset.arguments, RATE),
        log=pytestconfig.stash[TOGETHER].logs / f"rehearsal-{request.param}.log",
        variables={**PATIENT, **preset.env, **parallel_variables()},
        kind="artifact",
        answer_s=ANSWER_S,
    )
    with server:
        yield Served(
            server=server,
            kind=request.param,
            preset=preset,
            ready_s=round(time.monotonic() - begin, 1),
            compiled=(before, compiled_files()),
        )
