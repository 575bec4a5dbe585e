"""Which image an engine's store has under a name, by the digest that a registry knows it by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_forge.images.layout import read_image
from vllm_forge.receipts.errors import ReceiptSubjectError
from vllm_forge.serve.errors import NoGpuError

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_forge.host import Probe

TREE_LABEL = "io.vllm-forge.tree"
# podman's Digest is the manifest's. docker's Id is it too with containerd's store; with the older
# one it is the configuration's, and the manifest's is known of what came from a registry.
ENGINES = {"docker": "{{.Id}}", "podman": "{{.Digest}}"}
FORM = '|{{{{index .Config.Labels "{label}"}}}}|{{{{join .RepoDigests " "}}}}'


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """An image in an engine's store.

    Attributes:
        engine: its program.
        digest: SHA-256 of the manifest, hex.
        tree: of the patched source, by the image's label; empty if it has none.
    """

    engine: str
    digest: str
    tree: str


def find_image(probe: Probe, name: str, layout: Path) -> StoredImage:
    """The image of a name in the first engine's store that has one.

    Args:
        probe: asks the host.
        name: the reference.
        layout: of the cell's build; it may not be there.

    Raises:
        NoGpuError: no engine has it.
        ReceiptSubjectError: docker does not know its manifest, and the build is not here.
        LayoutError: the layout is damaged.
    """
    for engine, field in ENGINES.items():
        form = field + FORM.format(label=TREE_LABEL)
        reply = probe.ask(f"{engine}-image", [engine, "image", "inspect", f"--format={form}", name])
        if reply.code == 0:
            stored, tree, known = (*reply.text.strip().split("|"), "", "")[:3]
            digest = _hex(stored)
            if engine == "docker":
                digest = _manifest(digest, known.split(), name, layout)
            return StoredImage(engine=engine, digest=digest, tree=tree)
    raise NoGpuError(
        f"no container engine has {name}",
        where=", ".join(ENGINES),
        remedy="build it with --load, or name it with --image; --env tests an environment",
    )


def _manifest(stored: str, known: list[str], name: str, layout: Path) -> str:
    """The manifest's digest of an image that docker has."""
    digests = {_hex(entry.partition("@")[2]) for entry in known}
    own = {_hex(entry.partition("@")[2]) for entry in known if _is_of(entry, name)}
    if stored in digests:
        return stored
    for found in (own, digests):
        if len(found) == 1:
            return found.pop()
    if layout.is_dir():
        built = read_image(layout)
        if stored in {built.digest, _hex(built.manifest["config"]["digest"])}:
            return built.digest
    raise ReceiptSubjectError(
        f"docker knows the image's configuration sha256:{stored}, and not one manifest of it",
        where=name,
        remedy=f"pull it from a registry, or have the build that it was loaded from in {layout}",
    )


def _is_of(entry: str, name: str) -> bool:
    repository = name.partition("@")[0]
    if ":" in repository.rpartition("/")[2]:  # a tag; before it may be a port
        repository = repository.rpartition(":")[0]
    return entry.partition("@")[0] == repository


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")
