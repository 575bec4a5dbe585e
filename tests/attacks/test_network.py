"""Boundary: the network. An index, a mirror or a proxy sends what it likes, as slowly as it likes.

Files are known by hash and size; pages end at a size; both end at a time; nothing is left over.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_forge.errors import ForgeError
from vllm_forge.sources import Download, Index, download_all, fetch, index
from vllm_forge.sources.errors import (
    DistributionNotFoundError,
    DownloadInterruptedError,
    IndexUnreachableError,
    TruncatedFileError,
)
from vllm_forge.sources.index import pins

HEAD = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: {kind}\r\n{more}\r\n"
JSON = "application/vnd.pypi.simple.v1+json"
MOST = 1 << 20  # bytes that an endless answer sends before the test fails


class Sender:
    """Answers every request with a head, then pieces until the client goes."""

    def __init__(self, head: str, piece: bytes, pause: float = 0.0) -> None:
        self.sent = 0
        self._head, self._piece, self._pause = head.encode(), piece, pause
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"

    def serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        with client:
            try:
                client.recv(1 << 16)
                client.sendall(self._head)
                while self._piece:
                    client.sendall(self._piece)
                    self.sent += len(self._piece)
                    time.sleep(self._pause)
            except OSError:
                pass

    @contextmanager
    def running(self) -> Iterator[Sender]:
        thread = threading.Thread(target=self.serve, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            thread.join()


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(index, "CONNECT_RETRIES", 0)


def get(sender: Sender, target: Path, size: int, *, exact: bool = True) -> None:
    url = f"{sender.url}x.whl"
    item = Download(url=url, sha256="0" * 64, size=size, target=target, exact=exact)
    download_all(Index(sender.url).session, [item])


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("more", ["", "Content-Length: 99999999999\r\n"])
def test_endless_file_ends_after_its_size(more: str, exact: bool, tmp_path: Path) -> None:
    sender = Sender(HEAD.format(kind="application/octet-stream", more=more), bytes(1 << 16))
    with sender.running(), pytest.raises(TruncatedFileError, match="longer than 869 bytes"):
        get(sender, tmp_path / "x.whl", 869, exact=exact)
    assert list(tmp_path.iterdir()) == []
    assert sender.sent < 8 * MOST  # what the kernel's buffers hold


@pytest.mark.parametrize("exact", [True, False])
def test_dripping_file_ends_at_a_time(
    exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PATIENCE_S", 0.3)
    monkeypatch.setattr(fetch, "SLOWEST", 1 << 20)
    sender = Sender(HEAD.format(kind="application/octet-stream", more=""), b"x", pause=0.05)
    start = time.monotonic()
    with sender.running(), pytest.raises(DownloadInterruptedError, match="bytes are kept"):
        get(sender, tmp_path / "x.whl", 1 << 16, exact=exact)
    assert time.monotonic() - start < 10


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.mark.parametrize(("head", "piece"), [("", CONTINUE), ("HTTP/1.1 200", b"x")])
def test_answer_without_a_body_ends_at_a_time(
    head: str, piece: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "HEADERS_S", 0.2)
    sender = Sender(head, piece, pause=0.02)
    with sender.running():
        with pytest.raises(IndexUnreachableError):
            get(sender, tmp_path / "x.whl", size=1000)
        with pytest.raises(IndexUnreachableError):
            Index(sender.url).files("tiny")


def test_redirect_to_no_address_is_an_error_of_the_network(tmp_path: Path) -> None:
    sender = Sender("HTTP/1.1 302 F\r\nLocation: http://[::\r\nContent-Length: 0\r\n\r\n", b"")
    with sender.running(), pytest.raises(IndexUnreachableError, match="Invalid IPv6"):
        get(sender, tmp_path / "x.whl", size=1000)


def test_endless_page_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "PAGE_BYTES", 1 << 16)
    sender = Sender(HEAD.format(kind=JSON, more=""), bytes(1 << 14))
    with sender.running(), pytest.raises(IndexUnreachableError, match="sends more than 65536"):
        Index(sender.url).files("x")


def test_dripping_page_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "PAGE_S", 0.3)
    sender = Sender(HEAD.format(kind=JSON, more=""), b" ", pause=0.05)
    with sender.running(), pytest.raises(IndexUnreachableError, match="does not answer: Timeout"):
        Index(sender.url).files("x")


@pytest.mark.parametrize("status", ["302 Found", "503 Busy", "429 Slow"])
def test_endless_answer_that_is_not_the_file_is_cut_off(
    status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A redirect is followed, and a busy server asked again, without its body."""
    monkeypatch.setattr(index, "CONNECT_RETRIES", 1)
    waits: list[float] = []
    clock = SimpleNamespace(sleep=waits.append, monotonic=time.monotonic)
    monkeypatch.setattr(index, "time", clock)
    head = f"HTTP/1.1 {status}\r\nLocation: /y.whl\r\nRetry-After: 86400\r\n\r\n"
    sender = Sender(head, bytes(1 << 16))
    with sender.running(), pytest.raises(IndexUnreachableError, match="cannot be fetched"):
        get(sender, tmp_path / "x.whl", 869)
    assert sender.sent < 64 * MOST  # of five tries, each with redirects or repetitions
    assert set(waits) <= {index.LONGEST_WAIT_S}


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"meta": {"api-version": "9.0"}}', b'{"files": 3}', b"[" * 100_000]
)
def test_page_that_is_not_one_is_refused(body: bytes) -> None:
    more = f"Content-Length: {len(body)}\r\n"
    sender = Sender(HEAD.format(kind=JSON, more=more), body)
    with sender.running(), pytest.raises(ForgeError) as refused:
        Index(sender.url).files("x")
    assert isinstance(refused.value, IndexUnreachableError)


def test_names_and_hashes_that_are_paths_are_not_taken() -> None:
    """They become parts of paths in the cache."""
    good = {"filename": "x-1.0+cu130-py3-none-any.whl", "hashes": {"sha256": "a" * 64}}
    names = ["x-1.0-py3-none-any./../../x.whl", "/etc/x.whl", "..", ".x.whl", "x\n.whl", "x y.whl"]
    bad = [good | {"filename": name} for name in names]
    odd = good | {"hashes": {"sha256": "../../../etc"}}
    files = [row | {"url": "x", "size": 1} for row in [*bad, odd, good]]
    page = {"meta": {"api-version": "1.1"}, "name": "x", "versions": [], "files": files}
    body = json.dumps(page).encode()
    sender = Sender(HEAD.format(kind=JSON, more=f"Content-Length: {len(body)}\r\n"), body)
    with sender.running():
        taken = Index(sender.url).files("x")
    assert {file.filename for file in taken} == {good["filename"]}
    with pytest.raises(DistributionNotFoundError, match="no sha256"):
        pins(taken[0])
    assert pins(taken[1]) == ("a" * 64, 1)


def test_index_without_tls_behind_one_with_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A redirect to http: who sits between could list other hashes when a lock is made."""
    sender = Sender(HEAD.format(kind=JSON, more="Content-Length: 2\r\n"), b"{}")
    with sender.running():
        made = Index("https://mirror.example/simple")
        plain = made.session
        real = plain.get
        monkeypatch.setattr(plain, "get", lambda _, **kwargs: real(sender.url, **kwargs))
        with pytest.raises(IndexUnreachableError, match="redirects to an address without TLS"):
            made.files("x")


def test_password_of_the_index_is_not_printed() -> None:
    with pytest.raises(IndexUnreachableError) as refused:
        Index("http://user:s3cret@127.0.0.1:9/simple").files("x")
    assert "s3cret" not in str(refused.value)
    assert "s3cret" not in str(refused.value.as_dict())
