"""Kubernetes: Indexed Jobs as manifests. They are validated, and were never sent to a cluster.

A pod's template names one image and one number of GPUs, so there is a Job for each image, number
of GPUs and set of volumes; its index is a job of it. A node selector chooses the SKU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_forge.dispatch.errors import SITE, ClusterMismatchError, SiteFileError
from vllm_forge.dispatch.jobs import RUNS, JobSpec
from vllm_forge.dispatch.results import REFUSED, Marker, Outcome, judge
from vllm_forge.dispatch.runs import RunRecord, local_folder
from vllm_forge.dispatch.site import Kubernetes, KubernetesSku, Site
from vllm_forge.host import parse_json, read_plain
from vllm_forge.project import Project
from vllm_forge.serve.render import fill

TEMPLATE = Path(__file__).with_name("job.yaml")
# Of this project's exit codes, those by which the same job would end again: the last digit says
# refused, red or undecided. A fault of the node is tried again.
CODES = [code for code in range(10, 130) if code % 10 in {0, 1, 2}]


@dataclass(frozen=True, kw_only=True)
class IndexedJob:
    """What a manifest is filled with; ``names``: of jobs, by index."""

    name: str
    image: str
    names: tuple[str, ...]
    gpus: int
    minutes: int
    shm_gb: int
    volumes: tuple[dict[str, Any], ...]


def manifests(specs: Sequence[JobSpec], site: Site, run: str) -> dict[str, str]:
    """File name -> manifest. SiteFileError: a row is missing; ClusterMismatchError: more GPUs."""
    cluster = _cluster(site)
    groups: dict[tuple[object, ...], list[JobSpec]] = {}
    for spec in specs:
        if spec.reference is None:
            what = "missing registry: Kubernetes pulls images from one"
            remedy = 'add registry = "HOST/NAME", and push the image there'
            raise SiteFileError(what, where=SITE, remedy=remedy)
        groups.setdefault((spec.reference, spec.exclusive, spec.gpus, spec.volumes), []).append(
            spec
        )
    made = {}
    for number, group in enumerate(groups.values()):
        row = _row(cluster, group[0])
        job = _job(f"forge-{run}-{number}", group, row, site)
        values = {
            "job": job, "row": row, "site": cluster, "run": run, "codes": CODES,
            "storage": site.storage.root, "folder": f"{site.storage.root}/{RUNS}/{run}",
        }  # fmt: skip
        made[f"{job.name}.yaml"] = fill(TEMPLATE, **values)
    return made


def _cluster(site: Site) -> Kubernetes:
    if site.kubernetes is None:
        what = "missing [kubernetes]: claim, and the SKUs by their node label"
        raise SiteFileError(
            what, where=SITE, remedy="add the table; see docs/operate/kubernetes.md"
        )
    return site.kubernetes


def _row(cluster: Kubernetes, spec: JobSpec) -> KubernetesSku:
    if (row := cluster.sku.get(spec.sku)) is None:
        what = f"missing kubernetes.sku.{spec.sku}: product and gpus of this SKU"
        raise SiteFileError(what, where=SITE, remedy="add the row, or leave the SKU out of --skus")
    if spec.gpus > row.gpus:
        what = f"kubernetes.sku.{spec.sku}.gpus: {spec.name} needs {spec.gpus} GPUs of one node"
        what = f"{what}; they have {row.gpus}"
        raise ClusterMismatchError(what, remedy="leave that work out of --tiers")
    return row


def _job(name: str, group: Sequence[JobSpec], row: KubernetesSku, site: Site) -> IndexedJob:
    """A node is exclusive to who asks for all its GPUs."""
    first = group[0]
    volumes = []
    for number, volume in enumerate(first.volumes):
        inside = volume.source.removeprefix(f"{site.storage.root}/")
        of_claim = inside != volume.source
        volumes.append({
            "name": "storage" if of_claim else f"volume-{number}", "source": volume.source,
            "inside": inside if of_claim else "", "target": volume.target,
            "read_only": volume.read_only,
        })  # fmt: skip
    return IndexedJob(
        name=name,
        image=str(first.reference),
        names=tuple(spec.name for spec in group),
        gpus=row.gpus if first.exclusive else first.gpus,
        minutes=max(spec.minutes for spec in group),
        shm_gb=first.shm_gb,
        volumes=tuple(volumes),
    )


def outcomes(project: Project, record: RunRecord) -> list[Outcome]:
    """The verdict on each job, by the markers that pods have left; no cluster is asked.

    A pod that met a fault does not count: its index is started again. Two that ended without one
    are refused, as there is no telling which of them counts.
    """
    rows = []
    for spec in record.specs:
        results = record.folder / "results" / spec.name
        ended = [path.stem for path in sorted(results.glob("*.done")) if not _is_fault(path)]
        if len(ended) > 1:
            why = f"two pods of it ended: {', '.join(ended)}"
            rows.append(Outcome(name=spec.name, verdict=REFUSED, why=why))
            continue
        (attempt,) = ended or [""]
        state = None if ended else f"see: kubectl get pods -l vllm-forge/run={record.run}"
        rows.append(judge(spec, attempt, results, state, local_folder(project, record, spec.name)))
    return rows


def _is_fault(marker: Path) -> bool:
    try:
        return bool(Marker.model_validate(parse_json(read_plain(marker))).fault)
    except ValueError:
        return False  # `judge` says what is wrong with it
