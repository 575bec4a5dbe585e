"""A real engine, a real registry, a small project."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.docker_registry import docker_registry
from tests.support.project import Project, make_project

HOW = "run `nox -s test -- --provision` as root on Debian, which installs it"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engine tests share builds: one worker runs them all."""
    for item in items:
        if "engine" in item.keywords:
            item.add_marker(pytest.mark.xdist_group("engine"))


def engines() -> list[str]:
    """Engines that can build here."""
    from vllm_forge.images.engines import ENGINES

    return [name for name, make in ENGINES.items() if make().present()]


def require_engine() -> None:
    """Skip, saying what would run it."""
    missing = [tool for tool in ("mmdebstrap", "skopeo") if shutil.which(tool) is None]
    if not engines() or missing:
        pytest.skip(f"no container engine ({', '.join(missing) or 'buildah or docker'}): {HOW}")


def require_registry() -> None:
    """Skip, saying what would run it."""
    missing = [tool for tool in ("docker-registry", "skopeo") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: {HOW}")


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project without an image yet; its Debian packages are locked."""
    require_engine()
    made = make_project(tmp_path_factory.mktemp("mini"))
    made.lock_base()
    yield made
    made.index.close()


@pytest.fixture(scope="session")
def first_build(project: Project) -> subprocess.CompletedProcess[str]:
    """The command that built alpha from nothing, with its output."""
    return project.run("build", "alpha")


@pytest.fixture(scope="session")
def built(project: Project, first_build: subprocess.CompletedProcess[str]) -> Project:
    """The project with the image of alpha built."""
    return project


@pytest.fixture
def sibling(built: Project, tmp_path: Path) -> Project:
    """A copy of the checkout to change, with the cache of the built one."""
    root = tmp_path / "checkout"
    shutil.copytree(built.root, root)
    return Project(root=root, cache=built.cache, index=built.index)


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a docker-registry."""
    require_registry()
    with docker_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running.host
