"""A registry on 127.0.0.1, and no login of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.registry_client import empty_home
from tests.support.registry_server import RegistryServer
from vllm_forge.release.registry import Reference, Repository

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_home(tmp_path / "home", monkeypatch)


@pytest.fixture
def registry() -> Iterator[RegistryServer]:
    """A registry with the referrers API."""
    with RegistryServer().running() as running:
        yield running


@pytest.fixture
def repository(registry: RegistryServer) -> Repository:
    """A repository of ``registry``."""
    return Repository(Reference.parse(f"{registry.host}/forge/vllm"))
