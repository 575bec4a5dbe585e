"""Engines and servers of the MTP tests."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.gpu.conftest import TOGETHER, why_not
from tests.gpu.mtp.engines import ENGINES, SERVERS, RanOf, ServedOf, missing, run, serve

MARKS = [pytest.mark.gpu, pytest.mark.tier("server"), pytest.mark.xdist_group("mtp")]
# FlashMLA and DeepGEMM, which DeepSeek-V4 needs: compute capability 9.0 and 10.x.
DEEPSEEK = [pytest.mark.sm_90, pytest.mark.sm_100, pytest.mark.sm_103, pytest.mark.value(7, 10)]
# Of a start, about, on a warm host: DeepSeek-V4 compiles, servers have two processes.
SECONDS = {"deepseek": 200.0, "without": 80.0, "server": 90.0, "exact": 45.0}


def pytest_collection_finish(session: pytest.Session) -> None:
    together = session.config.stash[TOGETHER]
    wanted = dict.fromkeys(
        name
        for item in session.items
        for mark in item.iter_markers("engines")
        for name in mark.args
        if not why_not(item) and not missing(name)
    )
    for name in wanted:
        call = serve if name in SERVERS else run
        work = partial(call, name, together.work, together.logs)
        together.add(name, seconds(name), work, "mtp", kernels(name))


def seconds(name: str) -> float:
    """About how long one takes."""
    if name in SERVERS:
        return SECONDS["server"]
    engine = ENGINES[name]
    if not engine.checkpoint:
        return SECONDS["exact"]
    return SECONDS["without" if engine.files else "deepseek"]


def kernels(name: str) -> str:
    """What compiles the same ones; an engine that lacks a patch ends before it compiles."""
    engine = ENGINES.get(name)
    if engine is None or not engine.checkpoint:
        return "exact"
    return "" if engine.files else "deepseek"


@pytest.fixture
def ran(pytestconfig: pytest.Config) -> RanOf:
    """What came of an engine that the test names in its ``engines`` marker."""

    def get(name: str) -> Any:
        if reason := missing(name):
            pytest.skip(reason)
        return pytestconfig.stash[TOGETHER].result(name)

    return get


@pytest.fixture
def served(pytestconfig: pytest.Config) -> ServedOf:
    """What came of a server that the test names in its ``engines`` marker."""
    return pytestconfig.stash[TOGETHER].result
