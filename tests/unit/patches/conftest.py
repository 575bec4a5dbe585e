"""A checkout with one line: a tiny source archive on a local index, two patches, their lock."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from tests.support.index_server import IndexServer, Served
from tests.support.series import GOOD, RELEASE, SDIST, SECOND, source_files
from tests.support.trees import write_sdist
from vllm_forge.matrix import Line, load
from vllm_forge.patches import update_line
from vllm_forge.project import Project
from vllm_forge.sources import Index, SourceRepo

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def sdist(tmp_path: Path) -> Path:
    return write_sdist(tmp_path / SDIST, source_files())


@pytest.fixture
def base(repo: SourceRepo, sdist: Path) -> str:
    return repo.import_archive(RELEASE, sdist)


@pytest.fixture
def series(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout" / "patches" / "vllm" / "9.9"
    folder.mkdir(parents=True)
    for path in (GOOD, SECOND):
        shutil.copy(path, folder / path.name)
    (folder / "series").write_text(f"# the order matters\n{GOOD.name}\n\n{SECOND.name}\n")
    return folder


@pytest.fixture
def row(root: Path) -> Line:
    changes = {"vllm": RELEASE, "series": "patches/vllm/9.9"}
    return load(root).line["0.26"].model_copy(update=changes)


@pytest.fixture
def index(server: IndexServer, sdist: Path) -> Index:
    server.add("vllm", SDIST, Served(content=sdist.read_bytes()))
    return Index(server.url)


@pytest.fixture
def project(series: Path, row: Line, repo: SourceRepo, index: Index, root: Path) -> Project:
    """A checkout whose matrix has the line 9.9 and no other; its series is locked."""
    made = Project(series.parents[2])
    lines = {"line": {"9.9": row}, "default_line": "9.9"}
    made.__dict__.update(matrix=load(root).model_copy(update=lines), index=index)
    update_line(made, "9.9", repo)
    return made
