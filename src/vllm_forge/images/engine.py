"""Container engines behind one protocol: what the build asks of them, and nothing more."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vllm_forge.host import which
from vllm_forge.images.errors import EngineMissingError, EngineTooOldError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_forge.host import Runner
    from vllm_forge.images.base import BaseRef
    from vllm_forge.images.layout import Image

PACKAGES = ("buildah", "runc", "skopeo", "mmdebstrap")
# Where Python keeps what it compiles.
BYTECODE = "PYTHONPYCACHEPREFIX"
INSTALL = f"apt-get install --no-install-recommends {' '.join(PACKAGES)}"


@dataclass(frozen=True, kw_only=True)
class SystemBuild:
    """One build of docker/Dockerfile.

    Attributes:
        base: what FROM names.
        dockerfile: its path; its folder is the context.
        args: build arguments.
        secrets: id -> file on the host.
        epoch: SOURCE_DATE_EPOCH, Unix seconds.
        work: folder for the engine's output.
    """

    base: BaseRef
    dockerfile: Path
    args: dict[str, str]
    secrets: dict[str, Path] = field(default_factory=dict)
    epoch: int
    work: Path


@dataclass(frozen=True, kw_only=True)
class SystemOutput:
    """What an engine built: plain tars, lowest first, and the config of the image.

    ``root`` is the image's file system in a folder, None for engines that run images
    themselves.
    """

    tars: tuple[Path, ...]
    diff_ids: tuple[str, ...]
    config: dict[str, Any]
    root: Path | None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A command to run in the finished image, for the checks.

    Always without network, with a read-only root, no capabilities, as the image's user.

    Attributes:
        image: the layout.
        name: what its index calls it.
        lowers: unpacked layers, highest first, for engines that mount.
        inputs: folder that is mounted at /mnt.
        argv: the command.
        work: folder for the engine's own files; no two trials at a time share one.
        bytecode: folder that keeps compiled Python between trials, for engines that mount;
            None: the one of the cache that all images share.
    """

    image: Image
    name: str
    lowers: tuple[Path, ...]
    inputs: Path
    argv: tuple[str, ...]
    work: Path
    bytecode: Path | None = None


class Engine(Protocol):
    """docker buildx or buildah."""

    name: str
    tools: tuple[str, ...]

    def check(self, runner: Runner) -> None:
        """Raise when the engine is older than what is tested, or does not answer."""
        ...

    def build_system(self, runner: Runner, build: SystemBuild) -> None:
        """Build the Dockerfile into ``build.work``."""
        ...

    def system_output(self, build: SystemBuild) -> SystemOutput:
        """Read what ``build_system`` left."""
        ...

    def try_image(self, runner: Runner, trial: Trial) -> str:
        """Run a command in the image and return its stdout."""
        ...

    def load(self, runner: Runner, layout: Path, name: str) -> None:
        """Put the image into the engine's own store, under the ``name`` in its index."""
        ...


def require(tool: str, engine: str) -> None:
    """Raise when a tool of the engine is not installed.

    Raises:
        EngineMissingError: with the line that installs it.
    """
    if which(tool) is None:
        raise EngineMissingError(
            f"{tool} is not installed, which the {engine} engine needs",
            remedy=f"run: {INSTALL}   or build with --provision",
        )


def require_version(text: str, oldest: tuple[int, int], engine: str) -> None:
    """Raise when an engine is older than the Dockerfile is tested with.

    Raises:
        EngineTooOldError: also when its version cannot be read.
    """
    found = re.search(r"(\d+)\.(\d+)", text)
    if found is None or (int(found[1]), int(found[2])) < oldest:
        raise EngineTooOldError(
            f"{engine} is {text.strip() or 'of unknown version'}, at least "
            f"{oldest[0]}.{oldest[1]} is needed",
            remedy="upgrade it, or choose the other engine with --engine",
        )


def tagged(arguments: Sequence[tuple[str, str]], option: str) -> list[str]:
    """``option=key=value`` for each pair."""
    return [f"{option}={key}={value}" for key, value in arguments]
