"""Stored logins, as ``skopeo login`` and ``docker login`` leave them.

The files are those that skopeo reads, in its order, so that both use the same login
(containers-auth.json(5); docs.docker.com/reference/cli/docker/login).
"""

import base64
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_forge.host import parse_json, read_data, which
from vllm_forge.release.errors import RegistryAuthError

DOCKER_HUB = "https://index.docker.io/v1/"  # what docker calls docker.io in its files
HELPER = re.compile(r"[A-Za-z0-9._-]+")
HELPER_S = 60
NOT_STORED = "credentials not found"  # how helpers begin their answer for an unknown server
TOKEN_USER = "<token>"  # noqa: S105 - in a helper's answer: the secret is an identity token
LOGIN = "run: skopeo login HOST   or: docker login HOST"


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """A login; without a ``user``, the secret is an identity token (OAuth2's refresh token)."""

    user: str
    secret: str = field(repr=False)

    @property
    def basic(self) -> str:
        """The value of a header ``Authorization``."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.secret}".encode()).decode()


def stored_credentials(registry: str, repository: str) -> Credentials | None:
    """The login for a repository, of the first file that has one."""
    for path in filter(Path.exists, _files()):
        found = read_data(
            path.resolve(),  # Kubernetes mounts such files as links
            lambda config: _login(config, registry, repository),
            RegistryAuthError,
            what="file of registry logins",
            remedy=f"repair or delete it, then {LOGIN}",
        )
        if found is not None:
            return found
    return None


def _files() -> Iterator[Path]:
    if chosen := os.environ.get("REGISTRY_AUTH_FILE"):
        yield Path(chosen)
        return
    if chosen := os.environ.get("DOCKER_CONFIG"):
        yield Path(chosen) / "config.json"
        return
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/containers/{os.getuid()}"
    yield Path(runtime) / "containers" / "auth.json"
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    yield Path(config) / "containers" / "auth.json"
    yield Path.home() / ".docker" / "config.json"


def _login(config: dict[str, Any], registry: str, repository: str) -> Credentials | None:
    parts = [registry, *repository.split("/")]
    names = ["/".join(parts[:end]) for end in range(len(parts), 0, -1)]  # the longest wins
    server = DOCKER_HUB if registry == "docker.io" else registry
    for name in [*names, f"https://{registry}", server]:
        if helper := config.get("credHelpers", {}).get(name):
            return _ask(helper, server)
        row = config.get("auths", {}).get(name, {})
        if token := row.get("identitytoken"):
            return Credentials(user="", secret=token)
        if packed := row.get("auth"):
            user, _, secret = base64.b64decode(packed, validate=True).decode().partition(":")
            return Credentials(user=user, secret=secret.strip("\0"))
    if helper := config.get("credsStore"):
        return _ask(helper, server)
    return None


def _ask(helper: str, server: str) -> Credentials | None:
    """Ask a credential helper; None where it knows no login for the server."""
    program = which(f"docker-credential-{helper}") if HELPER.fullmatch(helper) else None
    if program is None:
        raise ValueError(f"credential helper docker-credential-{helper} not found")
    try:
        done = subprocess.run(
            [program, "get"], input=server, capture_output=True, text=True, check=False,
            timeout=HELPER_S, start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ValueError(f"{program} does not answer within {HELPER_S} s") from None
    if done.returncode != 0:
        if done.stdout.startswith(NOT_STORED):
            return None
        raise ValueError(f"{program} exited with {done.returncode}: {done.stdout[:200].strip()}")
    answer = parse_json(done.stdout)
    user = answer["Username"]
    return Credentials(user="" if user == TOKEN_USER else user, secret=answer["Secret"])
