"""Find an image in an engine's store, with the digest that a registry knows it by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_forge.gputest.bundle import SuiteImage
from vllm_forge.host import Probe
from vllm_forge.images.docker_api import inspect_image
from vllm_forge.images.errors import EngineTooOldError, EngineUnreachableError
from vllm_forge.images.layout import hex_digest, read_image
from vllm_forge.receipts.errors import ReceiptSubjectError
from vllm_forge.serve.errors import NoGpuError


def find_image(probe: Probe, name: str, layout: Path) -> tuple[str, SuiteImage]:
    """The first engine that has an image of this name, and the image; else NoGpuError.

    ``layout`` is of the cell's build, and need not exist. ReceiptSubjectError: docker does not know
    the manifest, and there is no build.
    """
    docker = "docker: no such image"
    try:
        image = inspect_image(name)
    except (EngineUnreachableError, EngineTooOldError) as error:
        image, docker = None, error.what
    if image is not None:
        digest = _manifest(image, name, layout)
        return "docker", SuiteImage(name=name, digest=digest, labels=_labels(image))
    reply = probe.ask("podman-image", ["podman", "image", "inspect", name])
    if reply.code == 0:
        (image,) = json.loads(reply.text)
        digest = hex_digest(image["Digest"])
        return "podman", SuiteImage(name=name, digest=digest, labels=_labels(image))
    raise NoGpuError(
        f"no container engine has {name}",
        where=f"{docker}; podman: {'not installed' if reply.missing else 'no such image'}",
        remedy="build it with --load, or name it with --image",
    )


def _labels(image: dict[str, Any]) -> dict[str, str]:
    return (image.get("Config") or {}).get("Labels") or {}


def _manifest(image: dict[str, Any], name: str, layout: Path) -> str:
    """The manifest's digest of an image that docker has.

    containerd's store has it as the descriptor (API 1.48) or the Id. The classic store's Id is the
    configuration's digest; it knows the manifest of what came from a registry.
    """
    if digest := (image.get("Descriptor") or {}).get("digest"):
        return hex_digest(digest)
    stored, known = hex_digest(image["Id"]), image.get("RepoDigests") or []
    digests = {hex_digest(entry.partition("@")[2]) for entry in known}
    own = {hex_digest(entry.partition("@")[2]) for entry in known if _is_of(entry, name)}
    if stored in digests:
        return stored
    for candidates in (own, digests):
        if len(candidates) == 1:
            return candidates.pop()
    if layout.is_dir():
        built = read_image(layout)
        if stored in {built.digest, hex_digest(built.manifest["config"]["digest"])}:
            return built.digest
    raise ReceiptSubjectError(
        f"docker reports only the configuration sha256:{stored}; the manifest digest is unknown",
        where=name,
        remedy=f"pull it from a registry, or have the build that it was loaded from in {layout}",
    )


def _is_of(entry: str, name: str) -> bool:
    repository = name.partition("@")[0]
    if ":" in repository.rpartition("/")[2]:  # a tag; before it may be a port
        repository = repository.rpartition(":")[0]
    return entry.partition("@")[0] == repository
