"""The site file: what is true of one cluster and of no other. Its shape: site.schema.json."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from vllm_forge.dispatch.errors import SiteFileError
from vllm_forge.errors import problems, suggestion
from vllm_forge.host import read_data
from vllm_forge.matrix import FrozenModel, Matrix
from vllm_forge.matrix.model import Environment, Flag, Integer, Name

NAME = "site.toml"
# Become words of a command, of a script's head, or a volume's source.
Place = Annotated[str, Field(pattern=r"^/[\w.+/-]*[\w.+-]$")]
Word = Annotated[str, Field(pattern=r"^\w[\w.+-]*$")]
Option = Annotated[str, Field(pattern=r"^--[a-z][a-z-]*(=[\w.,:+@%/-]+)?$")]


class Storage(FrozenModel):
    """Folders of the cluster."""

    root: Place = Field(description="shared: this host and all nodes see it at this path")
    scratch: Place = Field(
        default="/tmp",  # noqa: S108 - a node's; what is written there is private to the user
        description="local disk of a node, where an image is staged and unpacked",
    )
    caches: Flag = Field(
        default=False, description="keep what JIT compilers make, below root, for later runs"
    )


class SlurmBuild(FrozenModel):
    """Where images are built; no GPU is needed."""

    partition: Word
    options: tuple[Option, ...] = Field(default=(), description="further ones of sbatch")


class SlurmSku(SlurmBuild):
    """Where Slurm has the GPUs of a SKU."""

    gres: Word = Field(description="type of the GPUs in gres.conf, e.g. b300 of gpu:b300:8")


class Slurm(FrozenModel):
    """What `dispatch --to slurm` needs."""

    account: Word | None = None
    options: tuple[Option, ...] = Field(default=(), description="further ones of sbatch")
    sku: dict[Name, SlurmSku] = Field(min_length=1)
    build: SlurmBuild | None = None


# Names and label values of Kubernetes (apimachinery, util/validation).
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?$")]
LowerName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]


class KubernetesSku(FrozenModel):
    """Nodes with the GPUs of a SKU."""

    product: Label = Field(description="their label nvidia.com/gpu.product (GPU feature discovery)")
    gpus: Integer = Field(ge=1, description="of one node")
    queue: Label | None = Field(default=None, description="a LocalQueue of Kueue")


class Kubernetes(FrozenModel):
    """What `dispatch --to kubernetes` needs; `registry` too."""

    namespace: LowerName = "default"
    claim: LowerName = Field(
        description="PersistentVolumeClaim, ReadWriteMany, with the folder storage.root"
    )
    sku: dict[Name, KubernetesSku] = Field(min_length=1)


class Site(FrozenModel):
    """All of site.toml."""

    schema_version: Literal[1]
    runtime: Name = Field(description="what starts an image on a node: a row of docs/operate")
    program: Place | None = Field(
        default=None, description="in place of the runtime's own, e.g. nvidia-container-runtime"
    )
    registry: Annotated[str, Field(pattern=r"^[\w.-]+(:\d+)?(/[\w.-]+)+$")] | None = Field(
        default=None, description="HOST[:PORT]/NAME that nodes pull images from, by digest"
    )
    storage: Storage
    checkpoints: dict[Name, Place] = Field(
        default_factory=dict, description="artifact -> folder with its weights"
    )
    workloads: Place | None = Field(default=None, description="folder with prompts, for tier soak")
    env: Environment = Field(
        default_factory=dict, description="set in every job, e.g. NCCL_IB_DISABLE"
    )
    minutes: Integer = Field(
        default=20, ge=1, description="that a job may take beyond its work: to stage and unpack"
    )
    slurm: Slurm | None = None
    kubernetes: Kubernetes | None = None


def read_site(path: Path, matrix: Matrix) -> Site:
    """The site file, whose SKUs and artifacts must be rows of the matrix; else SiteFileError."""

    def parse(data: object) -> Site:
        try:
            site = Site.model_validate(data)
        except ValidationError as error:
            raise ValueError("\n  - ".join(["", *problems(error, Site)])) from None
        rows: dict[str, tuple[str, Iterable[str]]] = {}
        rows |= {f"checkpoints.{name}": (name, matrix.artifact) for name in site.checkpoints}
        for table in ("slurm", "kubernetes"):
            cluster = getattr(site, table)
            skus = cluster.sku if cluster else ()
            rows |= {f"{table}.sku.{name}": (name, matrix.sku) for name in skus}
        for row, (name, known) in rows.items():
            if name not in known:
                raise ValueError(f"{row}: not in matrix.toml{suggestion(name, known)}")
        return site

    remedy = "write it as docs/operate/cluster.md shows; site.schema.json has all keys"
    return read_data(path, parse, SiteFileError, what="site file", remedy=remedy)
