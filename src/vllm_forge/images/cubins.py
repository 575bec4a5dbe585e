"""FlashInfer's kernel archives as a layer, at the place where FlashInfer looks before it downloads.

FlashInfer writes there too: links for its compiler, and archives that the image does not carry. So
what it would make there is a link to the /cache volume.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from vllm_forge.host import hash_of
from vllm_forge.images.layer import LayerBlob, ZstdLayerWriter
from vllm_forge.images.store import StoredLayer, keep_layer, make_folders
from vllm_forge.sources import verified
from vllm_forge.sources.cubins import read_archives
from vllm_forge.sources.errors import WheelError

if TYPE_CHECKING:
    from vllm_forge.images.plan import ImagePlan

FORMAT = 1
FLASHINFER = "flashinfer-python"
SITE = "opt/vllm-forge/kernels"  # what is below has the paths of the wheel flashinfer-cubin
PLACE = f"{SITE}/flashinfer_cubin/cubins"
ENVIRONMENT = {"FLASHINFER_CUBIN_DIR": f"/{PLACE}"}


def kernel_key(plan: ImagePlan) -> str:
    """Hash of all that the layer of the plan's archives is a function of."""
    epoch, wheel = plan.cell.base.source_date_epoch, plan.lock.find(FLASHINFER)
    return hash_of([FORMAT, epoch, wheel.sha256, plan.downloads])


def kernel_layer(plan: ImagePlan) -> tuple[StoredLayer, dict[str, str]]:
    """The layer of archives that presets need; name -> SHA-256 of their lists; or WheelError."""
    known, carried = read_archives(wheel := plan.lock.find(FLASHINFER)), []
    for family, glob in plan.downloads.items():
        place = f"{SITE}/{glob.rpartition('/')[0]}"
        rows = [r for r in known if r.sha256 and PurePosixPath(PLACE, r.path).match(place)]
        if not rows:
            raise WheelError(f"{wheel.filename} pins no archive with the files of {family}")
        carried += rows
    tops, others = ({row.path.partition("/")[0] for row in rows} for rows in (carried, known))
    others = {"flashinfer", *others} - tops

    def write(folder: Path, _: object) -> tuple[LayerBlob, dict[str, Any]]:
        files = {
            f"{PLACE}/{row.path}/{path}": (row.folder / path, sha256)
            for row in carried
            for path, sha256 in row.fetch().items()
        }
        with ZstdLayerWriter(folder, plan.cell.base.source_date_epoch) as layer:
            for parent in make_folders(folder / "files", files):
                layer.directory(parent)
            for name, (path, sha256) in sorted(files.items()):
                layer.data(name, verified(path, sha256).read_bytes())
            for name in sorted(others):
                layer.symlink(f"{PLACE}/{name}", "/cache")
            return layer.close(), {}

    return keep_layer(kernel_key(plan), write), {row.name: row.sha256 for row in carried}
