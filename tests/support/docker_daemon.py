"""A docker daemon of a few fixed answers: HTTP on a unix socket."""

from __future__ import annotations

import json
import re
import socketserver
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

VERSION = {
    "Version": "28.5.2",
    "ApiVersion": "1.51",
    "MinAPIVersion": "1.24",
    "Components": [{"Name": "Engine", "Version": "28.5.2"}],
}
INFO = {
    "Driver": "overlayfs",
    "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]],
}


@contextmanager
def docker_daemon(socket: Path, answers: Mapping[str, Any]) -> Iterator[list[str]]:
    """Serve ``answers`` (path without the API version -> JSON, or text) on a unix socket.

    Yields:
        The paths that were asked for.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = re.sub(r"^/v[\d.]+", "", self.path)
            asked.append(path)
            known = path in answers
            answer = answers.get(path, {"message": f"no such image: {path}"})
            content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def address_string(self) -> str:
            return "unix"

        def log_message(self, *_: object) -> None:
            pass

    with socketserver.ThreadingUnixStreamServer(str(socket), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield asked
        finally:
            server.shutdown()
            thread.join()
