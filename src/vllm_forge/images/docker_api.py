"""Questions to the docker daemon, by docker's SDK for Python.

Asked is what only reads: whether it answers, its version, its image store, an image. The address is
the client's own: DOCKER_HOST, DOCKER_CONTEXT, ``docker context use``, else the default socket.

What changes something stays a command of the client (``docker buildx build``, ``load``, ``run``),
since a dry run prints exactly the commands of the real run. A foreground ``docker run`` also
gives logs, exit code and removal in one call, so the SDK's wait and logs would add a second way.
Podman is asked through its client too: it has no daemon, and its socket is off by default. Where
DOCKER_HOST is that socket, an image is found through it; builds need buildx and are refused.
"""

from __future__ import annotations

import os
import re
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm_forge.images.errors import EngineSetupError, EngineTooOldError, EngineUnreachableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from docker import DockerClient

# The first that loads an OCI layout.
OLDEST_DOCKER = (25, 0)
OLDEST_BUILDX = (0, 12)  # the first that knows rewrite-timestamp
TIMEOUT_S = 30
SNAPSHOTTER = "io.containerd.snapshotter"


def require_version(text: str, oldest: tuple[int, int], engine: str) -> None:
    """EngineTooOldError if an engine is older than the Dockerfile is tested with, or unknown."""
    version = re.search(r"(\d+)\.(\d+)", text)
    if version is None or (int(version[1]), int(version[2])) < oldest:
        raise EngineTooOldError(
            f"{engine} is {text.strip() or 'of unknown version'}, at least "
            f"{oldest[0]}.{oldest[1]} is needed",
            remedy="upgrade it, or choose the other engine with --engine",
        )


def check_daemon() -> None:
    """Require a daemon that buildx can build with and that loads OCI layouts.

    Raises EngineUnreachableError, EngineTooOldError, or, for podman and the classic image store,
    EngineSetupError.
    """
    with _client() as client:
        version, info = client.version(), client.info()
    names = [component.get("Name", "") for component in version.get("Components") or ()]
    if any("Podman" in name for name in names):
        what = "the docker engine needs docker; podman answers at its address"
        remedy = "unset DOCKER_HOST or choose another docker context, or choose --engine buildah"
        raise EngineSetupError(what, where=_address(), remedy=remedy)
    require_version(str(version.get("Version", "")), OLDEST_DOCKER, "docker")
    status = dict(row[:2] for row in info.get("DriverStatus") or ())
    if SNAPSHOTTER not in str(status.get("driver-type", "")):
        raise EngineSetupError(
            "docker uses its classic image store; buildx cannot export an OCI layout from it",
            where=f"{_address()}, storage driver {info.get('Driver', 'unknown')}",
            remedy='set {"features": {"containerd-snapshotter": true}} in daemon.json and '
            "restart docker, or choose --engine buildah",
        )


def answers() -> bool:
    """Whether a docker daemon answers, of whatever version."""
    try:
        with _client() as client:
            return bool(client.ping())
    except (EngineUnreachableError, EngineTooOldError):
        return False


def inspect_image(name: str) -> dict[str, Any] | None:
    """What the daemon says of an image (``GET /images/NAME/json``); None if it has none."""
    from docker.errors import ImageNotFound  # noqa: PLC0415

    with _client() as client:
        try:
            image: dict[str, Any] = client.images.get(name).attrs
        except ImageNotFound:
            return None
    return image


@contextmanager
def _client() -> Iterator[DockerClient]:
    """A connection; all failures of the SDK become errors with a remedy."""
    import docker  # noqa: PLC0415 - 0.2 s that most commands do without
    import requests  # noqa: PLC0415

    address = _address()
    _require_socket(address)
    try:
        client = docker.from_env(timeout=TIMEOUT_S, use_ssh_client=True)
        try:
            yield client
        finally:
            client.close()
    except docker.errors.InvalidVersion as error:
        what = f"the docker daemon is too old: {error}"
        remedy = f"upgrade docker to {OLDEST_DOCKER[0]} or newer, or choose --engine buildah"
        raise EngineTooOldError(what, where=address, remedy=remedy) from error
    except (docker.errors.DockerException, requests.RequestException) as error:
        what = f"the docker daemon does not answer: {error}"
        remedy = "see `docker version` and the daemon's log, or choose --engine buildah"
        raise EngineUnreachableError(what, where=address, remedy=remedy) from error


def _address() -> str:
    from docker.context import ContextAPI  # noqa: PLC0415

    host = os.environ.get("DOCKER_HOST")
    return host or str(ContextAPI.kwargs_from_context().get("base_url", ""))


def _require_socket(address: str) -> None:
    """Connect to a unix socket once: the SDK buries the reason, and leaves its socket open."""
    if not address.startswith("unix://"):
        return
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(TIMEOUT_S)
            probe.connect(address.removeprefix("unix://"))
    except PermissionError as error:
        what = "permission denied on the docker socket"
        remedy = "run as root or as a member of the group docker, or choose --engine buildah"
        raise EngineUnreachableError(what, where=address, remedy=remedy) from error
    except OSError as error:
        raise EngineUnreachableError(
            f"the docker daemon is not running: {error.strerror or error}",
            where=address,
            remedy="start it (systemctl start docker), correct DOCKER_HOST or the docker context, "
            "or choose --engine buildah",
        ) from error
