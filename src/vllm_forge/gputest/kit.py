"""Kits: the GPU suite for a host without network, in parts that may travel one by one."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.errors import UsageError
from vllm_forge.gputest.bundle import make_plan, write_bundle
from vllm_forge.gputest.errors import KitError
from vllm_forge.gputest.kit_caches import pack_caches, require_caches
from vllm_forge.gputest.launch import test_tools
from vllm_forge.gputest.select_wheels import choose, read_freeze, require_closed
from vllm_forge.gputest.thin_wheel import thin_wheel
from vllm_forge.host import atomic_path, report, require_disk, tree_bytes
from vllm_forge.images import patched_wheel
from vllm_forge.kernels.coverage import parse_capability
from vllm_forge.patches import check_line
from vllm_forge.receipts.suite import FILE, RACE_FOLDER
from vllm_forge.sources import Index, SourceRepo, Wheelhouse, read_lock

if TYPE_CHECKING:
    from vllm_forge.matrix import ImageCell, Matrix

HOST = Path(__file__).with_name("kit_host.py")
SIZE = re.compile(r"(?P<number>\d+)\s*(?P<unit>MB|MiB|GB|GiB)")
UNITS = {"MB": 10**6, "MiB": 1 << 20, "GB": 10**9, "GiB": 1 << 30}
KNOWN_OF_CACHES = ("compute_capability", "tree")  # see vllm_forge.gputest.caches.stack_key
RACE_FILES = ("kit.tar.xz", "manifest.json")
RUN = """#!/bin/sh
# sh run.sh take           keep the parts that lie here; once for each part that travels alone
# sh run.sh go OUTPUT      verify, join, install beside the host's packages, run the suite
exec python3 "$(dirname "$0")/kit.py" "$@"
"""


@dataclass(frozen=True, kw_only=True)
class KitOptions:
    """What a kit is for.

    Attributes:
        output: folder that is made.
        freeze: the host's ``pip freeze``.
        python: version of its Python.
        max_part: bytes of the largest part.
        minutes: budget per tier.
        brought: place in the bundle -> folder: models and prompts.
        caches: what JIT compilers made on such a host before: a folder, or the tar that a run of
            a kit packs.
        race: helpers of the race suite that are compiled already: what ``tests.gpu.prepare_race``
            made. Without, the host compiles them.
        omit: distributions to leave out.
    """

    output: Path
    freeze: Path
    python: str
    max_part: int
    minutes: float
    brought: dict[str, Path] = field(default_factory=dict)
    caches: Path | None = None
    race: Path | None = None
    omit: tuple[str, ...] = ()


def parse_size(text: str) -> int:
    """Bytes of e.g. ``62MB``.

    Raises:
        UsageError: it is not a size.
    """
    found = SIZE.fullmatch(text)
    if found is None or int(found["number"]) == 0:
        raise UsageError(f"{text!r} is not a size", remedy=f"e.g. 62MB; units: {', '.join(UNITS)}")
    return int(found["number"]) * UNITS[found["unit"]]


def make_kit(cell: ImageCell, matrix: Matrix, options: KitOptions) -> Path:
    """Write a kit and return its folder.

    Raises:
        KitError: see kit_wheels.choose; or the folder exists.
        DiskSpaceError: the disk is too small for it.
    """
    if options.output.exists() or options.output.is_symlink():
        raise KitError(
            "the folder is there already",
            where=str(options.output),
            remedy="name another with --output, or delete it",
        )
    if options.race is not None:
        require_race(options.race)
    if options.caches is not None:
        require_caches(options.caches)
    suite = tomllib.loads((cell.root / FILE).read_text(encoding="utf-8"))["kit"]
    frozen = read_freeze(options.freeze)
    lock = read_lock(cell.root, cell.line_name, cell.line, matrix.base)
    chosen = choose(
        cell.line.model_copy(update={"python": options.python}),
        matrix.base,
        lock,
        Index(),
        frozen=frozen,
        omit=options.omit,
        extra=test_tools(cell.root),
    )
    wheelhouse, repo = Wheelhouse(), SourceRepo()
    wheelhouse.fetch([lock.find("vllm"), *chosen.wheels])
    applied = check_line(cell.root, cell.line_name, cell.line, repo)
    patched = patched_wheel(cell, lock, applied, repo, wheelhouse)
    size = sum(wheel.size for wheel in chosen.wheels) + 2 * patched.path.stat().st_size
    size += sum(tree_bytes(folder) for folder in options.brought.values())
    require_disk({options.output: 2 * size})
    with atomic_path(options.output) as aside:
        content = aside.with_name(f"content of {aside.name}")  # gone with it, whatever ends this
        (content / "wheels").mkdir(parents=True)
        with report("zero device code for other GPUs"):
            thinned = thin_wheel(
                patched.path,
                content / "wheels" / patched.path.name,
                parse_capability(cell.sku.compute_capability),
                suite["without_device_code"],
            )
        for wheel in chosen.wheels:
            shutil.copyfile(wheelhouse.verify(wheel), content / "wheels" / wheel.filename)
        require_closed(
            sorted((content / "wheels").glob("*.whl")),
            {*frozen, *options.omit},
            options.python,
        )
        bundle = write_bundle(cell, repo, content / "bundle")
        for place, folder in options.brought.items():
            shutil.copytree(folder, content / "bundle" / place)
        subject = {"kind": "environment", "name": f"kit for {cell.name}", "sha256": None}
        plan = make_plan(cell, bundle.tree, subject)
        plan["differences"] = [*chosen.differences, *thinned.differences]
        (content / "bundle" / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")
        if options.race is not None:
            copy_race(options.race, content / "bundle" / RACE_FOLDER)
        compiled_at = None
        if options.caches is not None:
            key = {"kind": subject["kind"], **{name: plan[name] for name in KNOWN_OF_CACHES}}
            compiled_at = pack_caches(options.caches, content, key)
        with report("write the parts"):
            aside.mkdir()
            parts = write_parts(content, aside, options.max_part)
            manifest = {
                "schema": 1,
                "sku": cell.sku_name,
                "line": cell.line_name,
                "tree": bundle.tree,
                "lock_sha256": lock.digest,
                "freeze_sha256": hashlib.sha256(options.freeze.read_bytes()).hexdigest(),
                "python": options.python,
                "minutes": options.minutes,
                "kept_of_the_host": list(chosen.kept),
                "differences": plan["differences"],
                "compiled_at": compiled_at,
                "wheels": {w.filename: w.sha256 for w in chosen.wheels},
                "parts": parts,
            }
            (aside / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
            (aside / "run.sh").write_text(RUN)
            shutil.copyfile(HOST, aside / "kit.py")
    return options.output


def require_race(source: Path) -> None:
    """Refuse a folder that has not the race suite's compiled helpers.

    Raises:
        KitError: with what it lacks.
    """
    for name in RACE_FILES:
        if not (source / name).is_file():
            raise KitError(
                f"no {name}: not what tests.gpu.prepare_race made",
                where=str(source),
                remedy="python -m tests.gpu.prepare_race DIR makes them, --race DIR brings them",
            )


def copy_race(source: Path, target: Path) -> None:
    """Copy the race suite's compiled helpers.

    Raises:
        KitError: there are none.
    """
    require_race(source)
    target.mkdir(parents=True)
    for name in RACE_FILES:
        shutil.copyfile(source / name, target / name)


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

    It is not compressed: wheels are, and the rest is small.
    """
    parts = _Parts(folder, limit)
    with tarfile.open(fileobj=parts, mode="w|") as tar:  # type: ignore[call-overload]
        for path in sorted(content.iterdir()):
            tar.add(path, arcname=path.name)
    parts.close()
    return parts.parts
