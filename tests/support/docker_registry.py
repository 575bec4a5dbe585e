"""Debian's docker-registry as a process: no referrers API, ignores If-Match."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.certificates import Certificates

START_S = 30
# Of tests.support.registry_client.LOGIN, by bcrypt with 2^5 rounds.
HTPASSWD = "robot:$2y$05$abcdefghijklmnopqrstuuLK7U1u6pVRmL7L1BBM2aS35PSZnDXlK\n"


@dataclass(frozen=True)
class DockerRegistry:
    """``host`` with its port; the folder with its ``config.yml``, ``data`` and ``log``."""

    host: str
    folder: Path

    def collect_garbage(self) -> None:
        """Delete what no tag names."""
        config = str(self.folder / "config.yml")
        command = ["docker-registry", "garbage-collect", "--delete-untagged", config]
        subprocess.run(command, check=True, capture_output=True, env=_environment())


@contextmanager
def docker_registry(
    folder: Path, *, tls: Certificates | None = None, login: bool = False
) -> Iterator[DockerRegistry]:
    """Run one until the block ends; ``login``: only for LOGIN of tests.support.registry_client."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "htpasswd").write_text(HTPASSWD)
    auth = f"auth: {{htpasswd: {{realm: test, path: {folder}/htpasswd}}}}\n" if login else ""
    certificate = f", tls: {{certificate: {tls.server}, key: {tls.key}}}" if tls else ""
    (folder / "config.yml").write_text(
        "version: 0.1\nlog: {level: error}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder}/data}}}}\n"
        f'http: {{addr: "127.0.0.1:{port}", secret: test{certificate}}}\n{auth}'
    )
    command = ["docker-registry", "serve", str(folder / "config.yml")]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=_environment())
    try:
        _await(port, server, folder / "log")
        yield DockerRegistry(f"127.0.0.1:{port}", folder)
    finally:
        server.terminate()
        server.wait()


def _environment() -> dict[str, str]:
    """Without REGISTRY_X_Y, which sets its option x.y; skopeo has a REGISTRY_AUTH_FILE."""
    return {key: value for key, value in os.environ.items() if not key.startswith("REGISTRY_")}


def _await(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, f"docker-registry ended: {log.read_text()}"
        assert time.monotonic() < deadline, "docker-registry does not listen"
