"""Kits: an image and the GPU suite for a host without network, registry or container engine.

A kit is a folder of parts that may travel one by one, with a program (``kit_host.py``) that joins
them, verifies the image from its digest down, and runs the suite in it. Results become receipts of
that digest.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from vllm_forge.errors import UsageError
from vllm_forge.gputest.bundle import SuiteImage, write_bundle
from vllm_forge.gputest.caches import require_key
from vllm_forge.gputest.errors import KitError
from vllm_forge.gputest.launch import ENVIRONMENT, suite_command, unpack_tools
from vllm_forge.host import atomic_path, report, require_disk, tree_bytes
from vllm_forge.images.layout import Image, read_image, verify
from vllm_forge.images.prewarm import place_of
from vllm_forge.matrix import ImageCell
from vllm_forge.project import Project

HOST = Path(__file__).with_name("kit_host.py")
SIZE = re.compile(r"(?P<number>\d+)\s*(?P<unit>MB|MiB|GB|GiB)")
UNITS = {"MB": 10**6, "MiB": 1 << 20, "GB": 10**9, "GiB": 1 << 30}
CHUNK = 1 << 22
RUN = """#!/bin/sh
# sh run.sh take           keep the parts beside this file; once for each batch of parts
# sh run.sh go OUTPUT      verify, unpack, run the suite in the image; see kit.py
exec python3 "$(dirname "$0")/kit.py" "$@"
"""


@dataclass(frozen=True, kw_only=True)
class KitOptions:
    """What a kit holds.

    Attributes:
        image: OCI layout of the image.
        max_part: bytes of the largest part.
        inputs: place in the bundle -> folder: models and prompts.
        caches: what JIT compilers made in an earlier run of the same stack.
    """

    image: Path
    output: Path
    max_part: int
    inputs: dict[str, Path] = field(default_factory=dict)
    caches: Path | None = None


def parse_size(text: str) -> int:
    """Bytes of e.g. ``62MB``."""
    match = SIZE.fullmatch(text)
    if match is None or int(match["number"]) == 0:
        raise UsageError(
            f"invalid size {text!r}: expected e.g. 62MB", remedy=f"units: {', '.join(UNITS)}"
        )
    return int(match["number"]) * UNITS[match["unit"]]


def make_kit(project: Project, cell: ImageCell, options: KitOptions) -> Path:
    """Write a kit and return its folder, which must not exist.

    ReceiptSubjectError, JitCacheError: the image or the caches are of another stack.
    """
    if options.output.exists() or options.output.is_symlink():
        raise KitError(
            "--output exists already",
            where=str(options.output),
            remedy="choose another --output, or delete it",
        )
    image = read_image(options.image)
    with report("verify the image"):
        verify(image)
    models = sum(tree_bytes(folder) for folder in options.inputs.values())
    require_disk({options.output: 3 * image.size + 2 * models})
    with atomic_path(options.output) as aside:
        content = aside.with_name(f"content of {aside.name}")  # removed with it in any case
        content.mkdir()
        bundle, labels = content / "bundle", image.config["config"].get("Labels") or {}
        tested = SuiteImage(name=cell.name, digest=image.digest, labels=labels)
        plan = write_bundle(project, cell, tested, bundle)
        unpack_tools(project.root, bundle)
        for place, folder in options.inputs.items():
            shutil.copytree(folder, bundle / place)
        key = plan["caches"]["key"]
        place = place_of(key)
        if options.caches is not None:
            require_key(options.caches, key)
            shutil.copytree(options.caches, content / "jit" / Path(place).name)
        with report("write the layers as gzip"):
            write_layers(image, content / "image")
        argv, last = suite_command(place)
        with report("write the parts"):
            aside.mkdir()
            manifest = {
                "schema": 2,
                "digest": f"sha256:{image.digest}",
                "sku": cell.sku_name,
                "line": cell.line_name,
                "suite": {"argv": argv, "last": last, "env": ENVIRONMENT},
                "parts": write_parts(content, aside, options.max_part),
            }
            (aside / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
            (aside / "run.sh").write_text(RUN)
            shutil.copyfile(HOST, aside / "kit.py")
    return options.output


def write_layers(image: Image, folder: Path) -> None:
    """Write manifest.json, config.json and each layer as ``<number>.tar.gz``.

    Every host has gzip, and not every one zstd. The host verifies the content of layers by the
    image's configuration, so how they are compressed on the way does not matter.
    """
    folder.mkdir()
    shutil.copyfile(image.blob(f"sha256:{image.digest}"), folder / "manifest.json")
    shutil.copyfile(image.blob(image.manifest["config"]["digest"]), folder / "config.json")

    def write(number: int, layer: dict[str, Any]) -> None:
        source, target = image.blob(layer["digest"]), folder / f"{number}.tar.gz"
        if not layer["mediaType"].endswith("+zstd"):
            shutil.copyfile(source, target)
            return
        with source.open("rb") as packed, gzip.open(target, "wb", compresslevel=1) as out:
            zstandard.ZstdDecompressor().copy_stream(
                packed, cast("IO[bytes]", out), write_size=CHUNK
            )

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, *zip(*enumerate(image.manifest["layers"]), strict=True)))


class _Parts:
    """A file to write to that begins a new part when one is full."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.parts: list[dict[str, Any]] = []
        self.left = 0

    def write(self, data: bytes) -> int:
        """Append, in as many parts as it takes."""
        view = memoryview(data)
        while view:
            if self.left == 0:
                self.close()
                self.path = self.folder / f"part-{len(self.parts):03}"
                self.file = self.path.open("wb")
                self.digest, self.left = hashlib.sha256(), self.limit
                self.parts.append({"name": self.path.name})
            piece = view[: self.left]
            self.file.write(piece)
            self.digest.update(piece)
            self.left -= len(piece)
            view = view[len(piece) :]
        return len(data)

    def close(self) -> None:
        """Finish the last part."""
        if self.parts and "sha256" not in self.parts[-1]:
            self.file.close()
            self.parts[-1] |= {
                "size": self.path.stat().st_size,
                "sha256": self.digest.hexdigest(),
            }


def write_parts(content: Path, folder: Path, limit: int) -> list[dict[str, Any]]:
    """A tar of ``content``, cut into files of at most ``limit`` bytes; names, sizes, hashes.

    It is not compressed: layers are, and the rest is small.
    """
    parts = _Parts(folder, limit)
    with tarfile.open(fileobj=parts, mode="w|") as tar:  # type: ignore[call-overload]
        for path in sorted(content.iterdir()):
            tar.add(path, arcname=path.name)
    parts.close()
    return parts.parts
