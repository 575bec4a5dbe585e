"""The base of images: locked packages, current ones where those are gone, or a registry image."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.fast_build import FastEngine, fast_build, lock_packages, tiny_deb, use
from tests.support.project import Project as MiniProject
from tests.support.project import make_project
from vllm_forge.host.errors import FileAccessError
from vllm_forge.host.files import file_digest
from vllm_forge.images import plan as plan_module
from vllm_forge.images import rootfs
from vllm_forge.images.errors import BaseImageError
from vllm_forge.images.layer import GZIP, TAR, plain_digest
from vllm_forge.images.layout import Image, read_image
from vllm_forge.images.rootfs import base_of, is_whole
from vllm_forge.project import Project
from vllm_forge.sources import Wheelhouse
from vllm_forge.sources.debian import DebianPackage, input_digest, write_base_lock
from vllm_forge.sources.errors import (
    DistributionNotFoundError,
    HashMismatchError,
    IndexUnreachableError,
    LockFileError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vllm_forge.host import Runner
    from vllm_forge.images.plan import ImagePlan

pytestmark = pytest.mark.xdist_group("rootfs")  # one worker builds what its fixtures have

LOCKED = DebianPackage(
    name="python3", version="3.13.5-0", architecture="amd64", sha256="ab" * 32, size=1,
    path="pool/main/p/python3_3.13.5-0_amd64.deb",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniProject]:
    """The small project with a lock of one package."""
    made = make_project(tmp_path_factory.mktemp("made"))
    lock_packages(made, LOCKED, "http://127.0.0.1:1")
    yield made
    made.index.close()


@pytest.fixture
def mini(made: MiniProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MiniProject:
    """With a cache of its own, and an mmdebstrap that is not asked to unpack."""
    mini = made.copy(tmp_path / "mini")
    use(mini, monkeypatch)
    monkeypatch.setattr(
        rootfs, "_write_archive", lambda *given: given[-1].mkdir(parents=True, exist_ok=True)
    )
    monkeypatch.setattr(plan_module, "fetch_packages", lambda *_: None)
    return mini


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Let every archive answer with an error."""

    def fail(error: Exception) -> None:
        def fetch_packages(*_: object) -> None:
            raise error

        monkeypatch.setattr(plan_module, "fetch_packages", fetch_packages)

    return fail


def label(image: Image) -> str:
    return str(image.config["config"]["Labels"]["io.vllm-forge.base"])


def test_image_says_which_packages_it_stands_on(mini: MiniProject) -> None:
    lock = (mini.root / "docker/locks/debian.txt").read_bytes()
    assert label(fast_build(mini, "alpha")[0]) == f"sha256:{hashlib.sha256(lock).hexdigest()}"
    assert label(fast_build(mini, "alpha", base="current")[0]) == "current"


def test_current_packages_need_no_fitting_lock(
    mini: MiniProject, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = mini.root / "docker/locks/debian.txt"
    lock.write_text(re.sub("(?m)^# input: .*$", "# input: 0", lock.read_text()))
    with pytest.raises(LockFileError):
        fast_build(mini, "alpha")
    assert label(fast_build(mini, "alpha", base="current")[0]) == "current"
    assert "was not made for what matrix.toml now says" in capsys.readouterr().err


def test_packages_come_while_wheels_do(mini: MiniProject, monkeypatch: pytest.MonkeyPatch) -> None:
    started, fetch = threading.Event(), Wheelhouse.fetch

    def fetch_wheels(*given: Any) -> Any:
        started.set()
        return fetch(*given)

    def fetch_packages(*_: object) -> None:
        assert started.wait(60)

    monkeypatch.setattr(Wheelhouse, "fetch", fetch_wheels)
    monkeypatch.setattr(plan_module, "fetch_packages", fetch_packages)
    assert fast_build(mini, "alpha")[1]


@pytest.mark.parametrize(("reads", "media_type"), [(True, TAR), (False, GZIP)])
def test_rootfs_is_compressed_beside_an_engine_that_reads_it_as_it_is(
    mini: MiniProject, monkeypatch: pytest.MonkeyPatch, reads: bool, media_type: str
) -> None:
    engine, bases = FastEngine(), []
    build = engine.build_system

    def build_system(runner: Runner, plan: ImagePlan, *given: Any) -> None:
        assert plan.base.layout is not None
        bases.append(read_image(plan.base.layout).layers[0].blob)
        assert file_digest(bases[0].path) == bases[0].digest
        build(runner, plan, *given)

    monkeypatch.setattr(engine, "build_system", build_system)
    monkeypatch.setattr(engine, "reads_plain_layers", reads)
    fast_build(mini, "alpha", engine=engine)
    (base,) = bases
    assert base.media_type == media_type
    assert not (mini.cache / "work" / "vllm-0.1.0-alpha" / "rootfs").exists()
    (kept,) = (mini.cache / "rootfs").iterdir()
    blob = read_image(kept).layers[0].blob
    assert (blob.media_type, blob.diff_id) == (GZIP, base.diff_id)
    assert plain_digest(blob) == blob.diff_id
    assert is_whole(kept)


def test_place_where_no_program_runs_is_refused(
    mini: MiniProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hardened /tmp, where mmdebstrap would fail after minutes with a list of packages."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    known = os.statvfs

    def statvfs(path: str) -> object:
        noexec = SimpleNamespace(f_flag=os.ST_NOEXEC)
        return noexec if path == str(tmp_path) else known(path)

    monkeypatch.setattr(os, "statvfs", statvfs)
    with pytest.raises(FileAccessError, match="it is mounted noexec"):
        fast_build(mini, "alpha")


def test_locked_is_the_default_and_the_same_image(mini: MiniProject) -> None:
    digest = fast_build(mini, "alpha")[0].digest
    image, fresh = fast_build(mini, "alpha", base="locked")
    assert (image.digest, fresh) == (digest, False)


@pytest.mark.parametrize("error", [DistributionNotFoundError, IndexUnreachableError])
def test_lost_packages_give_an_image_of_current_ones(
    mini: MiniProject,
    lose: Callable[[Exception], None],
    capsys: pytest.CaptureFixture[str],
    error: type[Exception],
) -> None:
    locked = fast_build(mini, "alpha")[0].digest
    (mini.root / "dist").rename(mini.root / "kept")
    fresh = mini.copy(mini.root.parent / "fresh", "locks")
    with pytest.MonkeyPatch.context() as patch:
        use(fresh, patch)
        lose(error("python3_3.13.5-0_amd64.deb is gone"))
        image, _ = fast_build(fresh, "alpha")
        shown = " ".join(capsys.readouterr().err.split())
        assert "python3_3.13.5-0_amd64.deb is gone" in shown
        assert "no receipt of the locked image applies" in shown
        assert "changed python3: 3.13.5-0 -> 3.13.5-1" in shown
        assert label(image) == "current"
        assert image.digest != locked
        assert not fast_build(fresh, "alpha")[1]


@pytest.mark.parametrize("error", [DistributionNotFoundError, IndexUnreachableError])
def test_locked_base_refuses_current_packages(
    mini: MiniProject, lose: Callable[[Exception], None], error: type[Exception]
) -> None:
    lose(error("python3_3.13.5-0_amd64.deb is gone"))
    with pytest.raises(error, match=r"python3_3\.13\.5-0_amd64\.deb is gone"):
        fast_build(mini, "alpha", base="locked")
    assert not (mini.root / "dist").exists()


def test_other_bytes_are_refused_in_any_case(
    mini: MiniProject, lose: Callable[[Exception], None]
) -> None:
    lose(HashMismatchError("python3 has another sha256"))
    with pytest.raises(HashMismatchError):
        fast_build(mini, "alpha")


def test_kept_rootfs_asks_no_archive(mini: MiniProject, lose: Callable[[Exception], None]) -> None:
    fast_build(mini, "alpha")
    lose(DistributionNotFoundError("gone"))
    assert label(fast_build(mini, "beta")[0]) != "current"


def test_locked_without_a_lock_is_refused(tmp_path: Path) -> None:
    base = Project.find().matrix.base.model_copy(update={"lock": None})
    assert base_of(tmp_path, base, "rootfs").label == "current"
    with pytest.raises(BaseImageError, match="names no lock of Debian packages"):
        base_of(tmp_path, base, "locked")


def test_changed_lock_is_another_rootfs(mini: MiniProject) -> None:
    project = Project(mini.root)
    base = project.matrix.base
    first = base_of(mini.root, base, "locked").key
    write_base_lock(mini.root / "docker/locks/debian.txt", base, "20261201T000000Z", [LOCKED])
    assert base_of(mini.root, base, "locked").key == first
    other = LOCKED.__class__(**{**vars(LOCKED), "sha256": "cd" * 32})
    write_base_lock(mini.root / "docker/locks/debian.txt", base, "20261201T000000Z", [other])
    assert base_of(mini.root, base, "locked").key != first
    assert input_digest(base)


def test_archive_has_what_dpkg_says_of_each_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive of one .deb, with a list that apt can check it by."""
    package = tiny_deb(tmp_path / "built")
    monkeypatch.setenv("VLLM_FORGE_CACHE", str(tmp_path / "cache"))
    package.file.parent.mkdir(parents=True)
    (tmp_path / "built" / package.path).rename(package.file)
    base = Project.find().matrix.base
    write_base_lock(tmp_path / "lock.txt", base, "20261130T000000Z", [package])
    lock = base_of(tmp_path, base.model_copy(update={"lock": "lock.txt"}), "locked").lock
    assert lock is not None
    rootfs._write_archive(base, lock, tmp_path / "archive")
    text = (tmp_path / "archive" / "Packages").read_text()
    assert text.startswith("Package: tiny\nVersion: 1:2-3\n")
    assert "Essential: yes\n" in text
    assert text.endswith(
        f"Filename: ./tiny_2-3_amd64.deb\nSize: {package.size}\nSHA256: {package.sha256}\n"
    )
    digest = hashlib.sha256(text.encode()).hexdigest()
    release = (tmp_path / "archive" / "Release").read_text()
    assert f" {digest} {len(text.encode())} Packages\n" in release
    assert "Codename: trixie\n" in release
