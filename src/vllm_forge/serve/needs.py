"""What a host must have to serve a preset, from the lock, the artifact's row and the preset's."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from vllm_forge.sources import UNPACK_RATIO

if TYPE_CHECKING:
    from vllm_forge.matrix import Matrix
    from vllm_forge.serve import Serving
    from vllm_forge.sources import Lock

GB = 10**9
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Needs:
    """All sizes in bytes; None where the matrix does not know the artifact's.

    Attributes:
        gpus: GPUs of one replica.
        image_bytes: room for the image in the engine's store, packed and unpacked.
        weights_bytes: the checkpoint's files.
        disk_bytes: both.
        weights_per_gpu_bytes: the files divided by the GPUs; what is not sharded comes on top.
        memory_per_gpu_bytes: as the SKU's vendor states it.
        ram_bytes: one shard file, which the workers map while they read it.
        page_cache_bytes: RAM that holds all files, so that the disk is read once and not once
            per worker.
        shm_bytes: /dev/shm of the container.
        driver: oldest driver of the line's CUDA.
    """

    gpus: int
    image_bytes: int
    weights_bytes: int | None
    disk_bytes: int | None
    weights_per_gpu_bytes: int | None
    memory_per_gpu_bytes: int
    ram_bytes: int | None
    page_cache_bytes: int | None
    shm_bytes: int
    driver: str

    def as_json(self) -> dict[str, int | str]:
        """The fields, "unknown" for None."""
        return {name: "unknown" if value is None else value for name, value in asdict(self).items()}


def needs_of(matrix: Matrix, lock: Lock, item: Serving) -> Needs:
    """What a serving needs; nothing here is measured."""
    line, artifact = item.cell.line, item.artifact
    packed = sum(wheel.size for wheel in lock.wheels) + matrix.base.budget_mb * 10**6
    image = int(packed * (1 + UNPACK_RATIO))
    weights = None if artifact.size_gb is None else artifact.size_gb * GB
    gpus = item.preset.tensor_parallel
    return Needs(
        gpus=gpus,
        image_bytes=image,
        weights_bytes=weights,
        disk_bytes=None if weights is None else image + weights,
        weights_per_gpu_bytes=None if weights is None else weights // gpus,
        memory_per_gpu_bytes=item.cell.sku.memory_gb * GB,
        ram_bytes=(
            None if weights is None or artifact.shards is None else weights // artifact.shards
        ),
        page_cache_bytes=weights,
        shm_bytes=matrix.container.shm_gb * GIB,
        driver=matrix.cuda[line.cuda].driver,
    )
