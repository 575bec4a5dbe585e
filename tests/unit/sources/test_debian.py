"""The lock of Debian packages: read strictly; fetched by hash from the archives that have them."""

from __future__ import annotations

import hashlib
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.support.index_server import refusing_port, serve_folder
from vllm_forge.host.errors import CommandFailedError
from vllm_forge.project import Project
from vllm_forge.sources.debian import (
    BaseLock,
    DebianPackage,
    control,
    fetch_debs,
    input_digest,
    parse_index,
    read_base_lock,
    verified_debs,
    write_base_lock,
)
from vllm_forge.sources.errors import (
    DistributionNotFoundError,
    HashMismatchError,
    IndexUnreachableError,
    LockFileError,
    TruncatedFileError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vllm_forge.matrix import Base

DATE = "20261130T000000Z"
CONTENT = {"libc6": b"six" * 500, "python3": b"three" * 700}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_FORGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def base() -> Base:
    row = Project.find().matrix.base
    return row.model_copy(update={"lock": "debian.txt", "packages": ("libc6", "python3")})


def package(name: str) -> DebianPackage:
    return DebianPackage(
        name=name,
        version="1:2.41-12+deb13u1~x",
        architecture="amd64",
        sha256=hashlib.sha256(CONTENT[name]).hexdigest(),
        size=len(CONTENT[name]),
        path=f"pool/main/{name[0]}/{name}/{name}_2.41-12+deb13u1~x_amd64.deb",
    )


@pytest.fixture
def lock(base: Base, tmp_path: Path) -> BaseLock:
    write_base_lock(tmp_path / "debian.txt", base, DATE, [package(name) for name in CONTENT])
    lock = read_base_lock(tmp_path, base)
    assert lock is not None
    return lock


@contextmanager
def archive(folder: Path, *names: str) -> Iterator[str]:
    """An archive on 127.0.0.1 that has these packages."""
    folder.mkdir()
    for name in names:
        path = folder / package(name).path
        path.parent.mkdir(parents=True)
        path.write_bytes(CONTENT[name])
    with serve_folder(folder) as url:
        yield url


def test_lock_reads_what_was_written(lock: BaseLock) -> None:
    assert lock.packages == (package("libc6"), package("python3"))
    assert lock.date == DATE


def test_matrix_without_a_lock_has_none(base: Base, tmp_path: Path) -> None:
    assert read_base_lock(tmp_path, base.model_copy(update={"lock": None})) is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# input: ", "# input: 0", "was not made for what matrix.toml now says"),
        (f"# date: {DATE}", "#", "was not made for what matrix.toml now says"),
        ("libc6 ", "zlibc6 ", "not sorted or not unique"),
        ("libc6 1", "python3 1", "not sorted or not unique"),
        ("amd64 ", "amd64  ", "not a lock entry"),
        ("pool/main/l/", "pool/main/../", "not a lock entry"),
        ("pool/main/l/", "/pool/main/l/", "not a lock entry"),
        ("\n", "\r\n", "CRLF"),
    ],
)
def test_edited_lock_is_refused(
    lock: BaseLock, base: Base, old: str, new: str, message: str
) -> None:
    text = lock.path.read_text()
    assert old in text
    lock.path.write_bytes(text.replace(old, new).encode())
    with pytest.raises(LockFileError, match=message) as caught:
        read_base_lock(lock.path.parent, base)
    assert "nox -s lock -- --base" in caught.value.remedy


def test_lock_without_packages_is_refused(base: Base, tmp_path: Path) -> None:
    write_base_lock(tmp_path / "debian.txt", base, DATE, [])
    with pytest.raises(LockFileError, match="was not made for"):
        read_base_lock(tmp_path, base)


def test_missing_lock_is_refused(base: Base, tmp_path: Path) -> None:
    with pytest.raises(LockFileError, match="cannot read the lock"):
        read_base_lock(tmp_path, base)


def test_lock_of_other_packages_is_refused(lock: BaseLock, base: Base, tmp_path: Path) -> None:
    other = base.model_copy(update={"packages": ("gcc", "libc6", "python3")})
    assert input_digest(other) != input_digest(base)
    with pytest.raises(LockFileError, match="was not made for"):
        read_base_lock(tmp_path, other)
    assert lock.packages


def test_committed_lock_has_all_packages_of_the_matrix() -> None:
    project = Project.find()
    lock = read_base_lock(project.root, project.matrix.base)
    assert lock is not None
    assert set(project.matrix.base.packages) < {package.name for package in lock.packages}


@pytest.mark.parametrize("compression", ["xz", "gzip", "none", "zstd"])
def test_control_file_is_what_dpkg_reads(compression: str, tmp_path: Path) -> None:
    text = "Package: tiny\nVersion: 1:2-3\nArchitecture: all\nMaintainer: nobody <n@example>\n"
    text += "Description: a package\n of two lines\n"
    (tmp_path / "tree" / "DEBIAN").mkdir(parents=True)
    (tmp_path / "tree" / "DEBIAN" / "control").write_text(text)
    deb = tmp_path / "tiny.deb"
    argv = ["dpkg-deb", "--uniform-compression", f"-Z{compression}", "--build"]
    subprocess.run([*argv, tmp_path / "tree", deb], check=True, capture_output=True)
    assert control(deb) == text
    deb.write_bytes(deb.read_bytes()[:150])
    with pytest.raises(CommandFailedError, match="dpkg-deb exited with 2"):
        control(deb)


def test_archive_that_moved_on_is_followed_by_the_snapshot(lock: BaseLock, tmp_path: Path) -> None:
    with (
        archive(tmp_path / "moved", "python3") as mirror,
        archive(tmp_path / "old", "libc6") as snapshot,
    ):
        fetch_debs(lock, [mirror, snapshot])
    assert [path.read_bytes() for path in verified_debs(lock)] == [*CONTENT.values()]


def test_packages_in_the_cache_need_no_archive(lock: BaseLock, tmp_path: Path) -> None:
    with archive(tmp_path / "all", *CONTENT) as mirror:
        fetch_debs(lock, [mirror])
    fetch_debs(lock, [])


def test_all_packages_that_are_gone_are_named(lock: BaseLock, tmp_path: Path) -> None:
    with (
        archive(tmp_path / "moved") as mirror,
        pytest.raises(DistributionNotFoundError) as caught,
    ):
        fetch_debs(lock, [mirror])
    assert all(f"{name}_2.41" in caught.value.what for name in CONTENT)
    assert "nox -s lock -- --base" in caught.value.remedy


@pytest.mark.usefixtures("no_retries")
def test_unreachable_archive_is_not_one_that_lost_a_package(lock: BaseLock) -> None:
    with (
        refusing_port() as port,
        pytest.raises(IndexUnreachableError, match="cannot be fetched"),
    ):
        fetch_debs(lock, [f"http://127.0.0.1:{port}/"])


@pytest.mark.parametrize(
    ("other", "error"),
    [(b"sex" * 500, HashMismatchError), (b"six" * 501, TruncatedFileError)],
)
def test_archive_that_serves_other_bytes_is_refused(
    lock: BaseLock, tmp_path: Path, other: bytes, error: type[Exception]
) -> None:
    with archive(tmp_path / "bad", *CONTENT) as mirror:
        (tmp_path / "bad" / package("libc6").path).write_bytes(other)
        with pytest.raises(error):
            fetch_debs(lock, [mirror])
    assert not package("libc6").file.exists()


def test_damaged_package_of_the_cache_is_refused_and_fetched_again(
    lock: BaseLock, tmp_path: Path
) -> None:
    with archive(tmp_path / "all", *CONTENT) as mirror:
        fetch_debs(lock, [mirror])
        package("libc6").file.write_bytes(b"sex" * 500)
        with pytest.raises(HashMismatchError, match=r"libc6.*the lock says"):
            verified_debs(lock)
        fetch_debs(lock, [mirror])
    assert verified_debs(lock)


LISTS = """Package: libc6
Version: 2.41-13
Architecture: amd64
Filename: pool/new.deb
Size: 2
SHA256: bb

Package: libc6
Version: 2.41-12
Architecture: amd64
Depends: libgcc-s1
Description: GNU C library
 Size: 99
Filename: pool/old.deb
Size: 1
SHA256: aa
"""


def test_index_gives_the_installed_version() -> None:
    (row,) = parse_index(LISTS, {("libc6", "2.41-12")})
    assert (row.path, row.size, row.sha256) == ("pool/old.deb", 1, "aa")


def test_index_without_an_installed_version_is_refused() -> None:
    with pytest.raises(DistributionNotFoundError, match=r"no libc6 2\.41-11"):
        parse_index(LISTS, {("libc6", "2.41-11")})
