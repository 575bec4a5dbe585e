"""The image's health check: GET /health of the server that runs in this container.

Stands alone: it is /opt/vllm-forge/health.py in an image, run as ``python -I``. The server is found
by its command line, so the check follows ``--port``, ``--host``, ``--uds`` and TLS, also where
an init process is the first one. No proxy is asked: HTTP_PROXY, which docker may pass to every
container, is for requests that leave the host. Exits with 0 or, after a line that says why, 1.

The image has no bytecode, so each import is compiled every 30 s: ``socket`` takes 0.05 s of a core,
``http.client``, ``dataclasses`` and ``pathlib`` 0.2 s more.
"""

from __future__ import annotations

import os
import socket
import sys
from collections import namedtuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

PORT = 8000  # of `vllm serve` without --port
TIMEOUT_S = 4
OK = 200
LOOPBACK = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what to ask instead


# Where a server listens: a host that this container reaches it by, a TCP port, the path of a Unix
# socket or an empty one, and whether it speaks HTTPS.
Server = namedtuple("Server", "host port uds tls", defaults=("127.0.0.1", PORT, "", False))


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
    names = [os.path.basename(word) for word in command[:3]]  # noqa: PTH119
    if "vllm" not in names or "serve" not in command[names.index("vllm") + 1 :][:1]:
        return None
    host = option(command, "host")
    return Server(
        host=LOOPBACK.get(host, host),
        port=int(option(command, "port") or PORT),
        uds=option(command, "uds"),
        tls=bool(option(command, "ssl-keyfile") or option(command, "ssl-certfile")),
    )


def find(processes: str | os.PathLike[str] = "/proc") -> Server | None:
    """The server of the process with the lowest number; the others are its workers."""
    for number in sorted(int(name) for name in os.listdir(processes) if name.isdecimal()):  # noqa: PTH208
        try:
            with open(os.path.join(processes, str(number), "cmdline"), "rb") as file:  # noqa: PTH118, PTH123
                command = file.read()
        except OSError:  # it ended meanwhile, or is another user's
            continue
        if server := parse(command.decode(errors="replace").split("\0")[:-1]):
            return server
    return None


def ask(server: Server) -> int:
    """Status of GET /health.

    Raises:
        OSError, ValueError: the server does not answer, or not by HTTP.
    """
    if server.uds:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(TIMEOUT_S)
        connection.connect(server.uds)
    else:
        connection = socket.create_connection((server.host, server.port), TIMEOUT_S)
    if server.tls:
        import ssl  # noqa: PLC0415 - see above

        # Its certificate is for the name that clients use, and it is this container's own server.
        connection = ssl._create_unverified_context().wrap_socket(connection)  # noqa: S323
    with connection, connection.makefile("rb") as answer:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        line = answer.readline(1000)
    version, _, rest = line.partition(b" ")
    if not version.startswith(b"HTTP/1."):
        raise ValueError(f"expected an HTTP status line, got {line[:80]!r}")
    return int(rest[:3])


def main() -> int:
    """Report the health of this container's server."""
    try:
        server = find()
        if server is None:
            print("unhealthy: no `vllm serve` runs in this container")
            return 1
        status = ask(server)
    except (OSError, ValueError) as error:
        print(f"unhealthy: {type(error).__name__}: {error}")
        return 1
    print(f"GET /health: {status}")
    return 0 if status == OK else 1


if __name__ == "__main__":
    sys.exit(main())
