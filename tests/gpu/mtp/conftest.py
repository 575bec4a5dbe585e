"""Engines are started together, on first use, for all collected tests that read them."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gpu.mtp.engines import ENGINES, ROOT, TOGETHER, Ran, end_all, run

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
) -> Iterator[dict[str, Future[Ran]]]:
    wanted = dict.fromkeys(
        name
        for item in request.session.items
        for mark in item.iter_markers("engines")
        for name in mark.args
        if not missing(name)
    )
    work = tmp_path_factory.mktemp("engines")
    # Those that compile for minutes first: the others fit beside them.
    longest_first = sorted(wanted, key=lambda name: not ENGINES[name].checkpoint)
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")

    def run_and_say(name: str) -> Ran:
        begun = time.monotonic()
        found = run(name, work, boot_logs)
        if terminal is not None:  # workers of xdist have none
            how = "ended without a result" if found.error else "answered"
            terminal.write_line(f"engine {name} {how} after {time.monotonic() - begun:.0f} s")
        return found

    pool = ThreadPoolExecutor(TOGETHER)
    try:
        yield {name: pool.submit(run_and_say, name) for name in longest_first}
    finally:  # what still runs was asked for by no test that is left
        end_all()
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def ran(request: pytest.FixtureRequest, started: dict[str, Future[Ran]]) -> Callable[[str], Ran]:
    """What came of an engine that the test names in its ``engines`` marker."""

    def get(name: str) -> Ran:
        if reason := missing(name):
            pytest.skip(reason)
        return started[name].result()

    return get


def missing(name: str) -> str:
    """What an engine lacks to be run, and how to bring it."""
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
