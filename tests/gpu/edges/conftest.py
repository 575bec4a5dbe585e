"""What tier edges starts: a server on a declared card, one that does not fit, and refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu.conftest import TOGETHER
from tests.gpu.edges import load
from tests.gpu.edges.rows import (
    GRAPHS,
    REFUSALS,
    REFUSED,
    SERVED,
    SOAK,
    Refusal,
    allocator,
    arguments,
)
from tests.gpu.harness.device import parallel_variables
from tests.gpu.harness.server import Server, ServerEndedError
from tests.gpu.rehearsal import measured
from tests.gpu.rehearsal.checkpoint import find_recipe, make
from tests.gpu.rehearsal.conftest import ANSWER_S, PATIENT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STATS = {"VLLM_LOG_STATS_INTERVAL": "2"}
ASKED = 8  # prompts whose answers are compared
SAID = 1500  # characters of an error
# These starts end before a weight is read. No other may use it: dummy weights of DeepSeek-V4 cannot
# be run (0.26.0, models/deepseek_v4/nvidia/model.py:882, a buffer that loading makes is missing).
DUMMY = "--load-format=dummy"


@dataclass(frozen=True, kw_only=True)
class Started:
    """How a start ended: ``log``, and whether it serves."""

    log: str
    serves: bool
    seconds: float

    @property
    def facts(self) -> dict[str, Any]:
        return {"ready_s": round(self.seconds, 1), **measured.start_facts(self.log)}


@dataclass(frozen=True, kw_only=True)
class Soaked:
    """What a load left, and what was there before it."""

    load: load.Load
    answers: tuple[list[tuple[int, float]], list[tuple[int, float]]]
    gpu_mib: tuple[list[int], list[int]]
    host_mib: tuple[int, int]
    log: str  # of its time alone


@pytest.fixture(scope="session")
def rehearsal(pytestconfig: pytest.Config) -> Iterator[Path]:
    """The checkpoint, on the disk of the results; it goes with the session."""
    recipe = find_recipe()
    folder = pytestconfig.stash[TOGETHER].logs.parent / "edges"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir()
    try:
        make(recipe, folder / recipe.name)
        yield folder / recipe.name
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def gpu_bytes() -> int:
    """Memory of a GPU as vLLM counts it (0.26.0, utils/mem_utils.py, MemorySnapshot)."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


@pytest.fixture(scope="session")
def refusals(pytestconfig: pytest.Config, rehearsal: Path) -> dict[str, Started]:
    """Starts that vLLM refuses by its configuration, side by side."""
    logs = pytestconfig.stash[TOGETHER].logs

    def start(number: int, row: Refusal) -> Started:
        model = rehearsal.parent / f"refused-{number}"
        model.mkdir()
        for path in rehearsal.iterdir():
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copy(path, model)
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        (model / "config.json").write_text(json.dumps(config | dict(row.config)), encoding="utf-8")
        return _try(
            Server(
                model=model, arguments=[*row.arguments, DUMMY],
                log=logs / f"edges-refused-{number}.log", variables=parallel_variables(),
                kind="broken build",
            )
        )  # fmt: skip

    with ThreadPoolExecutor() as pool:
        found = pool.map(start, range(len(REFUSALS)), REFUSALS)
        return {row.name: start for row, start in zip(REFUSALS, found, strict=True)}


@pytest.fixture(scope="session")
def too_small(pytestconfig: pytest.Config, rehearsal: Path, gpu_bytes: int) -> Started:
    """The start on the card that should not fit."""
    return _try(
        Server(
            model=rehearsal, arguments=arguments(REFUSED, gpu_bytes),
            log=pytestconfig.stash[TOGETHER].logs / "edges-refused.log",
            variables=_variables(gpu_bytes), kind="artifact",
        )
    )  # fmt: skip


@pytest.fixture(scope="session")
def served(
    pytestconfig: pytest.Config, rehearsal: Path, gpu_bytes: int
) -> Iterator[tuple[Server, Started]]:
    """The server on the card; it loads what the checkpoint has, so that answers are known."""
    server = Server(
        model=rehearsal, arguments=arguments(SERVED, gpu_bytes),
        log=pytestconfig.stash[TOGETHER].logs / "edges-served.log",
        variables=_variables(gpu_bytes), kind="artifact", answer_s=ANSWER_S,
    )  # fmt: skip
    begin = time.monotonic()
    with server:
        seconds = time.monotonic() - begin
        yield server, Started(log=_text(server), serves=True, seconds=seconds)


@pytest.fixture(scope="session")
def decoded(served: tuple[Server, Started]) -> str:
    """The server's log once it decoded small batches, and such as are beyond all graphs."""
    server, _ = served
    for together in (GRAPHS["few"], GRAPHS["sequences"]):
        load.decode(server, together)
        wanted, end = together * GRAPHS["tokens_per_sequence"], time.monotonic() + measured.FREED_S
        while not any(tokens == wanted for tokens, _ in load.batches(_text(server))):
            assert time.monotonic() < end, f"no batch of {wanted} tokens is logged"
            time.sleep(measured.POLL_S)
    return _text(server)


@pytest.fixture(scope="session")
def soaked(served: tuple[Server, Started], decoded: str) -> Soaked:
    """The load of rows.toml; answers and memory before and after it."""
    server, _ = served
    asked, pid = measured.prompts(ASKED), server.process.pid
    before = load.answers(server, asked), load.gpu_mib(), load.host_mib(pid)
    begun, clients = len(_text(server)), load.Load()
    clients.run(server, SOAK["clients"], SOAK["seconds"])
    _settle(server)
    after = load.answers(server, asked), load.gpu_mib(), load.host_mib(pid)
    return Soaked(
        load=clients, answers=(before[0], after[0]), gpu_mib=(before[1], after[1]),
        host_mib=(before[2], after[2]), log=_text(server)[begun:],
    )  # fmt: skip


def run_limited(total: int, mib: int) -> str:
    """What a process says that cannot allocate so much under the card's limit; empty if it can."""
    program = f"import torch; torch.empty({mib} << 20, dtype=torch.uint8, device='cuda')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **_variables(total)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return (done.stderr[-SAID:] or f"exit {done.returncode}") if done.returncode else ""


def _variables(total: int) -> dict[str, str]:
    return {**PATIENT, **STATS, **parallel_variables(), **allocator(total)}


def _text(server: Server) -> str:
    return server.log.read_text(errors="replace")


def _try(server: Server) -> Started:
    begin = time.monotonic()
    try:
        with server:
            return Started(log=_text(server), serves=True, seconds=time.monotonic() - begin)
    except ServerEndedError:
        return Started(log=_text(server), serves=False, seconds=time.monotonic() - begin)


def _settle(server: Server) -> None:
    """Wait until nobody is served; what is left after that is a test's to find."""
    end = time.monotonic() + measured.FREED_S
    while any(load.counters(server).values()) and time.monotonic() < end:
        time.sleep(measured.POLL_S)
