"""What would be built, and why: a cell's inputs resolved, without network, engine or a write."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_forge.host import cache_root, console, hash_of, require_disk, require_writable
from vllm_forge.host.errors import CacheError, FileAccessError
from vllm_forge.images import bytecode, checks, cubins
from vllm_forge.images.checks import (
    CHECK_ARGV,
    LAYER_CHECKS,
    PYTHON_ALONE,
    SCRIPTS,
    any_user,
    contract_inputs,
)
from vllm_forge.images.content import CONFIG_FORMAT, FORMAT, HEALTH, WheelGroup, wheel_groups
from vllm_forge.images.engines import ContainerRun, Engine
from vllm_forge.images.errors import BuildRecordError, EngineSetupError, LayoutError
from vllm_forge.images.layout import Image, blob_times, has_name, read_image
from vllm_forge.images.prewarm import ENTRYPOINT, Prewarm, prewarm_key
from vllm_forge.images.record import Inputs, compare, kept_digest, read_record
from vllm_forge.images.rootfs import CURRENT, ROOTFS, BaseRef, base_of, fetch_packages, is_whole
from vllm_forge.images.store import layer_folder, stored
from vllm_forge.images.system import SYSTEM_FORMAT, is_kept, system_folder
from vllm_forge.images.wheels import site_packages
from vllm_forge.kernels.coverage.families import catalogue
from vllm_forge.matrix import ImageCell
from vllm_forge.patches import Patch, read_series, read_tree_lock
from vllm_forge.project import Project
from vllm_forge.sources import Lock, Wheelhouse
from vllm_forge.sources.errors import DistributionNotFoundError, IndexUnreachableError
from vllm_forge.sources.lock import UNPACK_RATIO

SYNTAX = ',:$"\\'  # buildah's --output, overlay's lowerdir, storage.conf
SYSTEM_BYTES = 3 * (1 << 30)  # rootfs tar, engine's copies, exported folder

DRIVER_FUNCTIONS = "libcuda-functions.txt"  # beside the Dockerfile, which makes a stub of it


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What the command line adds to a cell."""

    output: Path
    base: str = ROOTFS  # see ``base_of``
    prewarm: Prewarm | None = None
    kernels: bool = False  # carry the kernel archives that FlashInfer would download


@dataclass(frozen=True, kw_only=True)
class ImagePlan:
    """A cell with its lock, series, layers and base; all paths of its build follow from it."""

    project: Project
    cell: ImageCell
    options: BuildOptions
    engine: Engine
    lock: Lock
    patches: tuple[Patch, ...]
    groups: tuple[WheelGroup, ...]
    base: BaseRef

    @property
    def target(self) -> Path:
        return self.options.output / self.cell.name

    @property
    def name(self) -> str:
        """Name and tag of the image, e.g. ``localhost/vllm-0.26.0-b300:0.26``."""
        return f"localhost/{self.cell.name}:{self.cell.line_name}"

    @property
    def record_path(self) -> Path:
        return self.options.output / f"{self.cell.name}.json"

    @property
    def work(self) -> Path:
        """Folder of the cache for what is not finished."""
        return cache_root() / "work" / self.cell.name

    @property
    def candidate(self) -> Path:
        """The layout before it has passed its checks."""
        return self.work / "candidate"

    @property
    def candidate_name(self) -> str:
        """Name of a candidate; differs from that of an image that passed."""
        return f"localhost/vllm-forge-candidate:{self.cell.name}"

    @property
    def patch_files(self) -> Path:
        """A link to the unpacked patch layer, whose key is known only when it was written."""
        return self.work / "patch-layer"

    @property
    def bytecode_files(self) -> Path:
        """A link to the unpacked layer of bytecode, as ``patch_files``."""
        return self.work / "bytecode-layer"

    @property
    def compiled(self) -> Path:
        """What a run inside writes: Python's bytecode."""
        return self.work / "compiled"

    @property
    def unbaked(self) -> ImagePlan:
        """The same without anything compiled: what is compiled inside."""
        return replace(self, options=replace(self.options, prewarm=None))

    @cached_property
    def downloads(self) -> dict[str, str]:
        """Kernel families that FlashInfer downloads for the SKU's presets -> glob of files."""
        names = checks.recorded_downloads(self.project, self.cell)
        return {name: catalogue().family[name].cubins[0].files for name in names}

    @property
    def carries(self) -> bool:
        """Whether kernel archives are part of the image: asked for, and needed."""
        return self.options.kernels and bool(self.downloads)

    def checks_inside(self) -> tuple[ContainerRun, ContainerRun]:
        """The runs of the checks inside the candidate, known before it exists (dry run)."""
        keys, prewarm = [key for group in self.groups for key in group.keys], self.options.prewarm
        epoch = self.cell.base.source_date_epoch
        compiled: list[Path] = []
        if prewarm is not None:
            compiled = [layer_folder(prewarm_key(prewarm, epoch)) / "files", self.bytecode_files]
        keys += [cubins.kernel_key(self)] if self.carries else []
        run = ContainerRun(
            layout=self.candidate,
            name=self.candidate_name,
            lower_dirs=(
                *compiled,
                self.patch_files,
                *(layer_folder(key) / "files" for key in reversed(keys)),
                system_folder(self.system_key) / "root",
            ),
            inputs=self.work / "inputs",
            argv=(*CHECK_ARGV, "image"),
            work=self.work,
            bytecode=None if compiled else cache_root() / "bytecode" / self.python_key,
        )
        other = replace(
            run, argv=(*CHECK_ARGV, "user"), user=any_user(), work=self.work / "any-user"
        )
        return run, other

    def compiling_inside(self) -> ContainerRun:
        """The run that compiles the Python sources of the candidate."""
        python = self.cell.line.python
        roots = (f"/usr/lib/python{python}", f"/{site_packages(python)}")
        argv = (*PYTHON_ALONE, f"/mnt/{bytecode.COMPILER.name}", *roots)
        return replace(self.checks_inside()[0], argv=argv, bytecode=None, output=self.compiled)

    @property
    def dockerfile(self) -> Path:
        """What the system image is built from; its folder is the context."""
        return self.project.root / "docker" / "Dockerfile"

    def build_arguments(self) -> dict[str, str]:
        return {
            "PACKAGES": " ".join(sorted(self.cell.base.packages)),
            "PYTHON": self.cell.line.python,
            "SOURCE_DATE_EPOCH": str(self.cell.base.source_date_epoch),
        }

    def system_parts(self) -> dict[str, Any]:
        """What the system image is a function of, by name."""
        return {
            "format": SYSTEM_FORMAT,
            "base": self.base.key,
            "dockerfile": self.dockerfile.read_text(),
            "driver functions": (self.dockerfile.parent / DRIVER_FUNCTIONS).read_text(),
            "arguments": self.build_arguments(),
            "engine": self.engine.name,
        }

    @property
    def system_key(self) -> str:
        """Hash of everything that the system image is a function of."""
        return hash_of([*self.system_parts().values()], sort_keys=True)

    @property
    def python_key(self) -> str:
        """Hash of the packages of the image: what runs there writes the bytecode of its checks.

        Patches are left out. An image with other ones may read that bytecode, as Python compares
        the size and the time of a source, which is its CRC-32 there.
        """
        return hash_of([self.system_key, *(group.key for group in self.groups)])

    def inputs(self) -> Inputs:
        """All that the image is a function of."""
        cell, prewarm = self.cell, self.options.prewarm
        tree = read_tree_lock(self.project.root / cell.line.series, cell.line_name)
        parts: Inputs = {
            "format": {"format": FORMAT, "config": CONFIG_FORMAT},
            "system": {
                name: hash_of(part) if name in {"dockerfile", "driver functions"} else part
                for name, part in self.system_parts().items()
            },
            "lock": {
                cell.line.lock: self.lock.digest,
                **{wheel.name: f"{wheel.version} {wheel.sha256}" for wheel in self.lock.wheels},
            },
            "layers": {group.name: " ".join(group.keys) for group in self.groups},
            "series": {
                "tree": tree.result,
                **{patch.name: hash_of(patch.path.read_text()) for patch in self.patches},
            },
            "sku": cell.sku.model_dump(mode="json"),
            "line": cell.line.model_dump(mode="json"),
            "base": cell.base.model_dump(mode="json"),
            "debian": {
                package.name: f"{package.version} {package.sha256}"
                for package in (self.base.lock.packages if self.base.lock else ())
            },
            "health": {HEALTH.name: hash_of(HEALTH.read_text())},
            "checks": {path.name: hash_of(path.read_text()) for path in (*SCRIPTS, LAYER_CHECKS)},
            "contract": contract_inputs(self.project, cell.line_name),
        }
        if prewarm is not None:
            parts["prewarm"] = {
                "sha256": prewarm.digest, "place": prewarm.place, "script": hash_of(ENTRYPOINT),
                "bytecode": hash_of([bytecode.FORMAT, bytecode.COMPILER.read_text()]),
            }  # fmt: skip
        if self.options.kernels:
            parts["kernels"] = {"format": cubins.FORMAT}
        return parts

    def up_to_date(self) -> Image | None:
        """The finished image, when it was made from the same inputs and is complete."""
        with suppress(BuildRecordError):
            if why_rebuild(self)[0] == "nothing changed":
                return read_image(self.target)
        return None

    def require_disk(self) -> None:
        """DiskSpaceError unless there is room for what is still to be downloaded and written."""
        fetch = sum(wheel.size for wheel in Wheelhouse().missing(self.lock.wheels))
        write = sum(
            int(sum(wheel.size for wheel in group.wheels) * (1 + UNPACK_RATIO))
            for group in self.groups
            if stored(group.key) is None
        )
        require_disk(cache_root(), fetch + write + SYSTEM_BYTES)


def require_host(target: Path) -> None:
    """Refuse a host where a build would fail halfway.

    EngineSetupError: not x86_64, which wheels, packages and checks are for; CacheError,
    LayoutError: tools read a character of the cache's path, or of ``target``, as syntax;
    FileAccessError: TMPDIR, or the folder of ``target``, cannot be used.
    """
    if found := sorted(set(SYNTAX) & set(str(cache_root()))):
        what = (
            f"the path of the cache has {' '.join(found)}, which container engines read as syntax"
        )
        remedy = "set VLLM_FORGE_CACHE to a folder without these characters"
        raise CacheError(what, where=cache_root(), remedy=remedy)
    if ":" in str(target):
        what = "the path of the image has a colon, after which skopeo expects a tag"
        raise LayoutError(what, where=target, remedy="choose another --output")
    scratch = os.environ.get("TMPDIR")
    if scratch and not (Path(scratch).is_absolute() and os.access(scratch, os.W_OK | os.X_OK)):
        what = "TMPDIR is not the absolute path of a folder that can be written"
        raise FileAccessError(what, where=scratch, remedy="set it to one, or unset it")
    if (machine := platform.machine()) != "x86_64":
        what = f"images are built on x86_64, and this host is {machine}"
        remedy = "build on an x86_64 host, and move the image: docs/operate/build.md"
        raise EngineSetupError(what, remedy=remedy)
    require_writable(next(path for path in target.absolute().parents if os.path.lexists(path)))


def resolve(project: Project, cell: ImageCell, options: BuildOptions, engine: Engine) -> ImagePlan:
    """Read all that an image of this cell is a function of."""
    lock = project.lock(cell.line_name)
    return ImagePlan(
        project=project,
        cell=cell,
        options=options,
        engine=engine,
        lock=lock,
        patches=read_series(project.root / cell.line.series),
        groups=wheel_groups(cell, lock),
        base=base_of(project.root, cell.base, options.base),
    )


def why_rebuild(plan: ImagePlan) -> tuple[str, dict[str, tuple[str, ...]]]:
    """What a build of a plan would do: a state, and what differs from the last build's record.

    ``never built``, ``nothing changed``, ``inputs changed``; for equal inputs ``not in the cache``,
    which has no digest of a build of them; or ``changed``: the image differs from its records, or
    one of its files was touched. Then input that differs -> a sentence per part that changed.
    """
    if (record := read_record(plan.record_path)) is None:
        return "never built", {}
    if changes := compare(record["inputs"], plan.inputs()):
        return "inputs changed", changes
    if (kept := kept_digest(plan.record_path, record["inputs"])) is None:
        return "not in the cache", {}
    try:
        image = read_image(plan.target)
    except LayoutError:
        return "changed", {}
    same = (
        record["digest"] == kept == f"sha256:{image.digest}"
        and record["blobs"] == blob_times(image)
        and has_name(image, plan.name)
    )
    return ("nothing changed" if same else "changed"), {}


def with_packages(plan: ImagePlan) -> ImagePlan:
    """The plan with its Debian packages in the cache: those of its lock, else current ones.

    Raises DistributionNotFoundError, IndexUnreachableError: some cannot be had, and it is LOCKED.
    """
    base, lock = plan.base, plan.base.lock
    if lock is None or base.layout is None or is_whole(base.layout) or is_kept(plan):
        return plan
    try:
        fetch_packages(plan.cell.base, lock)
    except (DistributionNotFoundError, IndexUnreachableError) as error:
        if plan.options.base != ROOTFS:
            raise
        what = "going on with current packages: the digest differs, and no receipt of the locked "
        console.print(f"{error}\n{what}image applies", markup=False)
        return replace(plan, base=base_of(plan.project.root, plan.cell.base, CURRENT))
    return plan
