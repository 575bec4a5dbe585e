"""Images built on nodes: the forecast against what hosts move, and the array as a node runs it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.index_server import IndexServer, Served
from tests.support.project import make_project
from tests.support.site import make_site
from vllm_forge.cli import main
from vllm_forge.commands.dispatch import _cells
from vllm_forge.dispatch.builds import (
    LineBuild,
    Rates,
    fill_folder,
    forecast,
    line_builds,
    longest_first,
    measured_rates,
    prepare,
    script,
    send,
)
from vllm_forge.dispatch.errors import ClusterMismatchError, JobsFaultError, SiteFileError
from vllm_forge.host import Runner
from vllm_forge.patches import fetch_archive, read_tree_lock
from vllm_forge.project import Project
from vllm_forge.sources import Index, LockedWheel, Wheelhouse
from vllm_forge.sources.shared import VARIABLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_forge.dispatch.site import Site

REPO = Path(__file__).parents[3]
RATES = Rates(bytes_per_s=100.0, first_s_per_byte=0.02, next_s=5.0)
LINES = [
    LineBuild(line="a", skus=("x", "y"), files={"s": 600, "a": 400}),
    LineBuild(line="b", skus=("x", "y", "z"), files={"s": 600, "b": 200}),
    LineBuild(line="c", skus=("x",), files={"c": 300}),
]
# A node; writes its image's line of JSON, or fails where a test asks for it.
BUILD = """#!{python}
import json, os, sys
from pathlib import Path
sku, line = sys.argv[4], sys.argv[6]
names = ("VLLM_FORGE_CACHE", "VLLM_FORGE_ROOT", "VLLM_FORGE_SHARED", "PYTHONPATH")
row = {{"argv": sys.argv[1:]}} | {{name: os.environ[name] for name in names}}
with Path({log!r}).open("a") as file:
    file.write(json.dumps(row) + "\\n")
print(json.dumps({{"digest": "sha256:" + sku + line, "image": f"/dist/{{sku}}-{{line}}"}}))
sys.exit(61 if sku == os.environ.get("RED") else 0)
"""
# The scheduler: one task after the other; the array's code is its highest.
SBATCH = """#!/bin/bash
code=0
last=$(sed -n 's/^#SBATCH --array=0-//p' "${@: -1}")
for SLURM_ARRAY_TASK_ID in $(seq 0 "$last"); do
    export SLURM_ARRAY_TASK_ID
    bash "${@: -1}" || code=$?
done
exit $code
"""


def test_forecast_of_time() -> None:
    """The folder is filled first: 1500 bytes, 15 s. Then b, a and c, the longest first."""
    b = 8 + 0.02 * 800 + 2 * 5
    a, a_after_b = 10 + 20 + 5, 4 + 20 + 5
    c = 3 + 6
    assert forecast(LINES, RATES, 1).seconds == pytest.approx(15 + b + a_after_b + c)
    assert forecast(LINES, RATES, 2).seconds == pytest.approx(15 + max(a, b + c))
    assert forecast(LINES, RATES, 3).seconds == pytest.approx(15 + max(a, b, c))
    assert forecast(LINES, RATES, 9).seconds == forecast(LINES, RATES, 3).seconds


@pytest.mark.parametrize(("nodes", "copied"), [(1, 1500), (2, 2100), (3, 2100)])
def test_forecast_of_bytes(nodes: int, copied: int) -> None:
    row = forecast(LINES, RATES, nodes)
    assert (row.downloaded, row.copied) == (1500, copied)


@pytest.mark.parametrize("nodes", [1, 2])
def test_hosts_move_the_bytes_of_the_forecast(
    nodes: int, server: IndexServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wheels of three lines, fetched by real hosts: caches of their own, one folder."""
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv(VARIABLE, str(shared))
    wheels = {}
    for name, size in (("s", 60_000), ("a", 40_001), ("b", 20_002), ("c", 30_003)):
        content = random.Random(name).randbytes(size)  # noqa: S311
        file = f"{name}-1.0-py3-none-any.whl"
        served = server.add(name, file, Served(content=content))
        wheels[name] = LockedWheel(
            name=name, version="1.0", filename=file, size=size, sha256=served.sha256
        )
    lines = [
        LineBuild(
            line=row.line, skus=row.skus,
            files={wheels[name].sha256: wheels[name].size for name in row.files},
        )
        for row in LINES
    ]  # fmt: skip
    of_line = {row.line: [wheels[name] for name in row.files] for row in LINES}
    expected = forecast(lines, RATES, nodes)

    monkeypatch.setenv("VLLM_FORGE_CACHE", str(tmp_path / "controller"))
    Wheelhouse().fetch(list(wheels.values()), Index(server.url))
    downloaded = sum(request.sent for request in server.requests if "/files/" in request.path)
    asked = len(server.requests)
    first, *others = longest_first(lines)
    for host, group in enumerate([[first, *others], []] if nodes == 1 else [[first], others]):
        monkeypatch.setenv("VLLM_FORGE_CACHE", str(tmp_path / f"host-{host}"))
        for row in group:
            Wheelhouse().fetch(of_line[row.line], Index(server.url))
    assert len(server.requests) == asked, "a node used the network"
    moved = sum(path.stat().st_size for path in tmp_path.glob("host-*/wheels/*/*.whl"))
    assert downloaded == expected.downloaded
    # With two nodes, c goes to either: it shares no file.
    assert moved == expected.copied


def test_rates_are_those_of_the_committed_measurement() -> None:
    project = Project(REPO)
    seconds = json.loads((REPO / "benchmarks/results/build-0.26.json").read_text())["seconds"]
    rates = measured_rates(project)
    (line,) = line_builds(project, [project.cell("b300", "0.26")])
    wheels = sum(wheel.size for wheel in project.lock("0.26").wheels)
    assert wheels < line.bytes < wheels * 1.1  # and Debian's packages, and the source archive
    one = wheels / rates.bytes_per_s + wheels * rates.first_s_per_byte
    assert one == pytest.approx(sum(seconds["cold"]) / len(seconds["cold"]))


def test_documented_forecast_is_the_current_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dispatch", "build", "--plan", "--json"]) == 0
    page = (REPO / "docs/operate/build-hosts.md").read_text()
    for row in json.loads(capsys.readouterr().out):
        cells = (row["seconds"] / 60, row["downloaded"] / 1e9, row["copied"] / 1e9)
        line = f"| {row['nodes']} | {' | '.join(f'{cell:.1f}' for cell in cells)} |"
        assert line in page, f"write the table of `dispatch build --plan`: {line}"


def test_lines_share_what_they_lock_in_common() -> None:
    project = Project(REPO)
    cells = [project.cell("b300", line) for line in ("0.22", "0.26")]
    row = forecast(line_builds(project, cells), measured_rates(project), 2)
    assert row.downloaded < 0.7 * row.copied


@pytest.fixture
def site(tmp_path: Path) -> Site:
    root, scratch = tmp_path / "storage", tmp_path / "scratch"
    root.mkdir()
    scratch.mkdir()
    new = f'root = "{root}"\nscratch = "{scratch}"\n\n[slurm.build]\npartition = "cpu"'
    return make_site(tmp_path, Project(REPO), 'root = "/shared/forge"', new)


def sinfo(_: Sequence[str]) -> str:
    return "cpu|(null)|infinite"


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What nodes were asked to build, where sbatch and the program are stand-ins."""
    path, folder = tmp_path / "log", tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(SBATCH)
    (folder / "python").write_text(BUILD.format(python=sys.executable, log=str(path)))
    for file in folder.iterdir():
        file.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return path


def test_each_line_is_a_job_that_builds_its_skus(site: Site, log: Path, tmp_path: Path) -> None:
    text = script(Project(REPO), LINES, site, "r1")
    assert "#SBATCH --partition=cpu\n" in text
    assert "#SBATCH --account=lab\n" in text
    rows = send(prepare(text, site, "r1", sinfo), LINES, Runner())
    assert rows[0] == "sha256:xa  /dist/x-a"
    assert len(rows) == 6
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(row["argv"][3], row["argv"][5]) for row in asked] == [
        (sku, line.line) for line in LINES for sku in line.skus
    ]
    storage = site.storage.root
    assert asked[0]["argv"][6:] == ["--base", "locked", "--output", f"{storage}/built", "--json"]
    assert asked[0][VARIABLE] == f"{storage}/shared"
    assert asked[0]["VLLM_FORGE_CACHE"] == f"{tmp_path}/scratch/vllm-forge-{os.getuid()}/cache"
    assert asked[0]["VLLM_FORGE_ROOT"] == str(REPO)
    assert asked[0]["PYTHONPATH"] == str(REPO / "src")


def test_image_that_fails_is_named_and_others_are_built(
    site: Site, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RED", "y")
    with pytest.raises(JobsFaultError) as caught:
        text = script(Project(REPO), LINES, site, "r1")
        send(prepare(text, site, "r1", sinfo), LINES, Runner())
    assert "not built: y (a), y (b)\n" in str(caught.value)
    assert "exited with 61" in str(caught.value)
    folder = Path(site.storage.root, "builds", "r1")
    assert {path.stem for path in folder.glob("*.json")} == {"x-a", "x-b", "z-b", "x-c"}


def test_cache_in_a_folder_of_another_user_is_refused(site: Site, log: Path) -> None:
    own = Path(site.storage.scratch, f"vllm-forge-{os.getuid()}")
    own.symlink_to(site.storage.root)
    text = script(Project(REPO), LINES, site, "r1")
    env = os.environ | {"SLURM_ARRAY_TASK_ID": "0"}
    done = subprocess.run(
        ["bash"], input=text, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 33
    assert "is of another user" in done.stderr
    assert not log.exists()


def test_unknown_partition_is_refused_before_anything_is_downloaded(site: Site) -> None:
    text = script(Project(REPO), LINES, site, "r1")
    with pytest.raises(ClusterMismatchError, match=r"slurm\.build\.partition: no partition 'cpu'"):
        prepare(text, site, "r1", lambda _: "cpus|(null)|infinite")
    assert not Path(site.storage.root, "builds").exists()


def test_sku_that_is_named_twice_is_built_once() -> None:
    cells = _cells(Project(REPO), Namespace(skus=["b300", "sm_103a"], lines=["0.26"]))
    assert [cell.name for cell in cells] == [Project(REPO).cell("b300", "0.26").name]


def test_site_without_a_partition_for_builds_is_refused(tmp_path: Path) -> None:
    site = make_site(tmp_path, Project(REPO))
    with pytest.raises(SiteFileError, match=r"missing \[slurm.build\]"):
        script(Project(REPO), LINES, site, "r1")


def test_filled_folder_has_all_that_a_build_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_retries: None
) -> None:
    """Wheels and the source archive; a node has a cache of its own and no index."""
    mini = make_project(tmp_path)
    shared = tmp_path / "shared"
    for name, value in mini.environment.items():
        if name.startswith(("VLLM_FORGE_", "UV_")) or name == "no_proxy":
            monkeypatch.setenv(name, value)
    monkeypatch.setenv(VARIABLE, str(shared))
    project = Project(mini.root)
    lines = line_builds(project, [project.cell("alpha")])
    fill_folder(project, lines, shared)
    mini.index.close()
    assert {path.name for path in shared.rglob("*") if path.is_file()} == set(lines[0].files)
    monkeypatch.setenv("VLLM_FORGE_CACHE", str(tmp_path / "node"))
    wheels = project.lock("mini").wheels
    Wheelhouse().fetch(wheels)
    assert Wheelhouse().missing(wheels) == []
    assert fetch_archive(read_tree_lock(mini.root / "patches/vllm/mini", "mini")).exists()
