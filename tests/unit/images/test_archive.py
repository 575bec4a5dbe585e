"""An image as one file: archives of skopeo's, and a squashfs of all layers."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.fast_build import fast_build, use
from tests.support.project import make_project
from vllm_forge.cli import main
from vllm_forge.errors import UsageError
from vllm_forge.host import RecordingRunner, Runner
from vllm_forge.host.errors import CommandFailedError
from vllm_forge.images import archive
from vllm_forge.images.archive import enroot_files, require_archive, write_archive, write_merged
from vllm_forge.images.errors import LayoutError
from vllm_forge.images.layout import Image, ImageLayer, write_image
from vllm_forge.images.rootfs import compress

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.xdist_group("archive")  # one worker builds what its fixtures have

squashfs = pytest.mark.skipif(
    shutil.which("mksquashfs") is None, reason="no mksquashfs: run nox -s test -- --provision"
)
CONFIG = {
    "Env": ["PATH=/opt/venv/bin:/usr/bin", "HOME=/cache"],
    "Entrypoint": ["vllm", "serve"],
    "WorkingDir": "/cache",
    "Volumes": {"/cache": {}},
}
EPOCH = 1735689600
NAME = "localhost/x:1"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    project = make_project(tmp_path_factory.mktemp("archive"))
    with pytest.MonkeyPatch.context() as patch:
        use(project, patch)
        image, _ = fast_build(project, "alpha")
    yield image
    project.index.close()


def member(name: str, content: bytes = b"", **more: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(content), EPOCH
    for key, value in more.items():
        setattr(info, key, value)
    return info, content


def image_of(folder: Path, *layers: list[tuple[tarfile.TarInfo, bytes]]) -> Image:
    blobs = []
    for number, members in enumerate(layers):
        path = folder / f"{number}.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for info, content in members:
                tar.addfile(info, io.BytesIO(content))
        blobs.append(ImageLayer(blob=compress(path, folder / f"{number}.tar.gz"), name=str(number)))
    return write_image(folder / "layout", layers=blobs, config=CONFIG, epoch=EPOCH, name=NAME)


def merged(image: Image) -> dict[str, bytes | None]:
    """Path -> content of a file, None of others."""
    out = io.BytesIO()
    write_merged(image, out, EPOCH)
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        names = tar.getnames()
        assert len(names) == len(set(names)), "each path once"
        return {
            info.name: file.read() if info.isreg() and (file := tar.extractfile(info)) else None
            for info in tar
        }


def test_higher_layers_replace_and_delete(tmp_path: Path) -> None:
    folder: dict[str, Any] = {"type": tarfile.DIRTYPE, "mode": 0o755}
    image = image_of(
        tmp_path,
        [
            member("a", **folder), member("a/kept", b"1"), member("a/replaced", b"1"),
            member("a/deleted", b"1"), member("b", **folder), member("b/deleted", b"1"),
            member("c", **folder), member("c/deleted", b"1"), member("etc/fstab", b"old"),
            member("d.wh.", **folder), member("d.wh./deleted", b"1"), member("e", b"1"),
        ],
        [
            member("a", **{**folder, "mode": 0o700}), member("a/replaced", b"2"),
            member("a/.wh.deleted"), member(".wh.b"), member("c/.wh..wh..opq"),
            member("c/new", b"2"), member("d.wh./.wh.deleted"), member("e", b"2"),
            member(".wh.e"),
        ],
    )  # fmt: skip
    files = merged(image)
    own = {path: content for path, content in files.items() if not path.startswith("etc/")}
    assert own == {
        "a": None, "c": None, "d.wh.": None, "a/kept": b"1", "a/replaced": b"2", "c/new": b"2",
        "e": b"2",
    }  # fmt: skip
    assert files["etc/fstab"] != b"old"


def test_folder_has_the_mode_of_the_highest_layer(tmp_path: Path) -> None:
    folder: dict[str, Any] = {"type": tarfile.DIRTYPE}
    image = image_of(
        tmp_path, [member("a", mode=0o755, **folder)], [member("a", mode=0o700, **folder)]
    )
    out = io.BytesIO()
    write_merged(image, out, EPOCH)
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        assert tar.getmember("a").mode == 0o700


def test_hard_link_to_a_replaced_file_is_refused(tmp_path: Path) -> None:
    link = member("link", type=tarfile.LNKTYPE, linkname="file")
    image = image_of(tmp_path, [member("file", b"1"), link], [member("file", b"2")])
    with pytest.raises(LayoutError, match="/link is a hard link to a file that a higher layer"):
        merged(image)


def test_enroot_starts_the_server_with_its_arguments(tmp_path: Path) -> None:
    files = enroot_files({**CONFIG, "WorkingDir": str(tmp_path), "Entrypoint": ["echo", "a b"]})
    assert files["etc/environment"] == b"PATH=/opt/venv/bin:/usr/bin\nHOME=/cache\n"
    assert b"${ENROOT_ROOTFS}/cache /cache none x-create=dir,bind,rw" in files["etc/fstab"]
    script = tmp_path / "rc"
    script.write_bytes(files["etc/rc"])
    done = subprocess.run(["sh", script, "c d"], capture_output=True, text=True, check=True)
    assert done.stdout == "a b c d\n"


@squashfs
def test_squashfs_has_the_files_of_the_image(built: Image, tmp_path: Path) -> None:
    """Unpacked by another program; written twice, it is the same."""
    targets = [tmp_path / "one.sqsh", tmp_path / "two.squashfs"]
    for target in targets:
        write_archive(Runner(), built.path, NAME, target, EPOCH)
    assert targets[0].read_bytes() == targets[1].read_bytes()
    listing = subprocess.run(
        ["unsquashfs", "-lls", "-UTC", targets[0]], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    root_line = next(line for line in listing if line.endswith(" squashfs-root"))
    assert root_line.startswith("drwxr-xr-x ")
    assert {line.split()[3] for line in listing if "squashfs-root" in line} == {"2025-01-01"}
    root = tmp_path / "root"
    subprocess.run(["unsquashfs", "-quiet", "-no-progress", "-dest", root, targets[0]], check=True)
    expected = {path: content for path, content in merged(built).items() if content is not None}
    found = {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
    }
    assert found == expected
    assert b"exec vllm serve" in found["etc/rc"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.sqsh", "root", "two.squashfs"]


@squashfs
def test_failed_squashfs_keeps_the_older_one(built: Image, tmp_path: Path) -> None:
    target = tmp_path / "x.sqsh"
    target.write_bytes(b"older")
    with pytest.MonkeyPatch.context() as patch:
        words = [word.replace("zstd", "none-such") for word in archive.MKSQUASHFS]
        patch.setattr(archive, "MKSQUASHFS", words)
        with pytest.raises(CommandFailedError, match="mksquashfs exited with 1"):
            write_archive(Runner(), built.path, NAME, target, EPOCH)
    assert target.read_bytes() == b"older"


def test_tool_that_does_not_read_all_has_failed(
    built: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it exits with 0 and has written a file."""
    target = tmp_path / "x.sqsh"
    target.write_bytes(b"older")
    monkeypatch.setattr(archive, "MKSQUASHFS", ("sh", "-c", 'echo cut > "$0"', "FILE"))
    with pytest.raises(CommandFailedError, match="sh exited with 0"):
        write_archive(Runner(), built.path, NAME, target, EPOCH)
    assert target.read_bytes() == b"older"


def test_archive_that_cannot_be_written_is_refused_before_a_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = make_project(tmp_path)
    monkeypatch.setattr(archive, "which", lambda _: None)
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(project.root))
    monkeypatch.setattr("vllm_forge.images.resolve", None)  # is not reached
    for name, words in (
        (tmp_path / "x.sqsh", "mksquashfs is not installed"),
        (tmp_path / "no-folder" / "x.tar", "not a folder in which"),
    ):
        assert main(["build", "alpha", f"--archive={name}"]) == 33
        assert words in capsys.readouterr().err
    project.index.close()


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="no skopeo: nox -s test -- --provision")
@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_tar_is_what_docker_and_podman_load(built: Image, tmp_path: Path, kind: str) -> None:
    """Both lists in it, of the OCI layout and docker's own, lead to the image."""
    target = tmp_path / "x.tar"
    target.write_bytes(b"older")
    write_archive(Runner(), built.path, NAME, target, EPOCH)
    argv = ["skopeo", "inspect", "--config", f"{kind}:{target}"]
    config = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
    assert config["rootfs"]["diff_ids"] == built.config["rootfs"]["diff_ids"]
    argv = ["skopeo", "inspect", f"{kind}:{target}"]
    shown = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
    assert len(shown["Layers"]) == len(built.layers)
    if kind == "oci-archive":
        assert shown["Digest"] == f"sha256:{built.digest}"


def test_tar_of_an_image_is_the_same_each_time(built: Image, tmp_path: Path) -> None:
    for name in ("one.tar", "two.tar"):
        write_archive(Runner(), built.path, NAME, tmp_path / name, EPOCH)
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


def test_dry_run_prints_what_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_archive(RecordingRunner(), Path("dist/x"), NAME, tmp_path / "x.tar", EPOCH)
    write_archive(RecordingRunner(), Path("dist/x"), NAME, tmp_path / "x.sqsh", EPOCH)
    out = capsys.readouterr().out
    assert f"write dist/x as a tar to {tmp_path}/.x.tar.new" in out
    assert f"mksquashfs - {tmp_path}/.x.sqsh.new -tar -noappend" in out
    assert f"mv --force {tmp_path}/.x.sqsh.new {tmp_path}/x.sqsh" in out


@pytest.mark.parametrize("name", ["image", "image.tgz", "image.sqsh.gz", "tar"])
def test_name_of_no_kind_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="expected a name that ends in"):
        require_archive(Path(name), dry_run=True)
