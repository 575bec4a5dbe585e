"""Downloads that hosts share: each has a cache of its own, and believes nothing of the folder."""

from __future__ import annotations

import hashlib
import os
import resource
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.index_server import IndexServer, Served
from vllm_forge.errors import UsageError
from vllm_forge.sources import Download, Index, LockedWheel, Wheelhouse, download_all
from vllm_forge.sources.shared import STALE_S, VARIABLE, give, take

if TYPE_CHECKING:
    from collections.abc import Callable

CONTENT = b"wheel" * 5000
NAME = "big-1.0-py3-none-any.whl"


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


@pytest.fixture
def wheel(server: IndexServer) -> LockedWheel:
    served = Served(content=CONTENT)
    server.add("big", NAME, served)
    return LockedWheel(
        name="big", version="1.0", filename=NAME, size=served.size, sha256=served.sha256
    )


@pytest.fixture
def fetch(
    tmp_path: Path, server: IndexServer, wheel: LockedWheel, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    """Fetch the wheel on a host of that name; it is in the host's own cache."""

    def host(name: str) -> Path:
        monkeypatch.setenv("VLLM_FORGE_CACHE", str(tmp_path / name))
        Wheelhouse().fetch([wheel], Index(server.url))
        path = Wheelhouse().verify(wheel)
        assert path.read_bytes() == CONTENT
        return path

    return host


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


def test_second_host_needs_no_index(
    shared: Path, fetch: Callable[[str], Path], server: IndexServer, wheel: LockedWheel
) -> None:
    first = fetch("one")
    asked = len(server.requests)
    second = fetch("two")
    assert len(server.requests) == asked
    (stored,) = files(shared)
    assert stored == shared / "downloads" / wheel.sha256[:2] / wheel.sha256
    # No file has a second name: a host that writes to its own changes no other's.
    assert {path.stat().st_nlink for path in (first, second, stored)} == {1}


def test_nothing_is_shared_unless_asked(
    shared: Path, fetch: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE)
    fetch("one")
    assert files(shared) == []


@pytest.mark.parametrize("damage", ["bits", "truncated", "empty", "link", "fifo"])
def test_damaged_file_is_replaced(
    shared: Path, fetch: Callable[[str], Path], server: IndexServer, damage: str
) -> None:
    fetch("one")
    (stored,) = files(shared)
    stored.unlink()
    other = {"bits": b"x" * len(CONTENT), "truncated": CONTENT[:-1], "empty": b""}
    if damage in other:
        stored.write_bytes(other[damage])
    elif damage == "link":
        stored.symlink_to(__file__)
    else:
        os.mkfifo(stored)
    asked = len(server.requests)
    fetch("two")
    assert len(server.requests) > asked
    assert stored.read_bytes() == CONTENT
    assert not stored.is_symlink()


def test_what_a_dead_host_left_is_never_taken(shared: Path, fetch: Callable[[str], Path]) -> None:
    """It died while it wrote: no lock of it is waited for."""
    fetch("one")
    (stored,) = files(shared)
    stored.unlink()
    old, young = stored.with_name(".new-old"), stored.with_name(".new-young")
    for path in (old, young):
        path.write_bytes(CONTENT[:100])
    os.utime(old, (0, old.stat().st_mtime - STALE_S - 60))
    other = stored.with_name(f"{stored.name[:2]}{'0' * 62}")
    other.write_bytes(b"another file, which is as old")
    os.utime(other, (0, 0))
    fetch("two")
    assert sorted(files(shared)) == sorted([stored, young, other])


def test_hosts_that_write_at_once_leave_one_file(shared: Path, tmp_path: Path) -> None:
    digest, source = hashlib.sha256(CONTENT).hexdigest(), tmp_path / "source"
    source.write_bytes(CONTENT)
    start = threading.Barrier(4)

    def host() -> None:
        start.wait()
        give(source, digest, shared)

    hosts = [threading.Thread(target=host) for _ in range(4)]
    for thread in hosts:
        thread.start()
    for thread in hosts:
        thread.join()
    (stored,) = files(shared)
    assert stored.read_bytes() == CONTENT
    assert take(digest, len(CONTENT), tmp_path / "taken")


def test_folder_that_cannot_be_written_does_not_stop_a_build(
    shared: Path, fetch: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (shared / "downloads").write_text("in the way")
    fetch("one")
    assert f"not shared in {VARIABLE}" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["shared", "/nowhere/at/all", __file__])
def test_missing_mount_is_refused(
    value: str, fetch: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(UsageError, match=VARIABLE):
        fetch("one")


def test_blobs_of_a_registry_are_not_shared(
    shared: Path, server: IndexServer, wheel: LockedWheel, tmp_path: Path
) -> None:
    item = Download(
        url=server.file_url(NAME), sha256=wheel.sha256, size=wheel.size,
        target=tmp_path / "blob", shared=False,
    )  # fmt: skip
    download_all(Index(server.url).session, [item])
    assert files(shared) == []


def test_file_that_is_too_long_does_not_fill_the_disk(
    shared: Path, fetch: Callable[[str], Path], tmp_path: Path, wheel: LockedWheel
) -> None:
    fetch("one")
    (stored,) = files(shared)
    stored.chmod(0o644)
    os.truncate(stored, 1 << 40)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 22, before[1]))
    try:
        assert not take(wheel.sha256, wheel.size, tmp_path / "two" / NAME)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files(shared) == [], "it was read until the disk was full, and kept"
    assert list((tmp_path / "two").iterdir()) == []


def test_folder_in_place_of_a_file_is_not_taken(
    shared: Path, fetch: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    fetch("one")
    (stored,) = files(shared)
    stored.unlink()
    stored.mkdir()
    fetch("two")
    assert "not taken" in capsys.readouterr().err


def test_file_of_this_user_keeps_its_mode(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user puts a link in place of the file that is being written."""
    source, mine = tmp_path / "source", tmp_path / "mine"
    source.write_bytes(CONTENT)
    mine.write_text("private")
    mine.chmod(0o600)

    def swap(_: int) -> None:
        (aside,) = files(shared)
        aside.unlink()
        aside.symlink_to(mine)

    monkeypatch.setattr(os, "fsync", swap)
    digest = hashlib.sha256(CONTENT).hexdigest()
    give(source, digest, shared)
    assert mine.stat().st_mode & 0o777 == 0o600
    assert not take(digest, len(CONTENT), tmp_path / "taken")
