"""Container engines behind one protocol: what the build asks of them, and nothing more."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vllm_forge.images.errors import EngineTooOldError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vllm_forge.host import Runner
    from vllm_forge.images.base import BaseRef

# Where Python keeps what it compiles.
BYTECODE = "PYTHONPYCACHEPREFIX"


@dataclass(frozen=True, kw_only=True)
class SystemBuild:
    """One build of docker/Dockerfile, whose folder is the context, with output to ``work``.

    ``secrets``: id -> file on the host; ``epoch``: SOURCE_DATE_EPOCH, Unix seconds.
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


def read_output(blobs: Path, manifest: dict[str, Any], root: Path | None) -> SystemOutput:
    """The output of a build from its manifest and a folder of blobs, named by hex digests."""
    config = json.loads((blobs / hex_digest(manifest["config"]["digest"])).read_text())
    return SystemOutput(
        tars=tuple(blobs / hex_digest(layer["digest"]) for layer in manifest["layers"]),
        diff_ids=tuple(hex_digest(item) for item in config["rootfs"]["diff_ids"]),
        config=config["config"],
        root=root,
    )


@dataclass(frozen=True, kw_only=True)
class ContainerRun:
    """A command to run in an image: no network, read-only root, no capabilities, image's user.

    Attributes:
        layout: the image's OCI layout, for engines that load it.
        name: what the layout's index calls it.
        lower_dirs: unpacked layers, highest first, for engines that mount.
        config: ``config`` object of the image, for engines that mount; None: the layout's.
        inputs: folder that is mounted at /mnt.
        argv: the command.
        user: ``uid:gid``; empty: the image's.
        work: folder for the engine's own files; no two runs at a time share one.
        bytecode: folder that keeps compiled Python between runs, for engines that mount;
            None: the one of the cache that all images share.
    """

    layout: Path
    name: str
    lower_dirs: tuple[Path, ...]
    config: Mapping[str, Any] | None = None
    inputs: Path
    argv: tuple[str, ...]
    user: str = ""
    work: Path
    bytecode: Path | None = None


class Engine(Protocol):
    """docker buildx or buildah."""

    name: str
    tools: tuple[str, ...]

    def present(self) -> bool:
        """Whether it can build on this host."""

    def check(self, runner: Runner) -> None:
        """Raise when the engine is older than what is tested, or does not answer."""

    def build_system(self, runner: Runner, build: SystemBuild) -> None:
        """Build the Dockerfile into ``build.work``."""

    def system_output(self, build: SystemBuild) -> SystemOutput:
        """Read what ``build_system`` left."""

    def run_in_image(self, runner: Runner, run: ContainerRun) -> str:
        """Run a command in the image and return its stdout."""

    def load(self, runner: Runner, layout: Path, name: str) -> None:
        """Put the image into the engine's own store, under the ``name`` in its index."""


def require_version(text: str, oldest: tuple[int, int], engine: str) -> None:
    """Raise when an engine is older than the Dockerfile is tested with.

    Raises:
        EngineTooOldError: also when its version cannot be read.
    """
    version = re.search(r"(\d+)\.(\d+)", text)
    if version is None or (int(version[1]), int(version[2])) < oldest:
        raise EngineTooOldError(
            f"{engine} is {text.strip() or 'of unknown version'}, at least "
            f"{oldest[0]}.{oldest[1]} is needed",
            remedy="upgrade it, or choose the other engine with --engine",
        )


def build_options(build: SystemBuild, *args: tuple[str, str]) -> list[str]:
    """Options of a Dockerfile's build that buildah and buildx share; ``args`` come first."""
    pairs: Iterable[tuple[str, str]] = (*args, *build.args.items())
    return [
        *(f"--build-arg={name}={value}" for name, value in pairs),
        *(f"--secret=id={name},src={path}" for name, path in build.secrets.items()),
    ]


def hex_digest(digest: str) -> str:
    """The hex digits of ``sha256:<hex>``."""
    return digest.removeprefix("sha256:")
