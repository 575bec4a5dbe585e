"""Servers are started together, on first use, for all collected tests that read them."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gpu.race_server.arms import Asked, Fleet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FOLDER = "VLLM_FORGE_GPU_FOLDER"
TOGETHER = max(2, (os.cpu_count() or 4) // 2)  # each has two busy processes


@pytest.fixture(scope="session")
def race_servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Asked]]]:
    """Every arm that a collected test names as its parameter ``arm``."""
    # The receipt takes configurations from the logs of starts in this folder.
    logs = Path(os.environ.get(FOLDER) or tmp_path_factory.mktemp("results")) / "boot"
    logs.mkdir(parents=True, exist_ok=True)
    wanted = dict.fromkeys(
        str(item.callspec.params["arm"])
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and "race_servers" in item.fixturenames
        and hasattr(item, "callspec")
    )
    fleet = Fleet(tmp_path_factory.mktemp("race"), logs)
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")

    def run(name: str) -> Asked:
        begun = time.monotonic()
        try:
            return fleet.run(name)
        finally:
            if terminal is not None:  # workers of xdist have none
                terminal.write_line(f"server {name} is done: {time.monotonic() - begun:.0f} s")

    pool = ThreadPoolExecutor(TOGETHER)
    try:
        yield {name: pool.submit(run, name) for name in wanted}
    finally:  # what still runs was asked for by no test that is left
        fleet.end()
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def asked(race_servers: dict[str, Future[Asked]]) -> Callable[[str], Asked]:
    """What came of an arm's server."""
    return lambda name: race_servers[name].result()
