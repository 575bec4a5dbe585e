"""A registry on 127.0.0.1, and no login of the user's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.registry_server import RegistryServer
from vllm_forge.release.registry import Reference, Repository
from vllm_forge.sources import index

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, without a stored login; requests are repeated at once."""
    for name in ("REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder / "run"))
    monkeypatch.setattr(index, "BACKOFF_S", 0)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    return folder


@pytest.fixture
def registry() -> Iterator[RegistryServer]:
    """A registry with the referrers API."""
    with RegistryServer().running() as running:
        yield running


@pytest.fixture
def repository(registry: RegistryServer) -> Repository:
    """A repository of ``registry``."""
    return Repository(Reference.parse(f"{registry.host}/forge/vllm"))
