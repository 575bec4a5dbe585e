"""Kits: an image and the GPU suite for a host without network, registry or container engine.

A kit is a folder of parts that may travel one by one, with a program (``kit_host.py``) that joins
them, verifies the image from its digest down, and runs the suite in it.
"""

import gzip
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from vllm_forge.checkpoints.fixtures.sparse import SIGN
from vllm_forge.gputest import launch
from vllm_forge.gputest.errors import KitError
from vllm_forge.host import atomic_path, report, require_disk, tree_bytes
from vllm_forge.host.files import file_digest
from vllm_forge.images.layout import Image, read_image, verify
from vllm_forge.images.prewarm import copy_plain, place_of
from vllm_forge.matrix import ImageCell
from vllm_forge.project import Project

# What is compiled is of the stack of caches.json, for the suite and for later kits.
KEEP_KEY = 'mkdir -p "$1" && { [ -e "$1/$2" ] || cp "/forge/$2" "$1"; } && shift 2 && exec "$@"'
TURNS = ("/opt/venv/bin/python", "-m", "vllm_forge.bench.turns", "/forge/bench", "/output")
HOST = Path(__file__).with_name("kit_host.py")
CHUNK = 1 << 22
MOST_PARTS = 10_000  # a folder of more is slow to copy, and to delete
PYTHON = """python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' ||
    { echo 'no python3 of 3.9 or newer: put the folder of one first in PATH' >&2; exit 1; }
"""
RUN = f"""#!/bin/sh
# sh run.sh take           keep the parts beside this file; once for each batch of parts
# sh run.sh go OUTPUT      verify, unpack, run the suite in the image; see kit.py
# sh run.sh bench OUTPUT   the same for the sessions of benchmarks that the kit has
{PYTHON}exec python3 "$(dirname "$0")/kit.py" "$@"
"""


def make_kit(
    project: Project,
    cell: ImageCell,
    layout: Path,
    output: Path,
    *,
    max_part: int,
    inputs: dict[str, Path],
    caches: Path | None = None,
    add: Callable[[Path, dict[str, Any]], None] | None = None,
) -> None:
    """Write a kit of an image's ``layout`` to ``output``, which must not exist.

    ``max_part``: bytes of the largest part. ``inputs``: place in the bundle -> folder with models
    or prompts. ``caches``: what JIT compilers made in an earlier run of the same stack.
    ``add``: puts more into the bundle of a plan, see `sessions`.
    """
    if output.exists() or output.is_symlink():
        remedy = "choose another --output, or delete it"
        raise KitError("--output exists already", where=output, remedy=remedy)
    for folder in inputs.values():
        if (folder / SIGN).exists():
            remedy = "give its recipe: checkpoint fixtures full --artifact NAME DIR --recipe"
            raise KitError("a copy of a rehearsal stores its holes", where=folder, remedy=remedy)
    image = read_image(layout)
    with report("verify the image"):
        verify(image)
    models = sum(tree_bytes(folder) for folder in inputs.values())
    require_disk(output, 3 * image.size + 2 * models)
    if (number := (image.size + models) // max_part) > MOST_PARTS:
        raise KitError(f"a kit of {number} parts", remedy="give a --max-part of more megabytes")
    with atomic_path(output) as aside:
        content = aside.with_name(f"content of {aside.name}")  # removed with it in any case
        content.mkdir()
        bundle, labels = content / "bundle", image.config["config"].get("Labels") or {}
        tested = launch.SuiteImage(name=cell.name, digest=image.digest, labels=labels)
        plan = launch.write_bundle(project, cell, tested, bundle)
        for place, folder in inputs.items():
            shutil.copytree(folder, bundle / place)
        key = plan["caches"]["key"]
        place = place_of(key)
        if caches is not None:
            launch.require_key(caches, key)
            (content / "jit").mkdir()
            copy_plain(caches, content / "jit" / Path(place).name)
        if add is not None:
            add(bundle, plan)
        with report("write the layers as gzip"):
            write_layers(image, content / "image")
        with report("write the parts"):
            aside.mkdir()
            manifest = {
                "schema": 2,
                "digest": f"sha256:{image.digest}",
                "sku": cell.sku_name,
                "line": cell.line_name,
                # What comes before and after the runner's arguments.
                "suite": {
                    "argv": ["/bin/sh", "-c", launch.WITH_CACHES, "sh", *launch.SUITE],
                    "last": [f"--caches={place}"],
                    "env": launch.ENVIRONMENT,
                },
                "bench": {"argv": session_command(place), "last": [], "env": launch.ENVIRONMENT},
                "parts": write_parts(content, aside, max_part),
            }
            (aside / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
            (aside / "run.sh").write_text(RUN)
            shutil.copyfile(HOST, aside / "kit.py")


def session_command(place: str, *names: str) -> list[str]:
    """Run sessions of benchmarks in an image that has their bundle; ``names``: default all."""
    return ["/bin/sh", "-c", KEEP_KEY, "sh", place, launch.KEY, *TURNS, *names]


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


def write_parts(content: Path, folder: Path, limit: int) -> list[dict[str, Any]]:
    """A tar of ``content``, cut into files of at most ``limit`` bytes; names, sizes, hashes.

    It is not compressed: layers are, and the rest is small.
    """
    width = max(3, len(str(tree_bytes(content) // limit)))
    argv = ["split", f"--bytes={limit}", "--numeric-suffixes", f"--suffix-length={width}"]
    with (
        suppress(BrokenPipeError),  # it ended early, and has said why
        subprocess.Popen([*argv, "-", str(folder / "part-")], stdin=subprocess.PIPE) as split,
        tarfile.open(fileobj=split.stdin, mode="w|") as tar,
    ):
        for path in sorted(content.iterdir()):
            tar.add(path, arcname=path.name)
    if split.returncode:
        raise KitError(f"cannot write the parts: split exited with {split.returncode}")
    return [
        {"name": path.name, "size": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.glob("part-*"))
    ]
