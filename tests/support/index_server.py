"""A package index on 127.0.0.1 whose files can be made to fail in chosen ways."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import (
    BaseHTTPRequestHandler,
    SimpleHTTPRequestHandler,
    ThreadingHTTPServer,
)
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

JSON_TYPE = "application/vnd.pypi.simple.v1+json"
PIECE = 1 << 16
PATIENCE_S = 30  # a test that is waited for longer has failed


@dataclass(kw_only=True)
class Served:
    """A file and how it is served.

    Attributes:
        content: the bytes that come.
        listed_sha256: what the index says of it; of ``content`` unless given.
        listed_size: the same.
        ranges: answer a Range header with 206.
        status: of every answer.
        cuts: for one request each: close the connection after so many bytes of the body.
        cut_always: close every connection after so many bytes.
        hang_ups: so many requests are closed before an answer.
        stall_at: at this byte, wait for ``gate``.
        url: listed instead of this server's.
    """

    content: bytes
    listed_sha256: str = ""
    listed_size: int = -1
    ranges: bool = True
    status: int = 200
    cuts: list[int] = field(default_factory=list)
    cut_always: int | None = None
    hang_ups: int = 0
    stall_at: int | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    stalled: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    @property
    def sha256(self) -> str:
        return self.listed_sha256 or hashlib.sha256(self.content).hexdigest()

    @property
    def size(self) -> int:
        return self.listed_size if self.listed_size >= 0 else len(self.content)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request as it came, and how many bytes of body it got."""

    path: str
    range_start: int | None
    status: int
    sent: int


class IndexServer:
    """Projects, their files, and a log of what was asked."""

    def __init__(self) -> None:
        self.projects: dict[str, dict[str, Served]] = {}
        self.requests: list[Request] = []
        self.login = ""  # USER:PASSWORD that every request must have
        self.lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.index = self
        self.base = f"http://127.0.0.1:{self._http.server_address[1]}"
        self.url = f"{self.base}/simple/"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    def add(self, project: str, filename: str, served: Served) -> Served:
        self.projects.setdefault(project, {})[filename] = served
        return served

    def file_url(self, filename: str) -> str:
        return f"{self.base}/files/{filename}"

    def asked(self, filename: str) -> list[Request]:
        """The requests for one file, in order."""
        with self.lock:
            return [item for item in self.requests if item.path == f"/files/{filename}"]

    def find(self, filename: str) -> Served | None:
        for files in self.projects.values():
            if filename in files:
                return files[filename]
        return None

    def start(self) -> IndexServer:
        """Serve until `close`."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop serving."""
        for files in self.projects.values():
            for served in files.values():
                served.gate.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @contextmanager
    def running(self) -> Iterator[IndexServer]:
        self.start()
        try:
            yield self
        finally:
            self.close()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    index: IndexServer

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what many tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE_S

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing; tests read ``requests``."""

    def do_GET(self) -> None:
        index = cast("_Http", self.server).index
        kind, _, rest = self.path.strip("/").partition("/")
        login = base64.b64encode(index.login.encode()).decode()
        if login and self.headers.get("Authorization") != f"Basic {login}":
            self._log(index, None, 401, 0)
            self._send(401, b"who are you", {})
        elif kind == "simple" and rest in index.projects:
            self._page(index, rest)
        elif kind == "files" and (served := index.find(rest)) is not None:
            self._file(index, served)
        else:
            self._log(index, None, 404, 0)
            self._send(404, b"nothing here", {})

    def do_HEAD(self) -> None:
        """Size of a file; uv asks for it, and for the whole file where ranges are not offered."""
        kind, _, name = self.path.strip("/").partition("/")
        served = cast("_Http", self.server).index.find(name) if kind == "files" else None
        self.send_response(404 if served is None else served.status)
        self.send_header("Content-Length", str(len(served.content) if served else 0))
        self.end_headers()

    def _page(self, index: IndexServer, project: str) -> None:
        files = [
            {
                "filename": name,
                "url": served.url or index.file_url(name),
                "hashes": {"sha256": served.sha256},
                "size": served.size,
            }
            for name, served in index.projects[project].items()
        ]
        page = {
            "meta": {"api-version": "1.1"},
            "name": project,
            "versions": [],
            "files": files,
        }
        self._log(index, None, 200, 0)
        self._send(200, json.dumps(page).encode(), {"Content-Type": JSON_TYPE})

    def _file(self, index: IndexServer, served: Served) -> None:
        start: int | None = None
        if header := self.headers.get("Range"):
            start = int(header.removeprefix("bytes=").removesuffix("-"))
        if served.hang_ups:
            served.hang_ups -= 1
            self._log(index, start, 0, 0)
            self.close_connection = True
            return
        if served.status != 200:
            self._log(index, start, served.status, 0)
            self._send(served.status, b"no", {})
            return
        status, body = 200, served.content
        headers = {"Content-Length": str(len(body))}
        if start is not None and served.ranges:
            if start >= len(body):
                self._log(index, start, 416, 0)
                self._send(416, b"", {})
                return
            status, body = 206, body[start:]
            size = len(served.content)
            headers = {
                "Content-Length": str(len(body)),
                "Content-Range": f"bytes {start}-{size - 1}/{size}",
            }
        if served.cuts:
            body, self.close_connection = body[: served.cuts.pop(0)], True
        elif served.cut_always is not None:
            body, self.close_connection = body[: served.cut_always], True
        offset = len(served.content) - int(headers["Content-Length"])
        stop = served.stall_at - offset if served.stall_at is not None else len(body)
        # Logged before the last byte goes out: who has the file finds the request in the log.
        self._log(index, start, status, len(body))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self._write(body[: max(stop, 0)])
        if stop < len(body):
            served.stalled.set()
            served.gate.wait(PATIENCE_S)
            self._write(body[max(stop, 0) :])

    def _write(self, body: bytes) -> None:
        for at in range(0, len(body), PIECE):
            self.wfile.write(body[at : at + PIECE])

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _log(self, index: IndexServer, start: int | None, status: int, sent: int) -> None:
        with index.lock:
            index.requests.append(
                Request(path=self.path, range_start=start, status=status, sent=sent)
            )


@contextmanager
def refusing_port() -> Iterator[int]:
    """A port that refuses connections for as long as the block runs: bound, not listening."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@contextmanager
def serve_folder(folder: Path) -> Iterator[str]:
    """Serve the files of a folder on 127.0.0.1; yields its URL."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            del format, args

    handler = functools.partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
