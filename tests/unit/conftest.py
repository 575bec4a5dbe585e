"""Unit tests: no network beyond 127.0.0.1, no engine, no GPU, nothing of the user's cache."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tests.support.index_server import IndexServer
from vllm_forge.sources import SourceRepo, index

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
# The same examples in every run: a red run must stay red. To look for more, run
# `pytest tests/unit --hypothesis-profile=explore`.
hypothesis.settings.register_profile(
    "fixed", derandomize=True, database=None, deadline=None, max_examples=120
)
hypothesis.settings.register_profile("explore", database=None, deadline=None, max_examples=3000)
hypothesis.settings.load_profile("fixed")


HOST_SETTINGS = ("UV_", "PIP_", "GIT_", "VLLM_FORGE_", "FLASHINFER_")


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Names for the caches of tests without a folder, which hardly any of them writes to."""
    folder = tmp_path_factory.mktemp("caches")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def clean_host(
    request: pytest.FixtureRequest, caches: Iterator[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of this test's own, and none of the host's settings for indexes, proxies and git."""
    for name in list(os.environ):
        if name.startswith(HOST_SETTINGS) or "proxy" in name.lower():
            monkeypatch.delenv(name)
    own = "tmp_path" in request.fixturenames  # a folder for each test takes longer than most tests
    cache = request.getfixturevalue("tmp_path") / "cache" if own else next(caches)
    monkeypatch.setenv("VLLM_FORGE_CACHE", str(cache))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def checkout(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what commands read, without records; they work on it."""
    copy = tmp_path / "checkout"
    for folder in ("docker", "patches"):
        shutil.copytree(root / folder, copy / folder)
    for name in ("matrix.toml", "pyproject.toml"):
        shutil.copy(root / name, copy)
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(copy))
    return copy


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The cache that this test's code uses."""
    return tmp_path / "cache"


@pytest.fixture
def server() -> Iterator[IndexServer]:
    """A package index on 127.0.0.1."""
    with IndexServer().running() as running:
        yield running


@pytest.fixture
def repo(cache: Path) -> SourceRepo:
    """An empty source repository in the test's cache."""
    return SourceRepo(cache / "sources.git")


@pytest.fixture
def no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that refuses is asked once: the waits between retries are not under test."""
    monkeypatch.setattr(index, "CONNECT_RETRIES", 0)
