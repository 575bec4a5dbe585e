"""The cache is cleaned of all that no line needs, and of nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_forge.host import exclusive
from vllm_forge.host.errors import BusyError
from vllm_forge.images import clean as module
from vllm_forge.images.clean import ALWAYS, clean
from vllm_forge.images.engines import choose_engine
from vllm_forge.images.plan import BuildOptions, resolve
from vllm_forge.project import Project

KEPT = {
    "cubins", "debs", "images", "layers", "locks", "patched", "rootfs", "sdists", "sources.git",
    "systems", "wheels",
}  # fmt: skip


def test_every_folder_of_the_cache_has_an_answer(root: Path) -> None:
    """That the source names; of a new one, say here whether a build needs it."""
    named = set()
    for path in (root / "src").rglob("*.py"):
        named |= set(re.findall(r'cache_root\(\) / "([\w.-]+)"', path.read_text()))
    assert named <= KEPT | set(ALWAYS)
    assert not KEPT & set(ALWAYS)


def test_needed_files_stay_and_leftovers_go(checkout: Path, tmp_path: Path) -> None:
    project, cache = Project(checkout), tmp_path / "cache"
    options = BuildOptions(output=tmp_path)
    engine = choose_engine("buildah", dry_run=True)
    plan = resolve(project, project.cell("b300", "0.26"), options, engine)
    needed = [cache / "layers" / key for group in plan.groups for key in group.keys]
    needed += [cache / "systems" / plan.system_key, cache / "rootfs" / plan.base.key]
    needed += [cache / "wheels" / wheel.sha256 for wheel in plan.lock.wheels]
    needed.append(cache / "cubins" / plan.lock.find("flashinfer-python").sha256)
    assert plan.base.lock is not None
    needed += [cache / "debs" / package.sha256 for package in plan.base.lock.packages]
    needed += [cache / "sources.git", cache / "images"]  # digests of builds: small
    leftovers = [cache / name for name in ALWAYS]
    leftovers += [cache / folder / "old" for folder in KEPT - {"images", "locks", "sources.git"}]
    for folder in [*needed, *leftovers]:
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(bytes(5000))
    assert clean(project, everything=False) >= 5000 * len(leftovers)
    assert [path for path in needed if not path.exists()] == []
    assert [path for path in leftovers if path.exists()] == []
    clean(project, everything=True)
    assert [path.name for path in cache.iterdir()] == ["locks"]


@pytest.mark.parametrize("name", ["build-vllm-0.26.0-b300", *(f"{k}-0.26" for k in module.LOCKS)])
def test_running_work_keeps_its_files(name: str, checkout: Path) -> None:
    with exclusive(name, wait=False), pytest.raises(BusyError, match=name):
        clean(Project(checkout), everything=True)
