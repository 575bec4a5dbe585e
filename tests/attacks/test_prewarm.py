"""Boundary: the folder of --prewarm. Code of a container wrote it, as root where tests run as root.

Only plain files and folders of it enter an image.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_forge.images import prewarm
from vllm_forge.images.errors import ForeignFileError
from vllm_forge.images.prewarm import (
    Prewarm,
    copy_plain,
    prewarm_layer,
    require_plain,
    tree_digest,
)

EPOCH = 1735689600


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


ATTACKS: dict[str, Callable[[Path], object]] = {
    "link to a file of the host": lambda folder: (folder / "triton/x").symlink_to("/etc/shadow"),
    "link to a folder of the host": lambda folder: (folder / "x").symlink_to("/etc"),
    "link within": lambda folder: (folder / "x").symlink_to("triton/kernel.cubin"),
    "dangling link": lambda folder: (folder / "x").symlink_to("nothing"),
    "FIFO": lambda folder: os.mkfifo(folder / "triton" / "x"),
    "socket": lambda folder: bind(folder / "x"),
    "second name": lambda folder: os.link(folder / "triton/kernel.cubin", folder / "x"),
    "newline": lambda folder: (folder / "a\nb").touch(),
    "terminal codes": lambda folder: (folder / "a\x1b[2Jb").touch(),
    "folder with a newline": lambda folder: (folder / "a\nb").mkdir(),
    "sparse file of 1 TB": lambda folder: os.truncate(folder / "triton/kernel.cubin", 1 << 40),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "jit"
    (folder / "triton").mkdir(parents=True)
    (folder / "triton" / "kernel.cubin").write_bytes(b"cubin" * 100)
    (folder / "triton" / "empty").touch()
    return folder


def test_plain_files_are_taken(folder: Path) -> None:
    assert [path.name for path in require_plain(folder)] == ["empty", "kernel.cubin"]
    layer = prewarm_layer(of(folder), EPOCH)
    kernel = layer.files / "opt/vllm-forge/jit/triton/kernel.cubin"
    assert kernel.read_bytes() == b"cubin" * 100


@pytest.mark.parametrize("name", ATTACKS)
def test_other_than_plain_files_are_refused(name: str, folder: Path) -> None:
    digest = tree_digest(folder)
    ATTACKS[name](folder)
    with pytest.raises(ForeignFileError) as refused:
        require_plain(folder)
    assert str(folder) in refused.value.where
    with pytest.raises(ForeignFileError):
        prewarm_layer(of(folder, digest), EPOCH)


@pytest.mark.parametrize("name", sorted(ATTACKS.keys() - {"link to a folder of the host"}))
def test_kit_takes_what_is_checked(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container may change the folder of --caches between the check and the copy."""
    monkeypatch.setattr(prewarm, "MOST", 10_000)
    require_plain(folder)
    ATTACKS[name](folder)
    with pytest.raises(ForeignFileError):
        copy_plain(folder, tmp_path / "copy")


def test_kit_does_not_follow_a_link_to_a_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "secret").touch()
    (folder / "x").symlink_to(tmp_path / "host")
    copy_plain(folder, tmp_path / "copy")
    assert not [*(tmp_path / "copy").rglob("secret"), *(tmp_path / "copy").glob("x")]


def test_copy_for_a_kit_is_the_folder(folder: Path, tmp_path: Path) -> None:
    kernel = folder / "triton" / "kernel.cubin"
    kernel.chmod(0o750)
    os.utime(kernel, ns=(1, 1_000_000_007))
    copy_plain(folder, tmp_path / "copy")
    assert tree_digest(tmp_path / "copy") == tree_digest(folder)
    status = (tmp_path / "copy" / "triton" / "kernel.cubin").stat()
    assert (status.st_mode & 0o777, status.st_mtime_ns) == (0o750, 1_000_000_007)


@pytest.mark.parametrize("call", ["scandir", "open"])
def test_part_that_cannot_be_read_is_not_left_out(
    folder: Path, tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a container that ran as root with umask 077, read by another user."""
    known = getattr(os, call)

    def refuse(place: Any, *given: Any, **named: Any) -> object:
        if str(place).endswith("triton"):
            raise PermissionError(errno.EACCES, "Permission denied", place)
        return known(place, *given, **named)

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(PermissionError):
        copy_plain(folder, tmp_path / "copy") if call == "open" else require_plain(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a device: run as root")
def test_device_is_refused(folder: Path) -> None:
    os.mknod(folder / "null", 0o20666, os.makedev(1, 3))
    with pytest.raises(ForeignFileError, match="not a plain file"):
        require_plain(folder)


def test_folder_that_changes_while_it_is_read_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = of(folder), prewarm.require_plain

    def swapped(path: Path) -> list[Path]:
        files = real(path)
        (folder / "triton" / "kernel.cubin").write_bytes(b"other" * 100)
        return files

    monkeypatch.setattr(prewarm, "require_plain", swapped)
    with pytest.raises(ForeignFileError, match="changed while it was read"):
        prewarm_layer(made, EPOCH)


def of(folder: Path, digest: str = "") -> Prewarm:
    return Prewarm(folder=folder, key={}, digest=digest or tree_digest(folder))
