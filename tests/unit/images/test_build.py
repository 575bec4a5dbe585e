"""Checks of one image side by side: each of them that is red keeps it from its name."""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.fast_build import FastEngine, fast_build, use
from tests.support.project import Project, make_project
from vllm_forge import host
from vllm_forge.errors import ForgeError
from vllm_forge.host.errors import CacheError, CommandFailedError, FileAccessError
from vllm_forge.host.files import file_digest
from vllm_forge.images import layer_checks, layout
from vllm_forge.images.errors import ImageCheckError, LayoutError
from vllm_forge.images.layer import members
from vllm_forge.images.plan import require_host
from vllm_forge.images.prewarm import Prewarm, tree_digest
from vllm_forge.images.wheel_layers import record_layers
from vllm_forge.images.wheels import site_packages
from vllm_forge.project import Project as Checkout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_forge.host import Runner
    from vllm_forge.images.engines import ContainerRun

CELL = "vllm-0.1.0-alpha"
SITE = site_packages("3.13")
LONGEST_S = 60


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    project = make_project(tmp_path_factory.mktemp("mini"))
    yield project
    project.index.close()


@pytest.fixture(autouse=True)
def _used(mini: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    use(mini, monkeypatch)


class Meeting(FastEngine):
    """Its checks as the image's user end after those outside have begun, and the other way round.

    Attributes:
        red: the run inside that has a red verdict.
        killed: the run inside that is killed.
    """

    def __init__(self, red: str = "", killed: str = "") -> None:
        super().__init__()
        self.red, self.killed = red, killed
        self.meeting = threading.Barrier(2, timeout=LONGEST_S)
        self.ended: list[str] = []

    def outside(self, *_: object) -> str:
        self.meeting.wait()
        return "met"

    def run_in_image(self, runner: Runner, run: ContainerRun) -> str:
        which = run.argv[-1]
        if which == "image":
            self.meeting.wait()
        self.ended.append(which)
        if which == self.killed:
            raise CommandFailedError("it was killed")
        verdicts: dict[str, Any] = json.loads(super().run_in_image(runner, run))
        if which == self.red:
            verdicts[min(verdicts)] = {"passed": False, "detail": "planted", "seconds": 0.0}
        return json.dumps(verdicts)


def red(*_: object) -> str:
    raise AssertionError("planted")


def damaged(*_: object) -> None:
    raise LayoutError("planted")


@pytest.mark.parametrize("name", ["a,b", "a:b", "$a", 'a"b', "a\\b"])
def test_cache_that_engines_misread_is_refused_at_once(
    mini: Project, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_FORGE_CACHE", str(tmp_path / name))
    with pytest.raises(CacheError, match="read as syntax"):
        fast_build(mini, "alpha")
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["locks"]


def test_image_that_skopeo_could_not_read_is_not_built(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="expects a tag"):
        require_host(tmp_path / "a:b")
    require_host(tmp_path)


def test_folder_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileAccessError, match="file"):
        require_host(tmp_path / "file" / "image")
    (tmp_path / "read-only").mkdir()
    monkeypatch.setattr("os.access", lambda path, _: path != tmp_path / "read-only")
    with pytest.raises(FileAccessError, match="read-only"):
        require_host(tmp_path / "read-only" / "image")
    require_host(tmp_path / "new" / "image")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("folder", ["/nonexistent", "relative", "/proc/version"])
def test_unusable_tmpdir_is_refused_at_once(
    mini: Project, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", folder)
    with pytest.raises(FileAccessError, match="TMPDIR is not the absolute path"):
        fast_build(mini, "alpha")


@pytest.mark.parametrize("fault", ["image", "user", "image killed", "outside", "layout"])
def test_each_check_counts_though_they_overlap(
    fault: str, mini: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    which, _, killed = fault.partition(" ")
    engine = Meeting(**{"killed" if killed else "red": which})
    monkeypatch.setattr(layer_checks, "stack", engine.outside)
    if fault == "outside":
        monkeypatch.setattr(layer_checks, "hygiene", red)
    if fault == "layout":
        monkeypatch.setattr(layer_checks, "stack", damaged)
        engine.meeting = threading.Barrier(1)
    with pytest.raises(ForgeError, match=r"planted|killed"):
        fast_build(mini, "alpha", engine)
    assert "image" in engine.ended, "what runs inside ends before the build does"
    dist = mini.root / "dist"
    assert not (dist / CELL).exists()
    assert not (dist / f"{CELL}.json").exists()
    assert not list(dist.glob(".tmp-*"))


def test_image_gets_its_name_when_all_are_green(
    mini: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Meeting()
    monkeypatch.setattr(layer_checks, "stack", engine.outside)
    image, built = fast_build(mini, "alpha", engine)
    assert built
    assert (mini.root / "dist" / CELL) == image.path
    assert sorted(engine.ended) == ["image", "user"]


@pytest.fixture
def prewarm(tmp_path: Path) -> Prewarm:
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    (kernels / "k.cubin").write_bytes(b"code")
    return Prewarm(folder=kernels, key={}, digest=tree_digest(kernels))


def test_image_with_kernels_has_bytecode_where_python_looks(
    mini: Project, prewarm: Prewarm
) -> None:
    plain, _ = fast_build(mini, "alpha")
    engine = FastEngine()
    image, _ = fast_build(mini, "alpha", engine, prewarm=prewarm)
    # The layers below are those of the image without, but for the record in the last of them.
    below = [row.blob.digest for row in plain.layers[:-1]]
    assert [row.blob.digest for row in image.layers[:-3]] == below
    assert [row.name for row in image.layers[-2:]] == ["bytecode", "compiled kernels"]
    names = [name for name, info, _ in members(image.layers[-2].blob) if info.isreg()]
    assert names == [f"{SITE}/vllm/__pycache__/__init__.cpython-313.pyc"]
    for made, own in ((plain, False), (image, True)):
        variables = [row.partition("=")[0] for row in made.config["config"]["Env"]]
        assert ("PYTHONPYCACHEPREFIX" in variables) is not own  # with it, Python looks nowhere else
    record = json.loads((mini.root / "dist" / f"{CELL}.json").read_text())
    assert record["checks"]["bytecode"]["detail"] == "1 files"
    (prewarm.folder / "more.cubin").write_bytes(b"code")
    more = replace(prewarm, digest=tree_digest(prewarm.folder))
    again, built = fast_build(mini, "alpha", engine, prewarm=more)
    assert (built, engine.compiled) == (True, 1)  # the sources are the same
    assert again.layers[-2].blob.digest == image.layers[-2].blob.digest


def test_bytecode_of_another_source_is_red(mini: Project, prewarm: Prewarm) -> None:
    host.remove(mini.cache / "layers")
    with pytest.raises(ImageCheckError, match="not of its source: /opt/venv/lib"):
        fast_build(mini, "alpha", FastEngine(foreign=b"x = 1"), prewarm=prewarm)
    _, built = fast_build(mini, "alpha", prewarm=prewarm)  # it was not kept
    assert built


def test_blob_is_hashed_again_when_it_was_touched(
    mini: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests: list[str] = []

    def noted(path: Path) -> str:
        digests.append(digest := file_digest(path))
        return digest

    monkeypatch.setattr(layout, "file_digest", noted)
    image, _ = fast_build(mini, "beta")
    one, *others = [row.blob for row in image.layers if " wheels of " in row.name]
    assert {one.digest, *(blob.digest for blob in others)}.isdisjoint(digests)
    os.utime(one.path)
    fast_build(mini, "alpha")
    assert one.digest in digests
    assert {blob.digest for blob in others}.isdisjoint(digests)


def test_recorded_layers_give_the_same_image(mini: Project) -> None:
    cache, dist = Path(mini.environment["VLLM_FORGE_CACHE"]), mini.root / "dist"

    def build() -> layout.Image:
        for folder in (cache / "layers", dist):
            shutil.rmtree(folder, ignore_errors=True)
        return fast_build(mini, "alpha")[0]

    image, checkout = build(), Checkout(mini.root)
    path = record_layers(checkout, checkout.line()[0])
    rows = json.loads(path.read_text())
    try:
        assert {row["digest"] for row in rows.values()} & {row.blob.digest for row in image.layers}
        assert build().digest == image.digest
        path.write_text(json.dumps({key: row | {"diff_id": "0" * 64} for key, row in rows.items()}))
        false = build()
        assert false.digest != image.digest
        with pytest.raises(LayoutError, match="the image says 0000"):
            layout.verify(false, unpacked=True)
        with pytest.raises(CacheError, match="blob of a layer is damaged"):
            record_layers(checkout, checkout.line()[0])
        path.write_text(json.dumps(rows | {"0" * 64: rows[min(rows)]}))
        shutil.rmtree(cache / "layers")
        record_layers(checkout, checkout.line()[0])
        assert json.loads(path.read_text()) == rows
    finally:
        path.unlink()
        build()
