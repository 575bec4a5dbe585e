"""Boundary: dist/. Whoever may write the checkout writes it; what is pushed or loaded is hashed."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.fast_build import FastEngine, FastRunner, fast_build, use
from tests.support.project import Project, make_project
from vllm_forge.cli import main
from vllm_forge.commands import build as command
from vllm_forge.errors import ForgeError
from vllm_forge.images import Image, read_image, verify
from vllm_forge.images.errors import BuildRecordError, LayoutError
from vllm_forge.images.layout import IMAGE_NAME, blob_times, set_name
from vllm_forge.images.record import built_digest, keep_digest

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.xdist_group("dist")  # one worker builds what its fixtures have

CELL = "vllm-0.1.0-alpha"
FLIPS = 200


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    project = make_project(tmp_path_factory.mktemp("dist"))
    yield project
    project.index.close()


@pytest.fixture
def built(project: Project, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """With the image of alpha, which tests leave whole."""
    assert cache != project.cache
    use(project, monkeypatch)
    fast_build(project, "alpha")
    return project


def files(project: Project) -> list[Path]:
    folder = project.root / "dist" / CELL
    return sorted(path for path in folder.rglob("*") if path.is_file())


def replaced(path: Path, content: bytes) -> None:
    """As another program would: a new file, not the inode that the cache shares."""
    path.unlink()
    path.write_bytes(content)


@settings(
    max_examples=FLIPS, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_changed_bit_is_refused_by_verify(data: st.DataObject, built: Project) -> None:
    """Of any blob of one whole image."""
    blobs = [path for path in files(built) if path.parent.name == "sha256"]
    path = data.draw(st.sampled_from(blobs))
    content = path.read_bytes()
    changed = bytearray(content)
    changed[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    times = path.stat()
    try:
        replaced(path, bytes(changed))
        with pytest.raises(LayoutError):
            verify(read_image(built.root / "dist" / CELL))
    finally:
        replaced(path, content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("name", ["manifest.json", "blobs/sha256/" + "0" * 64, "fifo", "link"])
def test_file_of_others_in_a_layout_is_refused(name: str, built: Project) -> None:
    """A tar of the layout would carry it: some engines take the first manifest.json of a tar."""
    path = built.root / "dist" / CELL / name
    if name == "fifo":
        os.mkfifo(path)
    elif name == "link":
        path.symlink_to("/etc/passwd")
    else:
        path.write_text("[]")
    try:
        with pytest.raises(LayoutError, match=f"{name} is not of its image"):
            verify(read_image(built.root / "dist" / CELL))
    finally:
        path.unlink()


def test_fifo_in_place_of_the_version_is_not_waited_for(built: Project) -> None:
    path = built.root / "dist" / CELL / "oci-layout"
    path.unlink()
    os.mkfifo(path)
    image, fresh = fast_build(built, "alpha")
    assert fresh
    verify(image)


def test_changed_image_is_built_again(built: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """A byte of each file: of the index, the layout's version, manifest, config and layers."""
    good = {path: path.read_bytes() for path in files(built)}
    digest = read_image(built.root / "dist" / CELL).digest
    for path, content in good.items():
        changed = bytearray(content)
        changed[len(changed) // 2] ^= 1
        replaced(path, bytes(changed))
        capsys.readouterr()
        image, fresh = fast_build(built, "alpha")
        assert fresh, path
        assert f"{CELL}: changed; it is built again" in capsys.readouterr().err
        assert image.digest == digest
        verify(image)
    assert not fast_build(built, "alpha")[1]


def swap(project: Project) -> Image:
    """Put an image of another config into dist/, as root with LD_PRELOAD; returns the former one.

    All digests in the layout agree with each other.
    """
    folder = project.root / "dist" / CELL
    image = read_image(folder)

    def put(document: dict[str, Any]) -> dict[str, Any]:
        text = json.dumps(document).encode()
        digest = hashlib.sha256(text).hexdigest()
        (folder / "blobs" / "sha256" / digest).write_bytes(text)
        return {"digest": f"sha256:{digest}", "size": len(text)}

    config = copy.deepcopy(image.config)
    config["config"]["User"] = "0:0"
    config["config"]["Env"].append("LD_PRELOAD=/cache/evil.so")
    manifest = image.manifest | {"config": image.manifest["config"] | put(config)}
    index: dict[str, Any] = json.loads((folder / "index.json").read_text())
    index["manifests"][0] |= put(manifest)
    replaced(folder / "index.json", json.dumps(index).encode())
    name = index["manifests"][0]["annotations"][IMAGE_NAME]
    set_name(folder, read_image(folder).digest, name)
    assert read_image(folder).config["config"]["User"] == "0:0"
    return image


def claim(project: Project) -> Path:
    """Make the record of the build say that dist/ has the image that it gave."""
    path, image = project.root / "dist" / f"{CELL}.json", read_image(project.root / "dist" / CELL)
    record = json.loads(path.read_text())
    record |= {"digest": f"sha256:{image.digest}", "blobs": blob_times(image)}
    path.write_text(json.dumps(record))
    return path


@pytest.mark.parametrize("record", ["kept", "swapped too"])
def test_swapped_image_is_not_up_to_date(record: str, built: Project) -> None:
    image = swap(built)
    if record == "swapped too":
        claim(built)
    rebuilt, fresh = fast_build(built, "alpha")
    assert fresh
    assert rebuilt.digest == image.digest
    verify(rebuilt)


def test_swapped_image_has_no_receipts(built: Project) -> None:
    """``serve`` and ``plan`` look for those of the digest that dist/ says."""
    path = built.root / "dist" / f"{CELL}.json"
    assert built_digest(path) == f"sha256:{read_image(path.with_suffix('')).digest}"
    image = swap(built)
    claim(built)
    with pytest.raises(BuildRecordError, match=f"the build gave sha256:{image.digest}"):
        built_digest(path)


def test_image_that_the_cache_does_not_know_is_built_again(
    built: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    """After `clean --all`, and an image that came with its record from elsewhere."""
    image, _ = fast_build(built, "alpha")
    shutil.rmtree(built.cache / "images")
    assert built_digest(built.root / "dist" / f"{CELL}.json") is None
    assert "is not used: the cache has no build of these inputs" in capsys.readouterr().err
    rebuilt, fresh = fast_build(built, "alpha")
    assert fresh
    assert f"{CELL}: not in the cache; it is built again" in capsys.readouterr().err
    assert rebuilt.digest == image.digest


def test_digest_of_other_inputs_is_not_taken(built: Project) -> None:
    """Of the image before the last patch, say, with a record that claims the inputs of now."""
    path = built.root / "dist" / f"{CELL}.json"
    record = json.loads(path.read_text())
    keep_digest(path, record["inputs"] | {"series": {}}, f"sha256:{'0' * 64}")
    path.write_text(json.dumps(record | {"digest": f"sha256:{'0' * 64}"}))
    with pytest.raises(BuildRecordError, match="the record was changed after the build"):
        built_digest(path)
    assert fast_build(built, "alpha")[1]


@pytest.mark.parametrize("option", ["--load", "--push=registry.example/x:1"])
def test_all_bytes_are_hashed_before_they_leave(
    option: str, built: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of an image that is up to date by its times: nothing is loaded or pushed."""
    runner = FastRunner()
    monkeypatch.setattr(command, "Runner", lambda: runner)
    monkeypatch.setattr("vllm_forge.images.choose_engine", lambda *_, **__: FastEngine())
    image, _ = fast_build(built, "alpha")
    path = image.blob(image.manifest["layers"][-1]["digest"])
    content, times = path.read_bytes(), path.stat()
    replaced(path, bytes([content[0] ^ 1]) + content[1:])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    monkeypatch.chdir(built.root)
    assert main(["build", "alpha", option]) == LayoutError.exit_code
    assert not [argv for argv in runner.commands if argv[0] == "skopeo"]
    replaced(path, content)


def test_record_that_is_damaged_means_built_again(built: Project) -> None:
    path = built.root / "dist" / f"{CELL}.json"
    good = path.read_bytes()
    for at in range(0, len(good), max(1, len(good) // 40)):
        changed = bytearray(good)
        changed[at] ^= 1
        path.write_bytes(changed)
        try:
            image, _ = fast_build(built, "alpha")
        except ForgeError:
            pytest.fail("a record is written again, not refused")
        assert f"sha256:{image.digest}" == json.loads(good)["digest"]
