"""What a killed container tool left mounted is unmounted before it is deleted."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vllm_forge.host import files, remove
from vllm_forge.host.errors import MountedError
from vllm_forge.host.files import mounted_below

TABLE = (
    "22 1 254:0 / / rw - ext4 /dev/vda rw\n"
    "23 22 254:0 /s {top}/cache/store rw - ext4 /dev/vda rw\n"
    "24 23 0:30 / {top}/cache/store/a\\040b/merged rw - overlay overlay rw\n"
    "25 22 0:31 / {top}/cache2 rw - tmpfs tmpfs rw\n"
)
ROOT = os.geteuid() == 0


def test_the_latest_comes_first_and_neighbours_stay(tmp_path: Path) -> None:
    table = TABLE.format(top=tmp_path.resolve())
    found = mounted_below(tmp_path / "cache", table)
    assert found == [tmp_path / "cache/store/a b/merged", tmp_path / "cache/store"]
    assert mounted_below(tmp_path / "cache2", table) == []


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    """A folder in which a file system is mounted."""
    if not ROOT:
        pytest.skip("mounts: run it as root")
    inner = tmp_path / "store" / "merged"
    inner.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(inner)], check=False)
    if done.returncode != 0:
        pytest.skip("this host does not let root mount: run it where it does")
    (inner / "file").touch()
    return tmp_path / "store"


def test_a_mount_is_taken_away_with_the_folder(mounted: Path) -> None:
    remove(mounted)
    assert not mounted.exists()
    assert mounted_below(mounted) == []


def test_what_is_in_use_is_named_and_nothing_is_deleted(mounted: Path) -> None:
    (mounted / "beside").touch()
    with (mounted / "merged" / "file").open(), pytest.raises(MountedError, match="cannot unmount"):
        remove(mounted)
    assert (mounted / "beside").exists()
    remove(mounted)


def test_missing_path_is_accepted(tmp_path: Path) -> None:
    remove(tmp_path / "missing")


@pytest.fixture
def orphan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which something of a killed build writes, until it ends after two attempts."""
    (tmp_path / "store" / "bin").mkdir(parents=True)
    attempts, delete = iter(range(2)), shutil.rmtree

    def rmtree(path: Path) -> None:
        if next(attempts, None) is not None:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", "bin")
        delete(path)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    return tmp_path / "store"


def test_folder_that_orphans_still_write_to_is_removed(orphan: Path) -> None:
    remove(orphan)
    assert not orphan.exists()


def test_folder_that_is_written_to_for_too_long_is_an_error(
    orphan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "ORPHANS_S", 0)
    with pytest.raises(OSError, match="Directory not empty"):
        remove(orphan)
