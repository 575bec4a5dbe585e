"""What would be built: a cell's inputs resolved, without network, engine or a write."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.host import cache_root, require_disk
from vllm_forge.images.base import BaseRef, pinned_image, rootfs_key
from vllm_forge.images.checks import SCRIPTS
from vllm_forge.images.content import CONFIG_FORMAT, FORMAT, WheelGroup, wheel_groups
from vllm_forge.images.contract import contract_inputs
from vllm_forge.images.errors import LayoutError
from vllm_forge.images.layout import Image, blob_times, read_image
from vllm_forge.images.prewarm import ENTRYPOINT
from vllm_forge.images.store import stored
from vllm_forge.images.system import system_key, system_parts
from vllm_forge.patches import Patch, read_series, read_tree_lock
from vllm_forge.sources import UNPACK_RATIO, Lock, Wheelhouse, read_lock

if TYPE_CHECKING:
    from vllm_forge.images.engine import Engine
    from vllm_forge.images.prewarm import Prewarm
    from vllm_forge.matrix import ImageCell

SYSTEM_BYTES = 3 * (1 << 30)  # rootfs tar, engine's copies, exported folder


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What the command line adds to a cell.

    Attributes:
        output: folder for the layouts.
        base_image: a registry image pinned by digest; None for our own rootfs.
        refresh_base: make rootfs and system again, for the distribution's updates.
        prewarm: kernels that JIT compilers made before.
    """

    output: Path
    base_image: str | None = None
    refresh_base: bool = False
    prewarm: Prewarm | None = None


@dataclass(frozen=True, kw_only=True)
class ImagePlan:
    """A cell with its lock, series, layers and places.

    Attributes:
        target: the layout's final name.
        record_path: the JSON record beside it.
        work: folder of the cache for what is not finished.
    """

    cell: ImageCell
    options: BuildOptions
    engine: Engine
    lock: Lock
    patches: tuple[Patch, ...]
    groups: tuple[WheelGroup, ...]
    base: BaseRef

    @property
    def target(self) -> Path:
        """The layout's final name."""
        return self.options.output / self.cell.name

    @property
    def name(self) -> str:
        """Name and tag of the image, e.g. ``localhost/vllm-0.26.0-b300:0.26``."""
        return f"localhost/{self.cell.name}:{self.cell.line_name}"

    @property
    def record_path(self) -> Path:
        """The record of the build, beside the layout."""
        return self.options.output / f"{self.cell.name}.json"

    @property
    def work(self) -> Path:
        """Folder of the cache for what is not finished."""
        return cache_root() / "work" / self.cell.name

    def inputs(self) -> dict[str, str]:
        """Hash per input of the image; a build with equal ones has nothing to do."""
        return {name: _hash(part) for name, part in self._parts().items()}

    def details(self) -> dict[str, dict[str, Any]]:
        """What each input is made of, for ``why-rebuild``: names with a value or a hash."""
        cell = self.cell
        tree = read_tree_lock(cell.root / cell.line.series, cell.line_name)
        system = system_parts(cell, self.base, self.engine)
        return {
            "format": {"format": FORMAT, "config": CONFIG_FORMAT},
            "system": {**system, "dockerfile": _hash(system["dockerfile"])},
            "lock": {wheel.name: f"{wheel.version} {wheel.sha256}" for wheel in self.lock.wheels},
            "layers": {group.name: group.key for group in self.groups},
            "series": {
                "tree": tree.result,
                **{patch.name: _hash(patch.path.read_text()) for patch in self.patches},
            },
            "sku": cell.sku.model_dump(mode="json"),
            "line": cell.line.model_dump(mode="json"),
            "base": cell.base.model_dump(mode="json"),
            "checks": {path.name: _hash(path.read_text()) for path in SCRIPTS},
            "contract": contract_inputs(cell),
            **self._prewarm(),
        }

    def _parts(self) -> dict[str, Any]:
        tree = read_tree_lock(self.cell.root / self.cell.line.series, self.cell.line_name)
        return {
            "format": [FORMAT, CONFIG_FORMAT],
            "system": system_key(self.cell, self.base, self.engine),
            "lock": self.lock.digest,
            "layers": [[group.key, group.slim_key] for group in self.groups],
            "series": [tree.result, *(patch.path.read_text() for patch in self.patches)],
            "sku": self.cell.sku.model_dump(),
            "line": self.cell.line.model_dump(),
            "base": self.cell.base.model_dump(),
            "checks": [path.read_text() for path in SCRIPTS],
            "contract": contract_inputs(self.cell),
            **self._prewarm(),
        }

    def _prewarm(self) -> dict[str, Any]:
        found = self.options.prewarm
        if found is None:
            return {}
        return {
            "prewarm": {"sha256": found.digest, "place": found.place, "script": _hash(ENTRYPOINT)}
        }

    def up_to_date(self) -> Image | None:
        """The finished image, when it was made from the same inputs and is complete."""
        try:
            record = json.loads(self.record_path.read_text())
            image = read_image(self.target)
        except (OSError, ValueError, LayoutError):
            return None
        same = record["inputs"] == self.inputs() and record["digest"] == f"sha256:{image.digest}"
        touched = record.get("blobs") != blob_times(image)
        return image if same and not touched else None

    def require_disk(self) -> None:
        """Room for what is still to be downloaded and written.

        Raises:
            DiskSpaceError: there is less.
        """
        fetch = Wheelhouse().bytes_to_fetch(self.lock.wheels)
        write = sum(
            int(sum(wheel.size for wheel in group.wheels) * (1 + UNPACK_RATIO))
            for group in self.groups
            if stored(group.key) is None
        )
        require_disk({cache_root(): fetch + write + SYSTEM_BYTES})


def _hash(part: object) -> str:
    return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()


def resolve(cell: ImageCell, options: BuildOptions, engine: Engine) -> ImagePlan:
    """Read everything that an image of this cell is a function of.

    Raises:
        LockFileError, BaseImageError, and what read_series raises.
    """
    if options.base_image is not None:
        base = pinned_image(options.base_image)
    else:
        key = rootfs_key(cell.base)
        base = BaseRef(key=key, layout=cache_root() / "rootfs" / key)
    lock = read_lock(cell.root, cell.line_name, cell.line, cell.base)
    return ImagePlan(
        cell=cell,
        options=options,
        engine=engine,
        lock=lock,
        patches=read_series(cell.root / cell.line.series),
        groups=wheel_groups(cell, lock),
        base=base,
    )
