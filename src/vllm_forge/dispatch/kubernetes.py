"""Kubernetes: Indexed Jobs as manifests. They are validated, and were never sent to a cluster.

A pod's template names one image and one number of GPUs, so there is a Job for each image, number
of GPUs and set of volumes; its index is a job of it. A node selector chooses the SKU.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_forge.dispatch import runs
from vllm_forge.dispatch.errors import SITE, ClusterMismatchError, SchedulerError, SiteFileError
from vllm_forge.dispatch.jobs import RUNS, JobSpec, grouped
from vllm_forge.dispatch.results import REFUSED, WAITING, Marker, Outcome, State, judge
from vllm_forge.dispatch.runs import Ask, RunRecord, local_folder
from vllm_forge.dispatch.site import Kubernetes, KubernetesSku, Site
from vllm_forge.host import parse_json, read_plain
from vllm_forge.project import Project
from vllm_forge.serve.render import fill

TEMPLATE = Path(__file__).with_name("job.yaml")
# Of this project's exit codes, those by which the same job would end again: the last digit says
# refused, red or undecided. A fault of the node is tried again.
CODES = [code for code in range(10, 130) if code % 10 in {0, 1, 2}]
# Label and annotation of a pod (kubernetes/api, batch/v1/types.go), since 1.27.
POD_JOB, POD_INDEX = "batch.kubernetes.io/job-name", "batch.kubernetes.io/job-completion-index"


def job_name(run: str, number: int) -> str:
    return f"forge-{run}-{number}"


def groups(specs: Sequence[JobSpec]) -> list[list[JobSpec]]:
    """The jobs of each Job, by index."""
    return grouped(specs, lambda spec: (spec.reference, spec.exclusive, spec.gpus, spec.volumes))


def attempts(specs: Sequence[JobSpec], site: Site, run: str) -> dict[str, str]:
    """Name of a job -> ``NAMESPACE/JOB_INDEX``, as which the cluster knows it."""
    namespace = _cluster(site).namespace
    return {
        spec.name: f"{namespace}/{job_name(run, number)}_{index}"
        for number, group in enumerate(groups(specs))
        for index, spec in enumerate(group)
    }


def manifests(specs: Sequence[JobSpec], site: Site, run: str) -> dict[str, str]:
    """File name -> manifest. SiteFileError: a row is missing; ClusterMismatchError: more GPUs."""
    cluster, made = _cluster(site), {}
    for number, group in enumerate(groups(specs)):
        first, name = group[0], job_name(run, number)
        row = _row(cluster, first)
        values = {
            "name": name, "names": [spec.name for spec in group], "image": first.reference,
            # A node is exclusive to who asks for all its GPUs.
            "gpus": row.gpus if first.exclusive else first.gpus, "shm_gb": first.shm_gb,
            "minutes": max(spec.minutes for spec in group), "volumes": _volumes(first, site),
            "row": row, "site": cluster, "run": run, "codes": CODES,
            "storage": site.storage.root, "folder": f"{site.storage.root}/{RUNS}/{run}",
        }  # fmt: skip
        made[f"{name}.yaml"] = fill(TEMPLATE, **values)
    return made


def _cluster(site: Site) -> Kubernetes:
    if site.kubernetes is None:
        what = "missing [kubernetes]: claim, and the SKUs by their node label"
        remedy = "add the table; see docs/operate/kubernetes.md"
        raise SiteFileError(what, where=SITE, remedy=remedy)
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


def _volumes(spec: JobSpec, site: Site) -> list[dict[str, Any]]:
    volumes = []
    for number, volume in enumerate(spec.volumes):
        inside = volume.source.removeprefix(f"{site.storage.root}/")
        of_claim = inside != volume.source
        volumes.append({
            "name": "storage" if of_claim else f"volume-{number}", "source": volume.source,
            "inside": inside if of_claim else "", "target": volume.target,
            "read_only": volume.read_only,
        })  # fmt: skip
    return volumes


def states(record: RunRecord, ask: Ask) -> dict[str, State]:
    """Attempt -> its state, of all Jobs of a run that the cluster has."""
    namespace = next(iter(record.attempts.values()), "").partition("/")[0]
    argv = ["kubectl", "get", "jobs.batch,pods", f"--namespace={namespace}",
            f"--selector=vllm-forge/run={record.run}", "--output=json"]  # fmt: skip
    text = ask(argv)
    try:
        items = parse_json(text)["items"]
        pods: dict[tuple[str, str], str] = {}
        for pod in sorted(items, key=lambda row: str(row["metadata"]["creationTimestamp"])):
            meta = pod["metadata"]
            if pod["kind"] == "Pod" and POD_INDEX in meta.get("annotations", {}):
                pods[meta["labels"][POD_JOB], meta["annotations"][POD_INDEX]] = _pod_text(pod)
        jobs = {job["metadata"]["name"]: job for job in items if job["kind"] == "Job"}
        found = {}
        for attempt in record.attempts.values():  # whatever number of indexes a Job may have
            name, _, index = attempt.partition("/")[2].rpartition("_")
            if (job := jobs.get(name)) and int(index) < job["spec"]["completions"]:
                found[attempt] = _state(job, int(index), pods)
        return found  # noqa: TRY300
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"invalid output of kubectl, expected a list of Jobs and pods: {error!r}"
        remedy = "run that command, and see what it prints"
        raise SchedulerError(what, where=shlex.join(argv), remedy=remedy) from None


def _state(job: dict[str, Any], index: int, pods: Mapping[tuple[str, str], str]) -> State:
    """Of one index of a Job (kubernetes/api, batch/v1, JobStatus)."""
    status = job.get("status", {})
    pod = pods.get((job["metadata"]["name"], str(index)), "no pod")
    failed = _lists(status.get("failedIndexes", ""), index)
    if _lists(status.get("completedIndexes", ""), index):
        if failed:
            raise ValueError(f"index {index} both completed and failed")
        return State(text="Kubernetes: it succeeded", ended=True, succeeded=True)
    if failed:
        return State(text=f"Kubernetes: it failed; last pod: {pod}", ended=True, succeeded=False)
    true = {row["type"]: row for row in status.get("conditions", ()) if row["status"] == "True"}
    if row := true.get("Failed") or true.get("Complete"):
        text = f"{row['type']}: {row.get('reason', '')} {row.get('message', '')}"
        return State(text=text, ended=True, succeeded=False)
    if "Suspended" in true:
        return State(text="the Job is suspended, by Kueue or by hand", ended=False)
    return State(text=pod, ended=False)


def _lists(text: str, index: int) -> bool:
    """Whether "1,3-5" has an index."""
    pairs = (part.partition("-")[::2] for part in text.split(",") if part)
    return any(int(first) <= index <= int(last or first) for first, last in pairs)


def _pod_text(pod: dict[str, Any]) -> str:
    """Why a pod waits or failed; else its phase."""
    status = pod["status"]
    rows = [status] if "reason" in status else []
    for container in status.get("containerStatuses", ()):
        state = container.get("state", {})
        rows += [state[kind] for kind in ("waiting", "terminated") if kind in state]
    rows += [row for row in status.get("conditions", ()) if row["type"] == "PodScheduled"]
    for row in rows:
        if reason := row.get("reason"):
            code = f", exit code {row['exitCode']}" if "exitCode" in row else ""
            return f"{reason}{code} {row.get('message', '')}".strip()
    return str(status["phase"])


def outcomes(project: Project, record: RunRecord, ask: Ask) -> list[Outcome]:
    """The verdict on each job: the cluster says which have ended, markers of pods say how."""
    known = states(record, ask)  # before markers are read: what ended since only waits
    for spec in record.specs:
        attempt = record.attempts.get(spec.name, "")
        seen = local_folder(project, record, spec.name).with_name(f"{spec.name}.seen")
        if attempt in known:
            seen.touch()
        elif seen.exists() or (record.folder / "results" / spec.name).exists():
            known[attempt] = State(text="its Job was deleted", ended=True)
        else:
            text = f"run: kubectl apply -f {record.folder / 'manifests'}"
            known[attempt] = State(text=text, ended=False)
    return runs.outcomes(project, record, known, _judge)


def _judge(spec: JobSpec, _: str, results: Path, state: State, local: Path) -> Outcome:
    """The verdict on an index: that of the pod by which it ended.

    Others that left a marker met a fault of the node, or were evicted; the index was started again.
    """
    if not state.ended:
        return Outcome(name=spec.name, verdict=WAITING, why=state.text)
    markers = sorted(results.glob("*.done"), key=lambda path: path.lstat().st_mtime_ns)
    exits = {path.stem: _exit(path) for path in markers}
    green = [name for name, code in exits.items() if code == 0]
    other = [name for name, code in exits.items() if code in CODES]
    chosen = {True: green, False: other[-1:], None: [*green, *other]}[state.succeeded]
    if len(chosen) > 1 or (green and state.succeeded is False):
        why = f"pods of it ended in different ways: {', '.join(exits)} ({state.text})"
        return Outcome(name=spec.name, verdict=REFUSED, why=why)
    left = [path.name for path in results.glob("*") if path.is_dir() and path.name not in exits]
    faults = [] if state.succeeded else [*exits]
    attempt = (chosen or faults or left or [""])[-1]
    return judge(spec, attempt, results, state, local)


def _exit(marker: Path) -> int | None:
    """The exit code that a marker says; None: a fault. One that cannot be read is not left out."""
    try:
        return Marker.model_validate(parse_json(read_plain(marker))).exit
    except (OSError, ValueError):
        return 0  # `judge` says what is wrong with it
