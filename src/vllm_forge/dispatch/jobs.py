"""Jobs, described for any scheduler: what runs in which image, with what, and what must come back.

``job_specs`` is a pure function. Renderers (``slurm``) turn its jobs into what a scheduler takes;
``runtimes`` into what starts an image on a node.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_forge.bench.session import read_session
from vllm_forge.bench.turns import result_paths
from vllm_forge.dispatch.site import Site
from vllm_forge.gputest.kit import session_command
from vllm_forge.gputest.launch import ENVIRONMENT, cache_key, suite_command
from vllm_forge.images.prewarm import place_of
from vllm_forge.matrix import FrozenModel, ImageCell
from vllm_forge.matrix.flags import parallel
from vllm_forge.patches import read_tree_lock
from vllm_forge.project import Project
from vllm_forge.receipts.suite import read_suite

BUNDLE, OUTPUT = "/forge", "/output"  # in the image
RUNS, IMAGES, CACHES = "runs", "images", "caches"  # below the site's storage.root


class Volume(FrozenModel):
    """A folder of the cluster's storage, by its path there, and its place in the image."""

    source: str
    target: str
    read_only: bool = True


class JobSpec(FrozenModel):
    """One job: one command in one image on one node."""

    name: str  # unique in its run: <sku>-<line>-<work>
    sku: str
    line: str
    work: str
    cell: str  # name of the image's cell
    image: str  # sha256:<hex> of its manifest
    runtime: str  # what starts it on the node
    reference: str | None  # HOST/NAME@sha256:<hex>, where the site has a registry
    command: tuple[str, ...]  # of the image, in place of its entrypoint
    environment: dict[str, str]
    workdir: str
    gpus: int
    minutes: int  # after which it is ended
    exclusive: bool  # no other job on its node
    shm_gb: int
    volumes: tuple[Volume, ...]  # besides the job's own output folder, at OUTPUT
    artifacts: tuple[str, ...]  # files below OUTPUT that must come back
    session: bool = False  # of a benchmark: records come back, and no receipt is made of them


class Work(FrozenModel):
    """What is run in each image: a tier of the GPU suite, or a session of a benchmark."""

    name: str
    gpus: int
    minutes: int
    artifacts: tuple[str, ...]
    exclusive: bool = False
    weights: bool = False  # it serves full artifacts
    on_request: bool = False  # it runs only where it is named
    session: Path | None = None


@dataclass(frozen=True, kw_only=True)
class CellImage:
    """An image that was built of a cell, and where it keeps what JIT compilers make."""

    cell: ImageCell
    digest: str  # sha256:<hex>
    cache: str
    shm_gb: int


def cell_image(project: Project, cell: ImageCell, digest: str) -> CellImage:
    tree = read_tree_lock(project.root / cell.line.series, cell.line_name).result
    cache = place_of(cache_key(project, cell, tree))
    shm = project.matrix.container.shm_gb
    return CellImage(cell=cell, digest=digest, cache=cache, shm_gb=shm)


def suite_works(project: Project) -> dict[str, Work]:
    """The tiers of the GPU suite by their names."""
    return {
        name: Work(
            name=name, gpus=tier.gpus, minutes=tier.minutes, on_request=tier.on_request,
            artifacts=(f"{name}.json", f"{name}.xml"), weights="preset" in tier.matrix,
        )
        for name, tier in read_suite(project.root).tier.items()
    }  # fmt: skip


def session_work(path: Path, minutes: int) -> Work:
    """A session of a benchmark, on a node of its own; SessionFileError: it cannot be read."""
    session = read_session(path)
    quality = session.quality is not None
    files = result_paths(Path(session.session), session.turns, session.concurrency, quality=quality)
    suffixes = (".jsonl",) if quality else (".json", ".jsonl.gz")  # a record, and its rows
    gpus = max(parallel(row.command).gpus for row in session.arm.values())
    return Work(
        name=session.session, gpus=gpus, minutes=minutes, exclusive=True,
        artifacts=tuple(f"{path.with_suffix(suffix)}" for path in files for suffix in suffixes),
        weights=True, session=path,
    )  # fmt: skip


def job_specs(
    images: Sequence[CellImage], works: Sequence[Work], site: Site, run: str
) -> tuple[JobSpec, ...]:
    """A job for each image and work, in that order; ``run`` names their folder of storage."""
    return tuple(_job(image, work, site, run) for image in images for work in works)


def grouped(
    specs: Sequence[JobSpec], key: Callable[[JobSpec], tuple[object, ...]]
) -> list[list[JobSpec]]:
    """Jobs that a scheduler takes together, in their order."""
    groups: dict[tuple[object, ...], list[JobSpec]] = {}
    for spec in specs:
        groups.setdefault(key(spec), []).append(spec)
    return list(groups.values())


def _job(image: CellImage, work: Work, site: Site, run: str) -> JobSpec:
    cell, storage = image.cell, site.storage
    volumes = [Volume(source=f"{storage.root}/{RUNS}/{run}/{cell.name}", target=BUNDLE)]
    place = image.cache if storage.caches or work.session else None
    if work.session:  # a start that compiles is refused, so its caches are kept
        command = session_command(image.cache, work.name)
    else:
        command = suite_command([f"--tier={work.name}"], place)
    if place is not None:
        # One folder for each work: compilers of two jobs do not write into one.
        source = f"{storage.root}/{CACHES}/{cell.name}/{work.name}"
        volumes.append(Volume(source=source, target=place, read_only=False))
    if work.weights:
        folders = {f"checkpoints/{name}": folder for name, folder in site.checkpoints.items()}
        folders |= {"workloads": site.workloads} if site.workloads else {}
        volumes += [
            Volume(source=folder, target=f"{BUNDLE}/{at}") for at, folder in folders.items()
        ]
    return JobSpec(
        name=f"{cell.sku_name}-{cell.line_name}-{work.name}",
        sku=cell.sku_name,
        line=cell.line_name,
        work=work.name,
        cell=cell.name,
        image=image.digest,
        runtime=site.runtime,
        reference=f"{site.registry}@{image.digest}" if site.registry else None,
        command=tuple(command),
        environment=ENVIRONMENT | site.env,
        workdir=BUNDLE,
        gpus=work.gpus,
        minutes=work.minutes + site.minutes,
        exclusive=work.exclusive,
        shm_gb=image.shm_gb,
        volumes=tuple(volumes),
        artifacts=work.artifacts,
        session=work.session is not None,
    )
