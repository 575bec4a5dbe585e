"""The image's health check: GET /health of the server that runs in this container.

Stands alone: it is /opt/vllm-forge/health.py in an image, run as ``python -I``. The server is found
by its command line, so the check follows ``--port``, ``--host``, ``--uds`` and TLS, also where
an init process is the first one. No proxy is asked: HTTP_PROXY, which docker may pass to every
container, is for requests that leave the host. Exits with 0 or, after a line that says why, 1.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

PORT = 8000  # of `vllm serve` without --port
TIMEOUT_S = 4
LOOPBACK = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what to ask instead


@dataclass(frozen=True)
class Server:
    """Where a server listens.

    Attributes:
        host: a name or an address that this container reaches it by.
        port: of TCP.
        uds: path of a Unix socket; empty for TCP.
        tls: whether it speaks HTTPS.
    """

    host: str = "127.0.0.1"
    port: int = PORT
    uds: str = ""
    tls: bool = False


def option(arguments: Sequence[str], name: str) -> str:
    """Value of the last ``--name VALUE`` or ``--name=VALUE``; empty without one."""
    value = ""
    for number, word in enumerate(arguments):
        if word.startswith(f"--{name}="):
            value = word.partition("=")[2]
        elif word == f"--{name}" and number + 1 < len(arguments):
            value = arguments[number + 1]
    return value


def parse(command: Sequence[str]) -> Server | None:
    """The server that a command line starts; None if it is not ``vllm serve``."""
    names = [Path(word).name for word in command[:3]]
    if "vllm" not in names or "serve" not in command[names.index("vllm") + 1 :][:1]:
        return None
    host = option(command, "host")
    return Server(
        host=LOOPBACK.get(host, host),
        port=int(option(command, "port") or PORT),
        uds=option(command, "uds"),
        tls=bool(option(command, "ssl-keyfile") or option(command, "ssl-certfile")),
    )


def find(processes: Path = Path("/proc")) -> Server | None:
    """The server of the process with the lowest number; the others are its workers."""
    numbers = sorted(int(path.name) for path in processes.iterdir() if path.name.isdecimal())
    for number in numbers:
        try:
            command = (processes / str(number) / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile, or is another user's
            continue
        if server := parse(command.decode(errors="replace").split("\0")[:-1]):
            return server
    return None


def ask(server: Server) -> int:
    """Status of GET /health.

    Raises:
        OSError, http.client.HTTPException: the server does not answer.
    """
    if server.uds:
        connection = http.client.HTTPConnection("localhost", timeout=TIMEOUT_S)
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(TIMEOUT_S)
        connection.sock.connect(server.uds)
    elif server.tls:
        # Its certificate is for the name that clients use, and it is this container's own server.
        context = ssl._create_unverified_context()  # noqa: S323
        connection = http.client.HTTPSConnection(
            server.host, server.port, timeout=TIMEOUT_S, context=context
        )
    else:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=TIMEOUT_S)
    connection.request("GET", "/health")
    return connection.getresponse().status


def main() -> int:
    """Report the health of this container's server."""
    try:
        server = find()
        if server is None:
            print("unhealthy: no `vllm serve` runs in this container")
            return 1
        status = ask(server)
    except (OSError, ValueError, http.client.HTTPException) as error:
        print(f"unhealthy: {type(error).__name__}: {error}")
        return 1
    print(f"GET /health: {status}")
    return 0 if status == http.client.OK else 1


if __name__ == "__main__":
    sys.exit(main())
