"""Kits: the GPU suite for a host without network, in parts that may travel one by one."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.errors import UsageError
from vllm_forge.gputest.bundle import make_plan, write_bundle
from vllm_forge.gputest.caches import find_caches, pack_caches
from vllm_forge.gputest.errors import KitError
from vllm_forge.gputest.launch import test_tools
from vllm_forge.gputest.wheels import read_freeze, require_closed, select_wheels, thin_wheel
from vllm_forge.host import atomic_path, report, require_disk, tree_bytes
from vllm_forge.images import patched_wheel
from vllm_forge.kernels.coverage import parse_capability
from vllm_forge.patches import check_line
from vllm_forge.receipts.suite import read_suite
from vllm_forge.sources import Index, SourceRepo, Wheelhouse

if TYPE_CHECKING:
    from vllm_forge.gputest.wheels import WheelSelection
    from vllm_forge.matrix import ImageCell
    from vllm_forge.project import Project

HOST = Path(__file__).with_name("kit_host.py")
SIZE = re.compile(r"(?P<number>\d+)\s*(?P<unit>MB|MiB|GB|GiB)")
UNITS = {"MB": 10**6, "MiB": 1 << 20, "GB": 10**9, "GiB": 1 << 30}
RACE_FOLDER = "dist/gpu/race"  # see tests/gpu/race/kit.py
RACE_FILES = ("kit.tar.xz", "manifest.json")
RUN = """#!/bin/sh
# sh run.sh take           keep the parts in this folder; once for each part that travels alone
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
        max_result: bytes of the largest file that a run leaves; larger ones are cut.
        limit: seconds that a call on the host may take.
        minutes: budget per tier.
        inputs: place in the bundle -> folder: models and prompts.
        caches: what JIT compilers made on such a host before: a folder, or the tar that a run of
            a kit packs.
        race: helpers of the race suite that are compiled already, by
            ``tests.support.prepare_race``. Without, the host compiles them.
        omit: distributions to leave out.
    """

    output: Path
    freeze: Path
    python: str
    max_part: int
    max_result: int
    limit: float
    minutes: float
    inputs: dict[str, Path] = field(default_factory=dict)
    caches: Path | None = None
    race: Path | None = None
    omit: tuple[str, ...] = ()


def parse_size(text: str) -> int:
    """Bytes of e.g. ``62MB``.

    Raises:
        UsageError: not a size.
    """
    size = SIZE.fullmatch(text)
    if size is None or int(size["number"]) == 0:
        raise UsageError(
            f"invalid size {text!r}", remedy=f"write e.g. 62MB; units: {', '.join(UNITS)}"
        )
    return int(size["number"]) * UNITS[size["unit"]]


def make_kit(project: Project, cell: ImageCell, options: KitOptions) -> Path:
    """Write a kit and return its folder.

    Raises:
        KitError: see select_wheels; or the folder exists.
        DiskSpaceError: the disk is too small for it.
    """
    if options.output.exists() or options.output.is_symlink():
        raise KitError(
            "--output exists already",
            where=str(options.output),
            remedy="name another with --output, or delete it",
        )
    if options.race is not None:
        require_race(options.race)
    if options.caches is not None:
        find_caches(options.caches)
    frozen = read_freeze(options.freeze)
    lock = project.lock(cell.line_name)
    selection = select_wheels(
        cell.line.model_copy(update={"python": options.python}),
        cell.base,
        lock,
        Index(),
        frozen=frozen,
        omit=options.omit,
        extra=test_tools(project.root),
    )
    wheelhouse, repo = Wheelhouse(), SourceRepo()
    wheelhouse.fetch([lock.find("vllm"), *selection.wheels])
    applied = check_line(project, cell.line_name, repo)
    patched = patched_wheel(cell, lock, applied, repo, wheelhouse).path
    size = sum(wheel.size for wheel in selection.wheels) + 2 * patched.stat().st_size
    size += sum(tree_bytes(folder) for folder in options.inputs.values())
    require_disk({options.output: 2 * size})
    with atomic_path(options.output) as aside:
        content = aside.with_name(f"content of {aside.name}")  # deleted with it, also after a kill
        wheels = content / "wheels"
        wheels.mkdir(parents=True)
        with report("zero device code for other GPUs"):
            thin = thin_wheel(
                patched,
                wheels / patched.name,
                parse_capability(cell.sku.compute_capability),
                read_suite(project.root)["kit"]["without_device_code"],
            )
        for wheel in selection.wheels:
            shutil.copyfile(wheelhouse.verify(wheel), wheels / wheel.filename)
        require_closed(sorted(wheels.glob("*.whl")), {*frozen, *options.omit}, options.python)
        plan, compiled_at = _write_bundle(
            project, cell, content, options, [*selection.differences, *thin.differences]
        )
        with report("write the parts"):
            aside.mkdir()
            parts = write_parts(content, aside, options.max_part)
            manifest = _manifest(plan, options, selection)
            manifest |= {"compiled_at": compiled_at, "parts": parts}
            (aside / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
            (aside / "run.sh").write_text(RUN)
            shutil.copyfile(HOST, aside / "kit.py")
    return options.output


def _write_bundle(
    project: Project,
    cell: ImageCell,
    content: Path,
    options: KitOptions,
    differences: list[str],
) -> tuple[dict[str, Any], str | None]:
    """Fill ``content/bundle`` and pack the caches; the plan, and where these were compiled."""
    bundle = write_bundle(project, cell, SourceRepo(), content / "bundle")
    for place, folder in options.inputs.items():
        shutil.copytree(folder, bundle.folder / place)
    subject = {"kind": "environment", "name": f"kit for {cell.name}", "sha256": None}
    plan = make_plan(project, cell, bundle.tree, subject) | {"differences": differences}
    (bundle.folder / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")
    if options.race is not None:
        (bundle.folder / RACE_FOLDER).mkdir(parents=True)
        for name in RACE_FILES:
            shutil.copyfile(options.race / name, bundle.folder / RACE_FOLDER / name)
    if options.caches is None:
        return plan, None
    return plan, pack_caches(options.caches, content, plan["caches"]["key"])


def _manifest(
    plan: dict[str, Any], options: KitOptions, selection: WheelSelection
) -> dict[str, Any]:
    """What ``kit_host`` reads, and what the kit is for."""
    return {
        "schema": 1,
        **{name: plan[name] for name in ("sku", "line", "tree", "lock_sha256", "differences")},
        "freeze_sha256": hashlib.sha256(options.freeze.read_bytes()).hexdigest(),
        "python": options.python,
        "minutes": options.minutes,
        "limit": options.limit,
        "max_result": options.max_result,
        "kept_of_the_host": list(selection.kept),
        "wheels": {wheel.filename: wheel.sha256 for wheel in selection.wheels},
    }


def require_race(source: Path) -> None:
    """Refuse a folder that does not have the race suite's compiled helpers.

    Raises:
        KitError: with what it lacks.
    """
    for name in RACE_FILES:
        if not (source / name).is_file():
            raise KitError(
                f"missing {name} in --race",
                where=str(source),
                remedy="make the folder with: python -m tests.support.prepare_race DIR",
            )


class _Parts:
    """A stream that begins a new file when one is full."""

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
