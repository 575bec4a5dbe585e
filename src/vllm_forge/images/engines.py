"""Which engine builds: the one asked for, else an installed one; and how to install one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm_forge.errors import UsageError
from vllm_forge.host import suggestion, which
from vllm_forge.host.errors import CommandFailedError
from vllm_forge.images.buildah import Buildah
from vllm_forge.images.buildx import Buildx
from vllm_forge.images.errors import EngineMissingError, ProvisionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_forge.host import Runner
    from vllm_forge.images.engine import Engine

PACKAGES = ("buildah", "runc", "skopeo", "mmdebstrap")
REGISTRY = "docker-registry"
INSTALL = f"apt-get install --no-install-recommends {' '.join(PACKAGES)}"
ENGINES: dict[str, Callable[[], Engine]] = {"docker": Buildx, "buildah": Buildah}


def choose_engine(name: str | None, *, dry_run: bool = False) -> Engine:
    """An engine whose tools are installed.

    Args:
        name: docker or buildah, or None for the first that is installed.
        dry_run: nothing need be installed.

    Raises:
        UsageError: unknown engine.
        EngineMissingError: with the line that installs one.
    """
    if name is not None and name not in ENGINES:
        raise UsageError(f"unknown engine {name!r}{suggestion(name, ENGINES)}")
    if name is None:
        name = next((name for name, make in ENGINES.items() if make().present()), None)
        if name is None and not dry_run:
            raise EngineMissingError(
                "no container engine is installed: neither docker with buildx and a daemon, nor "
                "buildah",
                remedy=f"run: {INSTALL}   or build with --provision, which does that",
            )
    engine = ENGINES[name or Buildah.name]()
    missing = [] if dry_run else [tool for tool in engine.tools if which(tool) is None]
    if missing:
        raise EngineMissingError(
            f"{missing[0]} is not installed; the {engine.name} engine needs it",
            remedy=f"run: {INSTALL}   or build with --provision",
        )
    return engine


def provision(runner: Runner, *, registry: bool = False) -> None:
    """apt-get install what is missing of buildah, runc, skopeo and mmdebstrap.

    Args:
        runner: runs, or records.
        registry: also a local registry, which the tests push to.

    Raises:
        ProvisionError: not root, not a Debian-like host, or apt failed.
    """
    tools = [*PACKAGES, *([REGISTRY] if registry else [])]
    missing = [tool for tool in tools if which(tool) is None]
    if not missing:
        return
    if which("apt-get") is None or os.geteuid() != 0:
        raise ProvisionError(
            f"missing: {', '.join(missing)}; --provision needs root and apt-get",
            remedy=f"on Debian or Ubuntu, as root: {INSTALL}",
        )
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "-qq", "install", "--yes", "--no-install-recommends", *missing]
    try:
        runner.run(["apt-get", "-qq", "update"], env=env)
        runner.run(install, env=env)
    except CommandFailedError as error:
        raise ProvisionError(
            f"apt-get could not install {', '.join(missing)}:\n{error.what}",
            where=error.where,
            remedy="check the host's apt sources",
        ) from error
