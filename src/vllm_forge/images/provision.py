"""Install the build tools from Debian, for --provision."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm_forge.host import which
from vllm_forge.host.errors import CommandFailedError
from vllm_forge.images.engine import INSTALL, PACKAGES
from vllm_forge.images.errors import ProvisionError

if TYPE_CHECKING:
    from vllm_forge.host import Runner


REGISTRY = "docker-registry"


def provision(runner: Runner, *, registry: bool = False) -> None:
    """apt-get install what is missing of buildah, runc, skopeo and mmdebstrap.

    Args:
        runner: runs, or records.
        registry: also a local registry, which the tests push to.

    Raises:
        ProvisionError: not root, not a Debian-like host, or apt failed.
    """
    wanted = [*PACKAGES, *([REGISTRY] if registry else [])]
    missing = [tool for tool in wanted if which(tool) is None]
    if not missing:
        return
    if which("apt-get") is None or os.geteuid() != 0:
        raise ProvisionError(
            f"missing: {', '.join(missing)}; --provision needs root and apt-get",
            remedy=f"on Debian or Ubuntu, as root: {INSTALL}",
        )
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        runner.run(["apt-get", "-qq", "update"], env=env)
        runner.run(
            ["apt-get", "-qq", "install", "--yes", "--no-install-recommends", *missing], env=env
        )
    except CommandFailedError as error:
        raise ProvisionError(
            f"apt-get could not install {', '.join(missing)}:\n{error.what}",
            where=error.where,
            remedy="check the host's apt sources",
        ) from error
