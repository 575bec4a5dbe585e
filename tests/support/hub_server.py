"""A model hub on 127.0.0.1: one repository, its file list and byte ranges of its files."""

from __future__ import annotations

import json
import re
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMIT = "c" * 40
CHUNK = 1 << 20
RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass(kw_only=True)
class HubServer:
    """The repository ``owner/name`` at ``COMMIT``.

    Attributes:
        files: name -> content.
        ranges: answer a Range header with 206; otherwise the whole file comes.
        gated: refuse everybody.
        failures: statuses of the next answers to requests for a file; 0 closes the connection.
        short: bytes left out at the end of every answer to a range.
        description: what it says of the repository, where not its file list.
        served: bytes of file content sent.
        requests: how many requests for a file came.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    gated: bool = False
    failures: list[int] = field(default_factory=list)
    short: int = 0
    description: bytes = b""
    served: int = 0
    requests: int = 0
    url: str = ""

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        """Serve until the block ends."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        del format, args

    def do_GET(self) -> None:
        hub = cast("HubServer", self.server.hub)  # type: ignore[attr-defined]
        path = self.path.partition("?")[0]
        resolve = f"/owner/name/resolve/{COMMIT}/"
        if hub.gated:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/owner/name"):
            siblings = [{"rfilename": n, "size": len(data)} for n, data in hub.files.items()]
            body = {"id": "owner/name", "sha": COMMIT, "siblings": siblings}
            self._send(200, hub.description or json.dumps(body).encode())
        elif path.startswith(resolve) and (name := path.removeprefix(resolve)) in hub.files:
            self._file(hub, hub.files[name])
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _file(self, hub: HubServer, data: bytes) -> None:
        hub.requests += 1
        if hub.failures:
            if status := hub.failures.pop(0):
                self._send(status, b"")
            return
        asked = RANGE.fullmatch(self.headers.get("Range", ""))
        if asked is None or not hub.ranges:
            self._send(200, data, hub=hub)
            return
        part = data[int(asked[1]) : int(asked[2]) + 1]
        part = part[: len(part) - hub.short]
        self._send(206, part, hub=hub)

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        hub: HubServer | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(ConnectionError):  # the client has heard enough
            for at in range(0, len(body), CHUNK):
                self.wfile.write(body[at : at + CHUNK])
                if hub is not None:
                    hub.served += len(body[at : at + CHUNK])
