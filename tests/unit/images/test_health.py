"""The health check asks the server that runs, where it listens, and no proxy."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vllm_forge.images import health
from vllm_forge.images.health import Server, ask, find, parse

if TYPE_CHECKING:
    from collections.abc import Iterator

VLLM = ["/opt/venv/bin/python", "/opt/venv/bin/vllm", "serve", "model"]


class Handler(BaseHTTPRequestHandler):
    """Answers as the server's class says."""

    def do_GET(self) -> None:
        self.send_response(self.server.status if self.path == "/health" else 404)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class UnixServer(HTTPServer):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        self.socket.bind(str(self.server_address))


def serve(server: HTTPServer, status: int = 200) -> HTTPServer:
    server.status = status  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    running = serve(HTTPServer(("127.0.0.1", 0), Handler))
    yield running
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], Server()),
        (["--port", "9000"], Server(port=9000)),
        (["--port=1", "--port=9000"], Server(port=9000)),
        (["--host", "0.0.0.0", "--port=9000"], Server(port=9000)),  # noqa: S104
        (["--host=::"], Server(host="::1")),
        (["--host=10.0.0.7"], Server(host="10.0.0.7")),
        (["--uds=/cache/vllm.sock"], Server(uds="/cache/vllm.sock")),
        (["--ssl-keyfile=k", "--ssl-certfile=c"], Server(tls=True)),
    ],
)
def test_server_is_read_from_its_command_line(arguments: list[str], expected: Server) -> None:
    assert parse([*VLLM, *arguments]) == expected


@pytest.mark.parametrize(
    "command", [[], ["sleep", "1"], ["vllm", "bench", "serve"], ["/sbin/tini", "--"], ["vllm"]]
)
def test_other_commands_are_not_servers(command: list[str]) -> None:
    assert parse(command) is None


def test_server_is_found_behind_an_init_process(tmp_path: Path) -> None:
    for number, command in {1: ["tini", "--"], 7: [*VLLM, "--port=9"], 12: ["x", "serve"]}.items():
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "cmdline").write_bytes("\0".join([*command, ""]).encode())
    (tmp_path / "30").mkdir()  # ended while it was read
    (tmp_path / "meminfo").touch()
    assert find(tmp_path) == Server(port=9)
    (tmp_path / "7" / "cmdline").unlink()
    assert find(tmp_path) is None


def test_proxies_are_not_asked(server: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert ask(Server(port=server.server_port)) == 200


def test_unix_socket_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "s"
    running = serve(UnixServer(str(path), Handler))  # type: ignore[arg-type]
    assert ask(Server(uds=str(path))) == 200
    running.shutdown()
    running.server_close()


def test_certificate_of_another_name_is_accepted(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=other",
         "-keyout", key, "-out", certificate], check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    running = serve(server)
    assert ask(Server(port=running.server_port, tls=True)) == 200
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize(
    ("status", "server", "word"),
    [(200, True, "200"), (503, True, "503"), (200, False, "no `vllm serve`")],
)
def test_exit_code_and_reason(
    status: int,
    server: bool,
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    running = serve(HTTPServer(("127.0.0.1", 0), Handler), status)
    address = Server(port=running.server_port) if server else None
    monkeypatch.setattr(health, "find", lambda: address)
    assert health.main() == (0 if server and status == 200 else 1)
    assert word in capsys.readouterr().out
    running.shutdown()
    running.server_close()


def test_closed_port_is_unhealthy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setattr(health, "find", lambda: Server(port=port))
        assert health.main() == 1
    assert "ConnectionRefusedError" in capsys.readouterr().out


def test_it_stands_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", health.__file__], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert Path(health.__file__).read_text().count("vllm_forge") == 0
