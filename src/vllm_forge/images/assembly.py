"""The parts of one image, from what the steps of a build made."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm_forge.host import cache_root, exclusive
from vllm_forge.images.checks import LayerShare
from vllm_forge.images.content import VLLM, patch_entries, stack_entry
from vllm_forge.images.engine import BYTECODE
from vllm_forge.images.layout import ImageLayer
from vllm_forge.images.prewarm import SCRIPT
from vllm_forge.images.slim_layer import update_record
from vllm_forge.images.store import StoredLayer, require_stored
from vllm_forge.kernels.selection import declared_device
from vllm_forge.patches import build_wheel
from vllm_forge.patches.wheel import GENERATED, PatchedWheel, python_blobs
from vllm_forge.sources import Lock, SourceRepo, Wheelhouse

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vllm_forge.images.content import WheelGroup
    from vllm_forge.images.prewarm import Prewarm
    from vllm_forge.images.system import System
    from vllm_forge.images.wheels import Entry
    from vllm_forge.matrix import ImageCell
    from vllm_forge.patches import Applied

NamedLayers = list[tuple[str, StoredLayer]]


@dataclass(frozen=True, kw_only=True)
class Top:
    """The last layer and what it says of the image; above it, kernels that were compiled before."""

    system: System
    stack: dict[str, Any]
    layer: StoredLayer
    prewarm: StoredLayer | None = None


def trial_name(cell: ImageCell) -> str:
    """Name of a candidate, which is not the name of an image that passed."""
    return f"localhost/vllm-forge-trial:{cell.name}"


def patched_wheel(
    cell: ImageCell, lock: Lock, applied: Applied, repo: SourceRepo, wheelhouse: Wheelhouse
) -> PatchedWheel:
    """The line's one wheel, in the cache."""
    published = lock.find(VLLM)
    key = f"{published.sha256}-{applied.result}"
    path = wheelhouse.verify(published)
    with exclusive(f"patched-{key}", wait=True):  # two SKUs of a line may be built at once
        return build_wheel(repo, applied, path, cell.line.vllm, cache_root() / "patched" / key)


def wheel_layers(cell: ImageCell, groups: Sequence[WheelGroup]) -> NamedLayers:
    """Name and layer of all groups, lowest first; written by now, empty ones included."""
    found = []
    for group in groups:
        found.append((f"{group.name} wheels", require_stored(group.key)))
        if group.slim_key is not None:
            what = f"{group.name} libraries for {cell.sku.arch}"
            found.append((what, require_stored(group.slim_key)))
    return found


def slimmed(layers: NamedLayers) -> dict[str, Any]:
    """Library -> foreign device code that an image of these layers does without."""
    removed: dict[str, Any] = {}
    for _, layer in layers:
        removed |= layer.removed
    return {path: what for path, what in sorted(removed.items()) if what["bytes"]}


def top_entries(published: Path, patched: Path, stack: dict[str, Any], python: str) -> list[Entry]:
    """Entries of the last layer: changed files, metadata, stack.json.

    vLLM's RECORD has the hashes of its libraries as the image has them.
    """
    entries = [stack_entry(stack)]
    for entry in patch_entries(published, patched, python):
        if entry.content is not None and entry.path.endswith(".dist-info/RECORD"):
            content = update_record(entry.content, entry.path, stack["slim"])
            entries.append(replace(entry, content=content))
        else:
            entries.append(entry)
    return sorted(entries, key=lambda entry: entry.path)


def image_layers(cell: ImageCell, top: Top, layers: NamedLayers) -> list[ImageLayer]:
    """All layers of an image with the line that its history shows, lowest first."""
    found = [*top.system.layers]
    for name, layer in layers:
        if not layer.empty:
            line = f"vllm-forge: {name} of {cell.line.lock}"
            found.append(ImageLayer(blob=layer.blob, created_by=line))
    found.append(ImageLayer(blob=top.layer.blob, created_by=f"vllm-forge: {cell.line.series}"))
    if top.prewarm is not None:
        found.append(ImageLayer(blob=top.prewarm.blob, created_by="vllm-forge: compiled kernels"))
    return found


def image_config(
    cell: ImageCell,
    top: Top,
    labels: dict[str, str],
    layers: Sequence[ImageLayer],
    prewarm: Prewarm | None,
) -> Any:
    """The ``config`` object: the system's, with the SKU's variables, labels, and the prewarming."""
    variables = dict(sorted(cell.sku.env.items())) | {BYTECODE: bytecode_place(layers)}
    config = dict(top.system.config)
    if prewarm is not None:
        variables |= dict(sorted(prewarm.environment().items()))
        config["Entrypoint"] = [SCRIPT, *config["Entrypoint"]]
    env = [*config["Env"], *(f"{name}={value}" for name, value in variables.items())]
    return config | {"Env": env, "Labels": labels}


def bytecode_place(layers: Sequence[ImageLayer]) -> str:
    """Where Python keeps what it compiles: the image has none, and its user cannot write there.

    Of each image apart. All sources have one time, and Python asks only for time and size: two
    images that share a volume would run each other's code.
    """
    digests = [layer.blob.diff_id for layer in layers]
    return f"/cache/python/{hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]}"


def image_shares(top: Top, layers: Sequence[ImageLayer]) -> list[LayerShare]:
    """Each layer's part of an image's size."""
    return [
        LayerShare(
            name=layer.created_by.removeprefix("vllm-forge: "),
            size=layer.blob.size,
            system=number < len(top.system.layers),
        )
        for number, layer in enumerate(layers)
    ]


def expectation(cell: ImageCell, applied: Applied, stack: dict[str, Any]) -> dict[str, Any]:
    """What image_checks.py must find."""
    blobs = python_blobs(SourceRepo(), applied.result)
    blobs.pop(GENERATED, None)  # carries our version
    return {
        "packages": stack["packages"],
        "stack": stack,
        "tree": applied.result,
        "blobs": blobs,
        "changed_files": stack["changed_files"],
        "compiler": "nvidia-cuda-nvcc" in stack["packages"],
        "device": declared_device(cell.sku, count=1).model_dump(),
        "unimportable": list(cell.line.unimportable),
    }
