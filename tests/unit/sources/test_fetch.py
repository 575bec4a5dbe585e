"""Downloads against an index on 127.0.0.1 that fails in chosen ways."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pypi_simple
import pytest
from pypi_simple import PYPI_SIMPLE_ENDPOINT

from tests.support.index_server import PATIENCE_S, IndexServer, Served, refusing_port
from vllm_forge.errors import ForgeError
from vllm_forge.host.errors import DiskSpaceError
from vllm_forge.host.files import file_digest
from vllm_forge.sources import Download, Index, LockedWheel, Wheelhouse, download_all, fetch, index
from vllm_forge.sources.errors import (
    DistributionNotFoundError,
    DownloadInterruptedError,
    HashMismatchError,
    IndexUnreachableError,
    TruncatedFileError,
)
from vllm_forge.sources.index import index_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# The client reads in blocks; what is under a block when a connection breaks is fetched again.
BLOCK = 1 << 10
SIZE = 40 * BLOCK + 17
NAME = "big-1.0-py3-none-any.whl"


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)  # noqa: S311


def locked(filename: str, served: Served) -> LockedWheel:
    name, version, *_ = filename.split("-")
    return LockedWheel(
        name=name, version=version, filename=filename, size=served.size, sha256=served.sha256
    )


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch, no_retries: None) -> None:
    monkeypatch.setattr(index, "CHUNK", BLOCK)


@pytest.fixture
def house() -> Wheelhouse:
    return Wheelhouse()


@pytest.fixture
def get(server: IndexServer, tmp_path: Path) -> Callable[[Served], Path]:
    """Serve one file and download it to a folder of the test."""

    def download(served: Served) -> Path:
        server.add("big", NAME, served)
        target = tmp_path / "got" / NAME
        item = Download(
            url=served.url or server.file_url(NAME),
            sha256=served.sha256,
            size=served.size,
            target=target,
        )
        download_all(Index(server.url).session, [item])
        return target

    return download


def part_of(tmp_path: Path) -> Path:
    return tmp_path / "got" / f"{NAME}.part"


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "got").iterdir())


def test_happy_path(get: Callable[[Served], Path], tmp_path: Path, server: IndexServer) -> None:
    content = noise(SIZE)
    assert get(Served(content=content)).read_bytes() == content
    assert left(tmp_path) == [NAME]
    assert [item.range_start for item in server.asked(NAME)] == [None]


def test_empty_file(get: Callable[[Served], Path], tmp_path: Path) -> None:
    part_of(tmp_path).parent.mkdir()
    part_of(tmp_path).touch()
    assert get(Served(content=b"")).read_bytes() == b""


def test_many_files_side_by_side(server: IndexServer, house: Wheelhouse) -> None:
    wheels = []
    for number in range(25):
        filename = f"p{number}-1.0-py3-none-any.whl"
        served = server.add(f"p{number}", filename, Served(content=noise(500 * number, number)))
        wheels.append(locked(filename, served))
    house.fetch(wheels, Index(server.url))
    assert house.missing(wheels) == []
    for wheel in wheels:
        assert house.verify(wheel) == house.path(wheel)


def test_cut_once_is_resumed(
    get: Callable[[Served], Path], server: IndexServer, tmp_path: Path
) -> None:
    content = noise(SIZE)
    cut = 10 * BLOCK + 100
    assert get(Served(content=content, cuts=[cut])).read_bytes() == content
    first, second = server.asked(NAME)
    assert (first.range_start, first.sent) == (None, cut)
    assert second.range_start is not None
    # Whole blocks are kept, and what was kept is not fetched again.
    assert cut - BLOCK <= second.range_start <= cut
    assert (second.status, second.sent) == (206, SIZE - second.range_start)
    assert left(tmp_path) == [NAME]


def test_cut_before_the_first_byte_of_the_body(get: Callable[[Served], Path]) -> None:
    content = noise(SIZE)
    assert get(Served(content=content, cuts=[0])).read_bytes() == content


def test_hang_up_before_an_answer_is_tried_again(get: Callable[[Served], Path]) -> None:
    content = noise(SIZE)
    assert get(Served(content=content, hang_ups=2)).read_bytes() == content


def test_cut_always_keeps_what_came(
    get: Callable[[Served], Path], server: IndexServer, tmp_path: Path
) -> None:
    content = noise(SIZE)
    with pytest.raises(DownloadInterruptedError) as broken:
        get(Served(content=content, cut_always=3 * BLOCK))
    assert left(tmp_path) == [f"{NAME}.part"]
    kept = part_of(tmp_path).read_bytes()
    assert kept == content[: len(kept)]
    assert len(kept) >= fetch.TRIES * 2 * BLOCK
    assert f"{len(kept)} of {SIZE} bytes" in str(broken.value)
    assert "resumes" in broken.value.remedy
    asked = server.asked(NAME)
    assert len(asked) == fetch.TRIES
    starts = [item.range_start or 0 for item in asked]
    assert starts == sorted(set(starts))


def test_second_run_goes_on_where_the_first_stopped(
    get: Callable[[Served], Path], server: IndexServer, tmp_path: Path
) -> None:
    content = noise(SIZE)
    with pytest.raises(DownloadInterruptedError):
        get(Served(content=content, cut_always=3 * BLOCK))
    kept = part_of(tmp_path).stat().st_size
    before = len(server.asked(NAME))
    assert get(Served(content=content)).read_bytes() == content
    (last,) = server.asked(NAME)[before:]
    assert (last.range_start, last.sent) == (kept, SIZE - kept)


def test_complete_part_is_taken_without_a_request(
    get: Callable[[Served], Path], server: IndexServer, tmp_path: Path
) -> None:
    content = noise(SIZE)
    part_of(tmp_path).parent.mkdir()
    part_of(tmp_path).write_bytes(content)
    assert get(Served(content=content)).read_bytes() == content
    assert server.asked(NAME) == []
    assert left(tmp_path) == [NAME]


def test_part_that_is_too_long_is_thrown_away(
    get: Callable[[Served], Path], tmp_path: Path
) -> None:
    content = noise(SIZE)
    part_of(tmp_path).parent.mkdir()
    part_of(tmp_path).write_bytes(content + b"more")
    assert get(Served(content=content)).read_bytes() == content


def test_server_without_ranges_sends_all_again(
    get: Callable[[Served], Path], server: IndexServer
) -> None:
    content = noise(SIZE)
    assert get(Served(content=content, ranges=False, cuts=[9 * BLOCK])).read_bytes() == content
    first, second = server.asked(NAME)
    assert first.range_start is None
    assert second.range_start is not None
    assert (second.status, second.sent) == (200, SIZE)


@pytest.mark.parametrize("cuts", [[], [9 * BLOCK]], ids=["in-one", "after-a-cut"])
def test_wrong_bytes(get: Callable[[Served], Path], tmp_path: Path, cuts: list[int]) -> None:
    content = noise(SIZE)
    wrong = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(HashMismatchError) as refused:
        get(Served(content=content, listed_sha256=wrong, cuts=cuts))
    assert left(tmp_path) == []
    assert wrong in str(refused.value)
    assert hashlib.sha256(content).hexdigest() in str(refused.value)


@pytest.mark.parametrize("kept", [5 * BLOCK, SIZE])
def test_damaged_part_of_an_earlier_run_comes_again(
    kept: int, get: Callable[[Served], Path], server: IndexServer, tmp_path: Path
) -> None:
    """The page of a captive portal, or what a crash left: the mirror has no part in it."""
    content = noise(SIZE)
    part_of(tmp_path).parent.mkdir()
    part_of(tmp_path).write_bytes(b"<html>" + content[6:kept])
    assert get(Served(content=content)).read_bytes() == content
    assert server.asked(NAME)[-1].range_start is None
    part_of(tmp_path).write_bytes(b"<html>" + content[6:kept])
    (tmp_path / "got" / NAME).unlink()
    with pytest.raises(HashMismatchError):
        get(Served(content=content, listed_sha256=hashlib.sha256(b"other").hexdigest()))
    assert left(tmp_path) == []


def test_longer_than_listed(get: Callable[[Served], Path], tmp_path: Path) -> None:
    with pytest.raises(TruncatedFileError, match="is longer than"):
        get(Served(content=noise(SIZE), listed_size=SIZE - 5))
    assert left(tmp_path) == []


@pytest.mark.parametrize("ranges", [True, False])
def test_shorter_than_listed(get: Callable[[Served], Path], tmp_path: Path, ranges: bool) -> None:
    with pytest.raises(TruncatedFileError) as refused:
        get(Served(content=noise(SIZE), listed_size=SIZE + 5, ranges=ranges))
    assert f"{SIZE} of {SIZE + 5} bytes" in str(refused.value)
    assert not (tmp_path / "got" / NAME).exists()


@pytest.mark.parametrize("status", [404, 410])
@pytest.mark.parametrize("kept", [0, 5 * BLOCK])
def test_listed_file_that_is_gone(
    get: Callable[[Served], Path], server: IndexServer, tmp_path: Path, status: int, kept: int
) -> None:
    if kept:
        part_of(tmp_path).parent.mkdir()
        part_of(tmp_path).write_bytes(noise(SIZE)[:kept])
    with pytest.raises(DistributionNotFoundError, match=f"no host has it any more: {NAME}"):
        get(Served(content=noise(SIZE), status=status))
    assert len(server.asked(NAME)) == 1


def test_server_error_is_tried_again_then_named(get: Callable[[Served], Path]) -> None:
    with pytest.raises(IndexUnreachableError, match="500"):
        get(Served(content=noise(SIZE), status=500))


def test_file_host_that_refuses(get: Callable[[Served], Path], tmp_path: Path) -> None:
    with refusing_port() as port, pytest.raises(IndexUnreachableError, match=f"{port}"):
        get(Served(content=noise(SIZE), url=f"http://127.0.0.1:{port}/{NAME}"))
    assert left(tmp_path) == []


def test_full_disk_is_not_called_a_broken_connection(
    get: Callable[[Served], Path], server: IndexServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write fails once there is something of the file, as on a disk that fills up."""
    real = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.suffix == ".part" and mode != "rb":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DiskSpaceError):
        get(Served(content=noise(SIZE)))
    assert len(server.asked(NAME)) == 1


def test_one_bad_file_leaves_the_others_usable(server: IndexServer, house: Wheelhouse) -> None:
    good = server.add("good", "good-1.0-py3-none-any.whl", Served(content=noise(SIZE, 1)))
    bad = server.add("big", NAME, Served(content=noise(SIZE), listed_sha256="0" * 64))
    wheels = [locked("good-1.0-py3-none-any.whl", good), locked(NAME, bad)]
    with pytest.raises(HashMismatchError):
        house.fetch(wheels, Index(server.url))
    bad.listed_sha256 = ""
    wheels[1] = locked(NAME, bad)
    house.fetch(wheels, Index(server.url))
    for wheel in wheels:
        house.verify(wheel)


def test_interrupt_stops_the_downloads(
    get: Callable[[Served], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends the main thread's wait; the threads must not go on to the end of the file."""
    served = Served(content=noise(SIZE), stall_at=SIZE // 2)

    class Stop(threading.Event):
        """Lets the server go on once the client knows that it is to stop."""

        def set(self) -> None:
            super().set()
            served.gate.set()

    def interrupted(jobs: Sequence[Any], **_: Any) -> Any:
        assert served.stalled.wait(PATIENCE_S)
        # Whoever waits for the threads without having stopped them gets the whole file.
        late = threading.Timer(3, served.gate.set)
        late.daemon = True
        late.start()
        raise KeyboardInterrupt

    class Threading:
        Event = Stop

    monkeypatch.setattr(fetch, "threading", Threading)
    monkeypatch.setattr(fetch, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get(served)
    assert left(tmp_path) == [f"{NAME}.part"]


@pytest.mark.parametrize(
    "served",
    [
        Served(content=noise(SIZE)),
        Served(content=noise(SIZE), cuts=[9 * BLOCK]),
        Served(content=noise(SIZE), ranges=False, cuts=[9 * BLOCK]),
    ],
    ids=["whole", "resumed", "sent-again"],
)
@pytest.mark.parametrize("kept", [0, 5 * BLOCK, SIZE + 1])
def test_progress_ends_at_the_total(
    get: Callable[[Served], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    served: Served,
    kept: int,
) -> None:
    totals: list[int] = []
    steps: list[int] = []

    @contextmanager
    def progress(_: str, total: int) -> Iterator[Callable[[int], None]]:
        totals.append(total)
        yield steps.append

    monkeypatch.setattr(fetch, "transfer_progress", progress)
    part_of(tmp_path).parent.mkdir()
    part_of(tmp_path).write_bytes((noise(SIZE) + b"more")[:kept])
    get(served)
    assert totals == [SIZE - kept if kept <= SIZE else SIZE]
    assert sum(steps) == sum(totals)


KILLED = """
import sys
from contextlib import contextmanager
from pathlib import Path
from vllm_forge.sources import Download, Index, download_all, fetch, index

@contextmanager
def progress(what, total): yield lambda size: print(size, flush=True)

fetch.transfer_progress = progress
index.CHUNK = int(sys.argv[6])
url, sha256, size, target = sys.argv[2], sys.argv[3], int(sys.argv[4]), Path(sys.argv[5])
item = Download(url=url, sha256=sha256, size=size, target=target)
download_all(Index(sys.argv[1]).session, [item])
"""


def test_kill_then_rerun(
    server: IndexServer, get: Callable[[Served], Path], tmp_path: Path
) -> None:
    block = 1 << 16  # larger than Python's file buffer, so that a block told is a block written
    size = 40 * block + 17
    content = noise(size)
    served = server.add("big", NAME, Served(content=content, stall_at=20 * block))
    arguments = [
        server.url, server.file_url(NAME), served.sha256, str(size), str(tmp_path / "got" / NAME),
        str(block),
    ]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        told = 0
        while told < 15 * block:
            told += int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    served.gate.set()
    assert left(tmp_path) == [f"{NAME}.part"]
    kept = part_of(tmp_path).stat().st_size
    assert kept > 10 * block
    assert get(Served(content=content)).read_bytes() == content
    assert server.asked(NAME)[-1].range_start == kept
    assert left(tmp_path) == [NAME]


# --- through the wheelhouse ----------------------------------------------------------------------


def test_nothing_missing_asks_no_index(
    server: IndexServer, house: Wheelhouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = [locked(NAME, server.add("big", NAME, Served(content=noise(SIZE))))]
    assert sum(wheel.size for wheel in house.missing(wheels)) == SIZE
    house.fetch(wheels, Index(server.url))
    assert house.missing(wheels) == []
    before = list(server.requests)

    def no_index() -> Index:
        raise AssertionError("an index was made")

    monkeypatch.setattr("vllm_forge.sources.fetch.Index", no_index)
    house.fetch(wheels)
    house.fetch([])
    assert server.requests == before


def test_only_the_missing_one_is_asked_for(server: IndexServer, house: Wheelhouse) -> None:
    one = locked(NAME, server.add("big", NAME, Served(content=noise(SIZE))))
    house.fetch([one], Index(server.url))
    other = "small-2.0-py3-none-any.whl"
    two = locked(other, server.add("small", other, Served(content=noise(100, 2))))
    before = len(server.requests)
    house.fetch([one, two], Index(server.url))
    assert [item.path for item in server.requests[before:]] == [
        "/simple/small/",
        f"/files/{other}",
    ]


def test_other_files_of_a_page_are_not_parsed(
    server: IndexServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        server.add("big", f"big-{number}.0-py3-none-any.whl", Served(content=noise(9, number)))
    parsed: list[str] = []

    def parse(filename: str, project: str) -> tuple[str, str, str]:
        parsed.append(filename)
        return project, "1.0", "wheel"

    monkeypatch.setattr(pypi_simple.classes, "parse_filename", parse)
    file = Index(server.url).find("big", NAME)
    assert parsed == [NAME]
    assert index.pins(file) == (hashlib.sha256(noise(9, 1)).hexdigest(), 9)


def test_file_of_another_size_in_the_cache_is_missing(
    server: IndexServer, house: Wheelhouse
) -> None:
    wheel = locked(NAME, server.add("big", NAME, Served(content=noise(SIZE))))
    house.path(wheel).parent.mkdir(parents=True)
    house.path(wheel).write_bytes(b"short")
    assert house.missing([wheel]) == [wheel]
    house.fetch([wheel], Index(server.url))
    assert house.verify(wheel).read_bytes() == noise(SIZE)


def test_wheel_is_hashed_once_when_it_was_downloaded(
    server: IndexServer, house: Wheelhouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = locked(NAME, server.add("big", NAME, Served(content=noise(SIZE))))
    hashed = house.fetch([wheel], Index(server.url))
    assert house.fetch([wheel], Index(server.url)) == {}
    calls = []
    monkeypatch.setattr(fetch, "verified", lambda path, _: calls.append(path))
    assert house.verify(wheel, hashed) == house.path(wheel)
    assert calls == []
    house.verify(wheel)
    assert calls == [house.path(wheel)]


def test_tampered_wheel_in_the_cache_is_refused(server: IndexServer, house: Wheelhouse) -> None:
    wheel = locked(NAME, server.add("big", NAME, Served(content=noise(SIZE))))
    hashed = house.fetch([wheel], Index(server.url))
    path = house.verify(wheel)
    time = path.stat().st_mtime_ns
    changed = bytearray(path.read_bytes())
    changed[SIZE // 2] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(time, time))
    with pytest.raises(HashMismatchError) as refused:
        house.verify(wheel, hashed)
    assert str(path) in str(refused.value)
    assert house.missing([wheel]) == [wheel]


def test_wheel_that_changed_after_its_hash_is_refused(
    server: IndexServer, house: Wheelhouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it was renamed, which gives it another change time anyway."""
    wheel = locked(NAME, server.add("big", NAME, Served(content=noise(SIZE))))

    def change(path: Path) -> str:
        digest = file_digest(path)
        before = path.stat()
        with path.open("r+b") as file:
            file.write(b"changed")
        while path.stat().st_ctime_ns == before.st_ctime_ns:  # the clock of files ticks in ms
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "file_digest", change)
        hashed = house.fetch([wheel], Index(server.url))
    with pytest.raises(HashMismatchError):
        house.verify(wheel, hashed)


def test_index_without_the_project(server: IndexServer, house: Wheelhouse) -> None:
    wheel = locked("none-1.0-py3-none-any.whl", Served(content=b"x"))
    with pytest.raises(DistributionNotFoundError, match="'none'"):
        house.fetch([wheel], Index(server.url))


def test_index_without_the_file(server: IndexServer, house: Wheelhouse) -> None:
    wheel = locked("big-2.0-py3-none-any.whl", Served(content=b"x"))
    server.add("big", NAME, Served(content=noise(SIZE)))
    with pytest.raises(DistributionNotFoundError, match=r"big-2\.0-py3-none-any\.whl"):
        house.fetch([wheel], Index(server.url))
    assert server.asked(NAME) == []


def test_index_that_refuses(house: Wheelhouse) -> None:
    wheel = locked(NAME, Served(content=b"x"))
    with refusing_port() as port:
        url = f"http://127.0.0.1:{port}/simple/"
        with pytest.raises(IndexUnreachableError) as refused:
            house.fetch([wheel], Index(url))
    assert refused.value.where == url
    assert "PIP_INDEX_URL" in refused.value.remedy
    assert not house.path(wheel).exists()


def test_index_that_answers_nonsense(server: IndexServer) -> None:
    """Whatever a captive portal says, it ends in an error of ours."""
    with pytest.raises(ForgeError):
        Index(f"{server.base}/files/").files("big")


@pytest.mark.parametrize("named", [False, True], ids=["in the URL", "uv's variables"])
def test_login_of_the_index_is_that_of_its_files(
    named: bool, server: IndexServer, house: Wheelhouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page links to the files of its own host by whole URLs, and those have no login."""
    wheel = locked(NAME, server.add("big", NAME, Served(content=noise(9))))
    server.login = "user:p@ss/w:rd"
    monkeypatch.setenv("UV_INDEX_CORP_1_USERNAME", "user")
    monkeypatch.setenv("UV_INDEX_CORP_1_PASSWORD", "p@ss/w:rd")
    url = server.url.replace("://", "://user:p%40ss%2Fw%3Ard@")
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"corp-1={server.url}" if named else url)
    house.fetch([wheel], Index())
    assert house.verify(wheel).read_bytes() == noise(9)


def test_login_of_the_index_is_not_for_other_hosts(server: IndexServer) -> None:
    url = server.file_url(NAME).replace("127.0.0.1", "localhost")
    server.add("big", NAME, Served(content=b"x", url=url))
    [file] = Index(server.url.replace("://", "://user:secret@")).files("big")
    assert file.url == url


def test_refused_login_is_named(server: IndexServer) -> None:
    server.login = "user:secret"
    with pytest.raises(IndexUnreachableError, match="refuses the login: 401"):
        Index(server.url).files("big")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"UV_DEFAULT_INDEX": "http://a/", "PIP_INDEX_URL": "http://b/"}, "http://a/"),
        ({"UV_INDEX_URL": "http://c/", "PIP_INDEX_URL": "http://b/"}, "http://c/"),
        ({"UV_DEFAULT_INDEX": "mirror=http://a/?x=1"}, "http://a/?x=1"),
        ({"PIP_INDEX_URL": "http://b/?x=1"}, "http://b/?x=1"),
        ({"PIP_INDEX_URL": "http://b/"}, "http://b/"),
        ({}, PYPI_SIMPLE_ENDPOINT),
    ],
)
def test_index_of_the_host(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert index_url() == expected


def test_index_of_pip_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pip", reason="without pip there is no pip.conf to read")
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = http://mirror.test/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert index_url() == "http://mirror.test/simple"
