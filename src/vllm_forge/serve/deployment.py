"""A preset with an artifact on a cell: found by their names, and what a host needs to serve it."""

from dataclasses import asdict, dataclass

from vllm_forge.host import suggestion
from vllm_forge.matrix import Artifact, ImageCell, Matrix, Preset
from vllm_forge.matrix.errors import UnsupportedCellError
from vllm_forge.serve.errors import UnknownArtifactError, UnknownPresetError
from vllm_forge.sources import Lock
from vllm_forge.sources.lock import UNPACK_RATIO

GB = 10**9
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A point of the matrix to serve: an image's cell, a preset and an artifact."""

    matrix: Matrix
    cell: ImageCell
    preset_name: str
    preset: Preset
    artifact_name: str
    artifact: Artifact

    def why_not(self, line: str) -> str | None:
        """Why a line does not serve this; None if it does."""
        return self.artifact.why_not(line, drafting=self.preset.speculative_tokens > 0)

    def require_served(self) -> None:
        """Raise UnsupportedCellError if the cell's line does not serve this."""
        if (reason := self.why_not(self.cell.line_name)) is not None:
            raise UnsupportedCellError(
                f"line {self.cell.line_name} does not serve {self.artifact_name} with preset "
                f"{self.preset_name}: {reason}",
                where=f"matrix.toml, artifact.{self.artifact_name}.unserved",
                remedy="choose another --line, --artifact or --preset",
            )


def presets_of(matrix: Matrix, sku: str) -> dict[str, str]:
    """Short name -> name of each preset of a SKU, in the matrix's order."""
    return {
        name.removeprefix(f"{sku}-"): name
        for name, preset in matrix.preset.items()
        if preset.sku == sku
    }


def find_preset(matrix: Matrix, sku: str, name: str) -> str:
    """The name of a SKU's preset, given by its name or its short name."""
    known = presets_of(matrix, sku)
    if name in known:
        return known[name]
    if name in known.values():
        return name
    what = f"unknown preset {name!r} of {sku}{suggestion(name, known)}"
    raise UnknownPresetError(what, remedy=f"presets of {sku}: {', '.join(known) or 'none'}")


def find_deployment(
    matrix: Matrix, cell: ImageCell, preset: str, artifact: str | None = None
) -> Deployment:
    """The rows of a cell, a preset's name and an artifact's name (default: its first)."""
    preset_name = find_preset(matrix, cell.sku_name, preset)
    served = matrix.preset[preset_name].artifacts
    name = served[0] if artifact is None else artifact
    if name not in served:
        what = f"unknown artifact {name!r}{suggestion(name, matrix.artifact)}"
        if name in matrix.artifact:
            what = f"preset {preset_name} does not serve artifact {name}."
        raise UnknownArtifactError(what, remedy=f"{preset_name} serves: {', '.join(served)}")
    return Deployment(
        matrix=matrix,
        cell=cell,
        preset_name=preset_name,
        preset=matrix.preset[preset_name],
        artifact_name=name,
        artifact=matrix.artifact[name],
    )


@dataclass(frozen=True, kw_only=True)
class Needs:
    """A host's requirements. Sizes in bytes; None if the matrix has no size of the artifact."""

    gpus: int
    image_bytes: int  # in the engine's store, packed and unpacked
    weights_bytes: int | None = None  # the checkpoint's files
    disk_bytes: int | None = None
    weights_per_gpu_bytes: int | None = None  # of the files; what is not sharded comes on top
    memory_per_gpu_bytes: int  # as the SKU's vendor states it
    ram_bytes: int | None = None  # one shard file, which the workers map while they read it
    page_cache_bytes: int | None = None  # for all files: the disk is read once, not once per worker
    shm_bytes: int  # /dev/shm of the container
    driver: str  # oldest one of the line's CUDA

    def as_json(self) -> dict[str, int | str]:
        """The fields, "unknown" for None."""
        return {name: "unknown" if value is None else value for name, value in asdict(self).items()}


def needs_of(lock: Lock, deployment: Deployment) -> Needs:
    """The requirements of a deployment, from the matrix and the lock; none is measured."""
    matrix, artifact = deployment.matrix, deployment.artifact
    gpus = deployment.preset.tensor_parallel
    packed = sum(wheel.size for wheel in lock.wheels) + matrix.base.budget_mb * 10**6
    image = int(packed * (1 + UNPACK_RATIO))
    sizes = {}
    if artifact.size_gb is not None:
        weights = artifact.size_gb * GB
        sizes = {
            "weights_bytes": weights,
            "disk_bytes": image + weights,
            "weights_per_gpu_bytes": weights // gpus,
            "page_cache_bytes": weights,
        }
        if artifact.shards is not None:
            sizes["ram_bytes"] = weights // artifact.shards
    return Needs(
        gpus=gpus,
        image_bytes=image,
        memory_per_gpu_bytes=deployment.cell.sku.memory_gb * GB,
        shm_bytes=matrix.container.shm_gb * GIB,
        driver=matrix.cuda[deployment.cell.line.cuda].driver,
        **sizes,
    )
