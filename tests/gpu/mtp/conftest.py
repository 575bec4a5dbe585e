"""Engines and servers start together, on first use, for all collected tests that read them."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gpu.mtp.engines import ENGINES, ROOT, TOGETHER, Ran, end_all, run
from tests.gpu.mtp.servers import SERVERS, Served, end_servers, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FOLDER = "VLLM_FORGE_GPU_FOLDER"


@pytest.fixture(scope="session")
def boot_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where logs of starts go: the receipt takes its configurations from them."""
    folder = Path(os.environ.get(FOLDER) or tmp_path_factory.mktemp("results")) / "boot"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def started(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, boot_logs: Path
) -> Iterator[dict[str, Future[Ran | Served]]]:
    wanted = dict.fromkeys(
        name
        for item in request.session.items
        for mark in item.iter_markers("engines")
        for name in mark.args
        if not missing(name)
    )
    work = tmp_path_factory.mktemp("engines")
    # Those that compile for minutes first: the others fit beside them.
    longest_first = sorted(wanted, key=lambda name: name in SERVERS or not ENGINES[name].checkpoint)
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")

    def run_and_say(name: str) -> Ran | Served:
        begun = time.monotonic()
        try:
            return (serve if name in SERVERS else run)(name, work, boot_logs)
        finally:
            if terminal is not None:  # workers of xdist have none
                terminal.write_line(f"engine {name} is done: {time.monotonic() - begun:.0f} s")

    pool = ThreadPoolExecutor(TOGETHER)
    try:
        yield {name: pool.submit(run_and_say, name) for name in longest_first}
    finally:  # what still runs was asked for by no test that is left
        end_all()
        end_servers()
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def ran(started: dict[str, Future[Ran | Served]]) -> Callable[[str], Ran]:
    """What came of an engine that the test names in its ``engines`` marker."""

    def get(name: str) -> Ran:
        if reason := missing(name):
            pytest.skip(reason)
        found = started[name].result()
        assert isinstance(found, Ran)
        return found

    return get


@pytest.fixture
def served(started: dict[str, Future[Ran | Served]]) -> Callable[[str], Served]:
    """What came of a server that the test names in its ``engines`` marker."""

    def get(name: str) -> Served:
        found = started[name].result()
        assert isinstance(found, Served)
        return found

    return get


def missing(name: str) -> str:
    """What an engine lacks to be run, and how to bring it."""
    if name in SERVERS:
        return ""
    checkpoint = ENGINES[name].checkpoint
    if checkpoint and not (ROOT / "checkpoints" / checkpoint).is_dir():
        return (
            f"no checkpoint {checkpoint}: `vllm-forge tiny {checkpoint}` makes it, "
            f"--checkpoint {checkpoint}=DIR brings it"
        )
    files = ENGINES[name].files
    if files and not (ROOT / "variants" / files).is_dir():
        return f"this bundle has no vLLM {files}: the series has no such patch"
    return ""
