"""The parts of one image: the patched wheel, the patch layer, the candidate."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm_forge.host import cache_root, exclusive, remove
from vllm_forge.images.checks import LayerShare, write_inputs
from vllm_forge.images.content import (
    VLLM,
    health_entry,
    labels,
    patch_entries,
    patch_key,
    stack_entry,
    stack_record,
)
from vllm_forge.images.engine import BYTECODE
from vllm_forge.images.layout import Image, ImageLayer, timestamp, write_image
from vllm_forge.images.prewarm import SCRIPT, prewarm_layer
from vllm_forge.images.slim import update_record
from vllm_forge.images.store import StoredLayer, require_stored, write_layer
from vllm_forge.kernels.selection.questions import declared_device
from vllm_forge.patches import build_wheel, check_line
from vllm_forge.patches.wheel import GENERATED, PatchedWheel, python_blobs
from vllm_forge.sources import Lock, SourceRepo, Wheelhouse

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from vllm_forge.images.plan import ImagePlan
    from vllm_forge.images.system import System
    from vllm_forge.images.wheels import Entry
    from vllm_forge.matrix import ImageCell
    from vllm_forge.patches import Applied


@dataclass(frozen=True, kw_only=True)
class PatchedSource:
    """A line's series, applied, and the wheel that it makes of the release."""

    applied: Applied
    wheel: PatchedWheel


@dataclass(frozen=True, kw_only=True)
class PatchLayer:
    """Changed files, metadata and stack.json (``stack``), on a system; above it the ``prewarm``."""

    system: System
    stack: dict[str, Any]
    layer: StoredLayer
    prewarm: StoredLayer | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An image that is complete and not checked; all layers are lowest first.

    ``folders``: unpacked layers that hold wheels or patches; ``stack``: its stack.json.
    """

    image: Image
    layers: tuple[ImageLayer, ...]
    labels: dict[str, str]
    stack: dict[str, Any]
    folders: tuple[Path, ...]
    shares: tuple[LayerShare, ...]


def make_wheel(plan: ImagePlan) -> PatchedSource:
    """Apply the series; write the line's patched wheel."""
    repo, cell = SourceRepo(), plan.cell
    applied = check_line(plan.project, cell.line_name, repo)
    wheel = patched_wheel(cell, plan.lock, applied, repo, Wheelhouse())
    return PatchedSource(applied=applied, wheel=wheel)


def patched_wheel(
    cell: ImageCell, lock: Lock, applied: Applied, repo: SourceRepo, wheelhouse: Wheelhouse
) -> PatchedWheel:
    """The line's one wheel, in the cache."""
    published = lock.find(VLLM)
    key = f"{published.sha256}-{applied.result}"
    path = wheelhouse.verify(published)
    with exclusive(f"patched-{key}", wait=True):  # two SKUs of a line may be built at once
        return build_wheel(repo, applied, path, cell.line.vllm, cache_root() / "patched" / key)


def write_patch_layer(plan: ImagePlan, system: System, source: PatchedSource) -> PatchLayer:
    """The last, small layer, and above it the kernels that the plan brings."""
    cell, prewarm = plan.cell, plan.options.prewarm
    epoch = cell.base.source_date_epoch
    slim = slimmed(layer for _, layer in wheel_layers(plan))
    stack = stack_record(plan, source.wheel, system, slim)
    published = plan.lock.find(VLLM)
    entries = patch_layer_entries(
        Wheelhouse().path(published), source.wheel.path, stack, cell.line.python
    )
    return PatchLayer(
        system=system,
        stack=stack,
        layer=write_layer(patch_key(cell, published, stack), entries, epoch),
        prewarm=None if prewarm is None else prewarm_layer(prewarm, epoch),
    )


def assemble(plan: ImagePlan, source: PatchedSource, patch: PatchLayer) -> Candidate:
    """Write the candidate's layout, and what the checks inside must find."""
    cell, epoch = plan.cell, plan.cell.base.source_date_epoch
    image_labels = labels(patch.stack, timestamp(epoch))
    wheels = wheel_layers(plan)
    layers = image_layers(cell, patch, wheels)
    image = write_image(
        plan.candidate,
        layers=layers,
        config=image_config(plan, patch, image_labels, layers),
        epoch=epoch,
        name=plan.candidate_name,
    )
    write_inputs(plan.work / "inputs", expectation(cell, source.applied, patch.stack))
    remove(plan.patch_files)
    plan.patch_files.symlink_to(patch.layer.files)
    return Candidate(
        image=image,
        layers=layers,
        labels=image_labels,
        stack=patch.stack,
        folders=(*(layer.files for _, layer in wheels), patch.layer.files),
        shares=tuple(
            LayerShare(
                name=layer.created_by.removeprefix("vllm-forge: "),
                size=layer.blob.size,
                system=number < len(patch.system.layers),
            )
            for number, layer in enumerate(layers)
        ),
    )


def wheel_layers(plan: ImagePlan) -> list[tuple[str, StoredLayer]]:
    """Name and layer of all groups, lowest first; written by now, empty ones included."""
    layers = []
    for group in plan.groups:
        layers.append((f"{group.name} wheels", require_stored(group.key)))
        if group.slim_key is not None:
            name = f"{group.name} libraries for {plan.cell.sku.arch}"
            layers.append((name, require_stored(group.slim_key)))
    return layers


def slimmed(layers: Iterable[StoredLayer]) -> dict[str, Any]:
    """Library -> foreign device code that an image of these layers does without."""
    removed = {path: row for layer in layers for path, row in layer.removed.items()}
    return {path: row for path, row in sorted(removed.items()) if row["bytes"]}


def patch_layer_entries(
    published: Path, patched: Path, stack: dict[str, Any], python: str
) -> list[Entry]:
    """Changed files, metadata, stack.json, the health check.

    RECORD has the hashes of the slimmed libraries.
    """
    entries = [health_entry(), stack_entry(stack)]
    for entry in patch_entries(published, patched, python):
        content = entry.content
        if content is not None and entry.path.endswith(".dist-info/RECORD"):
            content = update_record(content, entry.path, stack["slim"])
        entries.append(replace(entry, content=content))
    return sorted(entries, key=lambda entry: entry.path)


def image_layers(
    cell: ImageCell, patch: PatchLayer, wheels: Sequence[tuple[str, StoredLayer]]
) -> tuple[ImageLayer, ...]:
    """All layers of an image with the line that its history shows, lowest first."""
    named = [(f"{name} of {cell.line.lock}", layer) for name, layer in wheels if not layer.empty]
    named.append((cell.line.series, patch.layer))
    if patch.prewarm is not None:
        named.append(("compiled kernels", patch.prewarm))
    own = [ImageLayer(blob=layer.blob, created_by=f"vllm-forge: {name}") for name, layer in named]
    return (*patch.system.layers, *own)


def image_config(
    plan: ImagePlan, patch: PatchLayer, image_labels: dict[str, str], layers: Sequence[ImageLayer]
) -> dict[str, Any]:
    """The ``config`` object: the system's, with the SKU's variables, labels, and the prewarming."""
    prewarm = plan.options.prewarm
    variables = dict(sorted(plan.cell.sku.env.items())) | {BYTECODE: bytecode_place(layers)}
    config = dict(patch.system.config)
    if prewarm is not None:
        variables |= dict(sorted(prewarm.environment().items()))
        config["Entrypoint"] = [SCRIPT, *config["Entrypoint"]]
    env = [*config["Env"], *(f"{name}={value}" for name, value in variables.items())]
    return config | {"Env": env, "Labels": image_labels}


def bytecode_place(layers: Sequence[ImageLayer]) -> str:
    """Where Python keeps what it compiles: the image has none, and its user cannot write there.

    Separate for each image. All sources have one time, and Python asks only for time and size: two
    images that share a volume would run each other's code.
    """
    digests = [layer.blob.diff_id for layer in layers]
    return f"/cache/python/{hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]}"


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
