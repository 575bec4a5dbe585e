"""FlashInfer's kernel archives: pins of the wheel, downloads from a server that fails."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.support.flashinfer import (
    FILES,
    HEADER,
    PATH,
    checksums,
    flashinfer,
    serve_archive,
    sha256,
)
from tests.support.index_server import IndexServer, refusing_port
from tests.support.wheels import Member, write_wheel
from vllm_forge.sources import LockedWheel, Wheelhouse, cubins
from vllm_forge.sources.cubins import LIST, MIRROR, Archive, read_archives
from vllm_forge.sources.errors import (
    DistributionNotFoundError,
    DownloadInterruptedError,
    HashMismatchError,
    IndexUnreachableError,
    TruncatedFileError,
    WheelError,
)

if TYPE_CHECKING:
    from pathlib import Path

KERNEL = "Bmm_b_sm100f.cubin"


def locked(folder: Path, contents: dict[str, bytes]) -> LockedWheel:
    """A wheel of these files, in the wheelhouse."""
    members = [Member(path=path, content=content) for path, content in contents.items()]
    name = "flashinfer_python-0.1-py3-none-any.whl"
    content = write_wheel(folder / name, "flashinfer_python", "0.1", members).read_bytes()
    wheel = LockedWheel(
        name="flashinfer-python", version="0.1", filename=name, size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )  # fmt: skip
    target = Wheelhouse().path(wheel)
    target.parent.mkdir(parents=True)
    target.write_bytes(content)
    return wheel


@pytest.fixture
def archive(
    server: IndexServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_retries: None
) -> Archive:
    """The archive that the tests' wheel pins; its mirror is the tests' server."""
    monkeypatch.setenv(MIRROR, f"{server.base}/files")
    wheel = locked(tmp_path, flashinfer())
    return next(row for row in read_archives(wheel) if row.name == "TRTLLM_GEN_BMM")


def test_archives_are_read_from_the_wheel(tmp_path: Path) -> None:
    archives = read_archives(locked(tmp_path, flashinfer()))
    assert {row.name: (row.path, row.sha256) for row in archives} == {
        "TRTLLM_GEN_FMHA": (f"{'5' * 40}/fmha/trtllm-gen", "6" * 64),
        "TRTLLM_GEN_BMM": (PATH, sha256(checksums())),
        "CUDNN_SDPA": (f"{'5' * 40}/fmha/cudnn", ""),
    }
    assert {row.url for row in archives} == {
        f"https://kernels.example/archives/{row.path}" for row in archives
    }


def test_files_are_fetched_once(archive: Archive, server: IndexServer) -> None:
    served = serve_archive(server)
    hashes = archive.fetch()
    assert hashes == {path: sha256(served[path].content) for path in (LIST, *FILES)}
    assert all((archive.folder / path).read_bytes() == data for path, data in FILES.items())
    server.requests.clear()
    assert archive.fetch() == hashes
    assert server.requests == []


@pytest.mark.parametrize("path", [LIST, KERNEL, HEADER])
def test_other_bytes_are_refused(path: str, archive: Archive, server: IndexServer) -> None:
    served = serve_archive(server)
    served[path].content = served[path].content[:-1] + b"?"
    with pytest.raises(HashMismatchError, match=path.rpartition("/")[2]):
        archive.fetch()
    assert not (archive.folder / path).exists()
    serve_archive(server)
    assert archive.fetch().keys() == {LIST, *FILES}


@pytest.mark.parametrize("path", [LIST, KERNEL])
def test_missing_file_is_named_with_a_remedy(
    path: str, archive: Archive, server: IndexServer
) -> None:
    served = serve_archive(server)
    served[path].status = 404
    with pytest.raises(DistributionNotFoundError, match=path) as missing:
        archive.fetch()
    assert MIRROR in missing.value.remedy
    assert "without --kernels" in missing.value.remedy


def test_unreachable_server_is_an_error_with_a_remedy(archive: Archive) -> None:
    with refusing_port() as port:
        nobody = replace(archive, url=f"http://user:secret@127.0.0.1:{port}/x")
        with pytest.raises(IndexUnreachableError, match=LIST) as refused:
            nobody.fetch()
    assert MIRROR in refused.value.remedy
    assert "secret" not in str(refused.value)


def test_cut_file_comes_again(archive: Archive, server: IndexServer) -> None:
    served = serve_archive(server)
    served[KERNEL].cuts = [0, 10, 600]
    archive.fetch()
    assert (archive.folder / KERNEL).read_bytes() == FILES[KERNEL]
    assert [row.range_start for row in server.asked(f"{PATH}/{KERNEL}")] == [None] * 4


def test_file_that_is_always_cut_is_not_taken(archive: Archive, server: IndexServer) -> None:
    served = serve_archive(server)
    served[KERNEL].cut_always = 600
    with pytest.raises(DownloadInterruptedError, match=KERNEL):
        archive.fetch()
    assert not (archive.folder / KERNEL).exists()


def test_file_that_is_too_large_is_refused(
    archive: Archive, server: IndexServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cubins, "LARGEST", 1000)
    serve_archive(server)[KERNEL].content = bytes(1001)
    with pytest.raises(TruncatedFileError, match="longer than 1000 bytes"):
        archive.fetch()


@pytest.mark.parametrize(
    "row",
    ["../../evil", "/etc/evil", "include/../../evil", "a//b", ".hidden", "two words", "tab\tname"],
)
def test_path_that_leaves_the_archive_is_refused(
    row: str, server: IndexServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list is pinned; what is in it still becomes a path in the cache and in the image."""
    listed = checksums() + f"{'0' * 64}  {row}\n".encode()
    monkeypatch.setenv(MIRROR, f"{server.base}/files")
    serve_archive(server, listed=listed)
    archives = read_archives(locked(tmp_path, flashinfer(listed)))
    with pytest.raises(WheelError, match="unsupported line"):
        next(item for item in archives if item.path == PATH).fetch()
