"""A real Slurm, a small project with an image of each of three cells, and its commands."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.dispatch import make_image, make_project, write_bundle
from tests.support.keys import key_pair, trust
from tests.support.site import SLURM_SKUS
from tests.support.slurm import Cluster, missing_tools, slurm, until
from vllm_forge.cli import main
from vllm_forge.dispatch import runs
from vllm_forge.dispatch.runs import RunRecord, read_record
from vllm_forge.gputest import launch
from vllm_forge.host import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_forge.project import Project

HOW = "run `nox -s test -- --provision` as root on Debian, which installs it"
CELLS = (("b300", "0.22"), ("b300", "0.26"), ("rtxpro6000", "0.26"))
SITE = """schema_version = 1
runtime = "runc"
minutes = 1

[storage]
root = "{storage}"
scratch = "{scratch}"

[env]
{env}
"""
SITE += SLURM_SKUS


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker has the cluster."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.xdist_group("slurm"))


@dataclass
class Lab:
    """A cluster, a project, and a folder that both see."""

    cluster: Cluster
    project: Project
    folder: Path
    key: Path
    calls: list[int] = field(default_factory=list)

    @property
    def storage(self) -> Path:
        return self.folder / "storage"

    def site(self, told: dict[str, str] | None = None, *, scratch: Path | None = None) -> Path:
        """A site file; ``told``: <SKU>_<tier> -> how it shall end."""
        self.calls.append(1)
        path = self.folder / f"site-{len(self.calls)}.toml"
        env = "\n".join(f'FAKE_{name} = "{word}"' for name, word in (told or {}).items())
        scratch = scratch or self.folder / "scratch"
        path.write_text(SITE.format(storage=self.storage, scratch=scratch, env=env))
        return path

    def call(self, *argv: str, code: int = 0) -> str:
        """Run a command of vllm-forge in this process; its output."""
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            done = main(argv)
        assert done == code, f"exit {done}, expected {code}\n{out.getvalue()}\n{err.getvalue()}"
        return out.getvalue() + err.getvalue()

    def dispatch(self, site: Path, *argv: str, code: int = 0) -> str:
        return self.call("dispatch", "--to=slurm", f"--site={site}", *argv, code=code)

    def send(self, site: Path, *argv: str) -> RunRecord:
        """Dispatch without waiting; the run's record."""
        self.dispatch(site, *argv)
        return read_record(self.project, None)

    def collect(self, run: str, *argv: str, code: int = 0) -> dict[str, Any]:
        """Collect as JSON: verdict and reason by job; receipts."""
        text = self.call("dispatch", "collect", run, "--json", "--wait", *argv, code=code)
        document = parse_json(text[: text.rindex("\n}") + 2].partition("\n}{")[0])
        assert isinstance(document, dict)
        return document

    def jobs(self) -> set[str]:
        """All jobs that the cluster knows."""
        return set(self.cluster.run("squeue", "-h", "--states=all", "-o", "%A").split())

    def started(self, record: RunRecord, *jobs: str) -> None:
        """Wait until the suites of these jobs run."""
        for job in jobs:
            place = record.folder / "results" / job / record.attempts[job] / "started"
            until(f"{job} runs", place.exists)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The cluster of all tests, and the images that they run."""
    if missing := missing_tools():
        pytest.skip(f"no {', '.join(missing)}: {HOW}")
    if os.geteuid() != 0:
        pytest.skip("not root, which starts the nodes of Slurm and runc: run as root")
    folder = tmp_path_factory.mktemp("lab")
    project = make_project(folder / "checkout")
    for sku, line in CELLS:
        make_image(project, project.cell(sku, line), folder)
    private, public = key_pair(folder / "keys")
    trust(project.root, public)
    for name in ("storage", "scratch", "slurm"):
        (folder / name).mkdir()
    with slurm(folder / "slurm") as cluster, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(cluster.conf))
        patch.setenv("VLLM_FORGE_ROOT", str(project.root))
        patch.setenv("VLLM_FORGE_CACHE", str(folder / "cache"))
        patch.setenv("COLUMNS", "300")
        patch.setattr(runs, "write_bundle", write_bundle)
        patch.setattr(launch, "write_bundle", write_bundle)  # of kits
        patch.setattr(runs, "POLL_S", 0.2)
        yield Lab(cluster=cluster, project=project, folder=folder, key=private)
