"""One image: from a cell to a checked OCI layout.

The steps are the same for a real run and for a dry run; the runner decides whether they are
done or printed. What is finished is kept under a key of its inputs, so a killed build goes on
where it was, and a changed patch rebuilds one small layer.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.errors import LayoutError
from vllm_forge.host import atomic_path, cache_root, exclusive, report, require_disk
from vllm_forge.images.base import make_rootfs, pinned_image
from vllm_forge.images.checks import (
    INSIDE,
    TRIAL_ARGV,
    LayerShare,
    check_layout,
    check_sizes,
    judge,
    write_inputs,
)
from vllm_forge.images.content import (
    FORMAT,
    VLLM,
    WheelGroup,
    group_entries,
    labels,
    patch_entries,
    patch_key,
    stack_entry,
    stack_record,
    wheel_groups,
)
from vllm_forge.images.engine import Trial
from vllm_forge.images.layout import Image, ImageLayer, read_image, write_image
from vllm_forge.images.store import StoredLayer, stored, write_layer
from vllm_forge.images.system import host_secrets, load_system, make_system, system_key
from vllm_forge.patches import build_wheel, check_line, read_series, read_tree_lock
from vllm_forge.patches.wheel import PatchedWheel, python_blobs
from vllm_forge.sources import Lock, SourceRepo, Wheelhouse, read_lock

if TYPE_CHECKING:
    from vllm_forge.host import Runner
    from vllm_forge.images.base import BaseRef
    from vllm_forge.images.engine import Engine
    from vllm_forge.matrix import ImageCell
    from vllm_forge.patches import Applied

WORKERS = 2
# A wheel's files take this much more room unpacked than packed (2.1 for the 0.26 lock).
UNPACK_RATIO = 2.5
SYSTEM_BYTES = 3 * (1 << 30)  # rootfs tar, engine's copies, exported folder


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What the command line adds to a cell.

    Attributes:
        output: folder for the layouts.
        base_image: a registry image pinned by digest; None for our own rootfs.
        refresh_base: make rootfs and system again, for the distribution's updates.
    """

    output: Path
    base_image: str | None = None
    refresh_base: bool = False


@dataclass(frozen=True, kw_only=True)
class Built:
    """A finished image and whether anything had to be done for it."""

    image: Image
    fresh: bool


class Build:
    """One build of one cell."""

    def __init__(
        self, cell: ImageCell, options: BuildOptions, engine: Engine, runner: Runner
    ) -> None:
        self.cell = cell
        self.options = options
        self.engine = engine
        self.runner = runner
        self.lock: Lock = read_lock(cell.root, cell.line_name, cell.line, cell.base)
        self.patches = read_series(cell.root / cell.line.series)
        self.groups: tuple[WheelGroup, ...] = wheel_groups(cell, self.lock)
        self.wheelhouse = Wheelhouse()
        self.repo = SourceRepo()
        self.work = cache_root() / "work" / cell.name
        self.target = options.output / cell.name
        self.record_path = options.output / f"{cell.name}.json"

    # --- what would be built -----------------------------------------------------------------

    def inputs(self, base: BaseRef) -> dict[str, str]:
        """Hash per input of this image; ``why-rebuild`` compares them."""
        tree = read_tree_lock(self.cell.root / self.cell.line.series, self.cell.line_name)
        parts: dict[str, Any] = {
            "format": FORMAT,
            "system": system_key(self.cell, base, self.engine),
            "lock": self.lock.digest,
            "layers": [group.key for group in self.groups],
            "series": [tree.result, *(patch.path.read_text() for patch in self.patches)],
            "sku": self.cell.sku.model_dump(),
            "line": self.cell.line.model_dump(),
            "checks": INSIDE.read_text(),
        }
        return {
            name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()
            for name, part in parts.items()
        }

    def up_to_date(self, inputs: dict[str, str]) -> Image | None:
        """The finished image, when it was made from the same inputs and is complete."""
        try:
            record = json.loads(self.record_path.read_text())
            image = read_image(self.target)
        except (OSError, ValueError, LayoutError):
            return None
        same = record["inputs"] == inputs and record["digest"] == f"sha256:{image.digest}"
        return image if same else None

    # --- the steps -----------------------------------------------------------------------------

    def run(self, *, dry_run: bool = False) -> Built | None:
        """Build, check, and give the image its name.

        Returns:
            The image; None for a dry run.

        Raises:
            BusyError: this cell is being built by another process.
            DiskSpaceError: before anything is written.
            ForgeError: as each step says.
        """
        if dry_run:
            self.steps()
            return None
        with exclusive(f"build-{self.cell.name}", wait=False):
            base = self.base_key()
            if not self.options.refresh_base and (known := self.up_to_date(self.inputs(base))):
                return Built(image=known, fresh=False)
            self.require_disk()
            self.steps()
            return Built(image=read_image(self.target), fresh=True)

    def base_key(self) -> BaseRef:
        """The base without making it."""
        from vllm_forge.images.base import BaseRef, rootfs_key  # noqa: PLC0415

        if self.options.base_image is not None:
            return pinned_image(self.options.base_image)
        key = rootfs_key(self.cell.base)
        return BaseRef(key=key, layout=cache_root() / "rootfs" / key)

    def require_disk(self) -> None:
        """Room for what is still to be downloaded and written."""
        fetch = self.wheelhouse.bytes_to_fetch(self.lock.wheels)
        write = sum(
            int(sum(wheel.size for wheel in group.wheels) * (1 + UNPACK_RATIO))
            for group in self.groups
            if stored(group.key) is None
        )
        require_disk({cache_root(): fetch + write + SYSTEM_BYTES, self.options.output: 0})

    def steps(self) -> None:
        """All steps, in order; the system image is made beside the wheel layers."""
        runner = self.runner
        started = time.monotonic()
        self.engine.check(runner)
        with ThreadPoolExecutor(1) as beside:
            system = beside.submit(self.make_system)
            runner.act(
                f"fetch {len(self.lock.wheels)} wheels of {self.cell.line.lock} and write "
                f"{len(self.groups)} layers",
                self.make_layers,
            )
            key = system.result()
        runner.act(
            "apply the series, write the patched wheel and its layer",
            lambda: self.make_patch_layer(key),
        )
        runner.act(f"assemble the image in {self.work}", self.assemble)
        trial = self.trial()
        with report("check the image inside"):
            output = self.engine.try_image(runner, trial)
        runner.act("read the verdicts; check layout and size budget", lambda: self.accept(output))
        runner.act(
            f"give the image its name: {self.target}",
            lambda: self.publish(time.monotonic() - started),
        )

    def make_system(self) -> str:
        """Rootfs and docker/Dockerfile, by the engine."""
        refresh = self.options.refresh_base
        if self.options.base_image is not None:
            base = pinned_image(self.options.base_image)
        else:
            base = make_rootfs(self.runner, self.cell.base, self.work, refresh=refresh)
        return make_system(
            self.runner, self.engine, self.cell, base, self.work,
            secrets=host_secrets(), refresh=refresh,
        )  # fmt: skip

    def make_layers(self) -> None:
        """Download and write the wheel layers; one is written while the next one downloads."""
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
            jobs: list[Future[None]] = []
            for group in self.groups:
                self.wheelhouse.fetch(group.wheels)
                if stored(group.key) is None:
                    jobs.append(
                        pool.submit(
                            write_group, group, self.cell.line.python,
                            self.cell.base.source_date_epoch,
                        )
                    )  # fmt: skip
            for job in jobs:
                job.result()

    def make_patch_layer(self, system: str) -> None:
        """The last, small layer: changed files, metadata, stack.json."""
        self.system = load_system(system)
        self.applied: Applied = check_line(
            self.cell.root, self.cell.line_name, self.cell.line, self.repo
        )
        self.wheel = patched_wheel(self.cell, self.lock, self.applied, self.repo, self.wheelhouse)
        base = {"system": self.system.digest, "engine": self.engine.name}
        self.stack = stack_record(
            cell=self.cell,
            lock=self.lock,
            patches=self.patches,
            wheel=self.wheel,
            base=base,
            debian=self.system.debian,
        )
        published = self.lock.find(VLLM)
        entries = patch_entries(
            self.wheelhouse.path(published), self.wheel.path, self.cell.line.python
        )
        entries = sorted([*entries, stack_entry(self.stack)], key=lambda entry: entry.path)
        key = patch_key(self.cell, published, self.stack)
        self.patch_layer = write_layer(key, entries, self.cell.base.source_date_epoch)

    def assemble(self) -> None:
        """Write the candidate layout."""
        epoch = self.cell.base.source_date_epoch
        created = datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.labels = labels(self.stack, created)
        env = [*self.system.config["Env"]]
        env += [f"{name}={value}" for name, value in sorted(self.cell.sku.env.items())]
        self.layers = [
            *self.system.layers,
            *(
                ImageLayer(
                    blob=layer.blob,
                    created_by=f"vllm-forge: {group.name} wheels of {self.cell.line.lock}",
                )
                for group, layer in zip(self.groups, self.wheel_layers(), strict=True)
            ),
            ImageLayer(
                blob=self.patch_layer.blob, created_by=f"vllm-forge: {self.cell.line.series}"
            ),
        ]
        self.candidate = write_image(
            self.work / "candidate",
            layers=self.layers,
            config=self.system.config | {"Env": env, "Labels": self.labels},
            epoch=epoch,
            ref=self.wheel.version.replace("+", "-") + f"-{self.cell.sku_name}",
        )
        write_inputs(self.work / "inputs", self.expectation())

    def wheel_layers(self) -> list[StoredLayer]:
        """The layers of the lock, all of them written by now."""
        return [write_layer(group.key, [], 0) for group in self.groups]

    def expectation(self) -> dict[str, Any]:
        """What inside.py must find."""
        packages = {item.name: item.version for item in self.lock.wheels}
        packages[VLLM] = self.wheel.version
        return {
            "packages": packages,
            "stack": self.stack,
            "tree": self.applied.result,
            "blobs": {
                path: blob
                for path, blob in python_blobs(self.repo, self.applied.result).items()
                if path != "vllm/_version.py"
            },
            "changed_files": {file.path: file.after for file in self.wheel.changed},
            "compiler": "nvidia-cuda-nvcc" in packages,
            "device": self.cell.sku.device,
            "unimportable": list(self.cell.line.unimportable),
        }

    def trial(self) -> Trial:
        """The checks inside, as a command; known before there is an image (dry run)."""
        candidate = getattr(self, "candidate", None) or Image(
            path=self.work / "candidate", digest="", config={"config": {}}, manifest={}
        )
        lowers: list[Path] = []
        if hasattr(self, "patch_layer"):
            lowers = [
                self.patch_layer.files,
                *(item.files for item in reversed(self.wheel_layers())),
            ]
            if self.system.root is not None:
                lowers.append(self.system.root)
        else:
            lowers = [Path()] * (len(self.groups) + 2)
        return Trial(
            image=candidate,
            lowers=tuple(lowers),
            inputs=self.work / "inputs",
            argv=TRIAL_ARGV,
            work=self.work,
        )

    def accept(self, output: str) -> None:
        """All verdicts, or no image."""
        self.verdicts = judge(output)
        check_layout(self.candidate, self.labels)
        self.shares = [
            LayerShare(name=layer.created_by.removeprefix("vllm-forge: "), size=layer.blob.size)
            for layer in self.layers
        ]
        check_sizes(self.shares, self.cell.line.budget_mb, self.cell.base.budget_mb)

    def publish(self, seconds: float) -> None:
        """Rename the candidate to its final name, then write the record beside it."""
        self.record_path.unlink(missing_ok=True)
        with atomic_path(self.target) as aside:
            self.candidate.path.rename(aside)
        with atomic_path(self.record_path) as aside:
            aside.write_text(
                json.dumps(
                    {
                        "digest": f"sha256:{self.candidate.digest}",
                        "size": self.candidate.size,
                        "seconds": round(seconds, 1),
                        "inputs": self.inputs(self.base_key()),
                        "stack": self.stack,
                        "layers": [asdict(share) for share in self.shares],
                        "checks": self.verdicts,
                    },
                    indent=1,
                    sort_keys=True,
                )
                + "\n"
            )


def write_group(group: WheelGroup, python: str, epoch: int) -> None:
    """Worker process: verify a layer's wheels and write the layer."""
    wheelhouse = Wheelhouse()
    paths = [wheelhouse.verify(wheel) for wheel in group.wheels]
    write_layer(group.key, group_entries(group.name, paths, python), epoch)


def patched_wheel(
    cell: ImageCell, lock: Lock, applied: Applied, repo: SourceRepo, wheelhouse: Wheelhouse
) -> PatchedWheel:
    """The line's one wheel, in the cache."""
    published = lock.find(VLLM)
    folder = cache_root() / "patched" / f"{published.sha256}-{applied.result}"
    path = wheelhouse.verify(published)
    return build_wheel(repo, applied, path, cell.line.vllm, folder)
