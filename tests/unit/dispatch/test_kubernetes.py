"""Manifests of Indexed Jobs: what an API server would refuse is found; none was sent to one."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.support.kubernetes import Api, condition, container, rule_problems, schema_problems
from tests.support.site import SITE, make_site
from vllm_forge.dispatch.errors import ClusterMismatchError, SchedulerError, SiteFileError
from vllm_forge.dispatch.jobs import cell_image, job_specs, suite_works
from vllm_forge.dispatch.kubernetes import CODES, attempts, manifests, outcomes
from vllm_forge.dispatch.runs import RunRecord, asking, local_folder
from vllm_forge.dispatch.runtimes import POD as POD_RUNTIME
from vllm_forge.dispatch.runtimes import find_runtime, node_job
from vllm_forge.gputest.errors import SuiteRedError, SuiteUndecidedError
from vllm_forge.project import Project

if TYPE_CHECKING:
    from vllm_forge.dispatch.jobs import JobSpec
    from vllm_forge.dispatch.site import Site

REPO = Path(__file__).parents[3]
DIGESTS = {"0.26": "sha256:" + "d1" * 32, "0.33": "sha256:" + "d2" * 32}
RUN = "20261130-124012-ab12"
CLUSTER = """
[kubernetes]
namespace = "lab"
claim = "forge"

[kubernetes.sku.b300]
product = "NVIDIA-B300-SXM6-AC"
gpus = 8
queue = "gpu-b300"

[kubernetes.sku.rtxpro6000]
product = "NVIDIA-RTX-PRO-6000-Blackwell-Server-Edition"
gpus = 1
"""


def cluster(folder: Path, old: str = "[slurm]", new: str = f"{CLUSTER}[slurm]") -> Site:
    return make_site(folder, Project(REPO), old, new)


def specs(site: Site, *names: str, skus: tuple[str, ...] = ("b300",)) -> list[JobSpec]:
    project = Project(REPO)
    images = [
        cell_image(project, project.cell(sku, line), digest)
        for sku in skus
        for line, digest in DIGESTS.items()
    ]
    works = [suite_works(project)[name] for name in names]
    return list(job_specs(images, works, site, RUN))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Manifests of two lines and three tiers of a SKU."""
    site = cluster(tmp_path_factory.mktemp("site"))
    made = manifests(specs(site, "kernel", "server", "tp2"), site, RUN)
    return {name: yaml.safe_load(text) for name, text in made.items()}


def test_jobs_of_an_image_are_indexes_of_one_job(jobs: dict[str, dict[str, Any]]) -> None:
    """An image and a number of GPUs are those of a pod's template, which a Job has once."""
    rows = []
    for name, job in jobs.items():
        assert name == f"{job['metadata']['name']}.yaml"
        (container,) = job["spec"]["template"]["spec"]["containers"]
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        rows.append((container["image"][-64:], gpus, container["command"][4:]))
    d1, d2 = (digest[-64:] for digest in DIGESTS.values())
    assert rows == [
        (d1, 1, ["b300-0.26-kernel", "b300-0.26-server"]), (d1, 2, ["b300-0.26-tp2"]),
        (d2, 1, ["b300-0.33-kernel", "b300-0.33-server"]), (d2, 2, ["b300-0.33-tp2"]),
    ]  # fmt: skip


def test_manifests_are_valid(jobs: dict[str, dict[str, Any]]) -> None:
    assert len(jobs) == 4
    for job in jobs.values():
        assert schema_problems(job) + rule_problems(job) == []
    job = next(iter(jobs.values()))
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu-b300"
    pod = job["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-B300-SXM6-AC"}
    mounts = {mount["mountPath"]: mount for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts["/forge"]["subPath"] == f"runs/{RUN}/vllm-0.26.0-b300"
    assert mounts["/forge"]["readOnly"] is True
    assert mounts[f"/shared/forge/runs/{RUN}"]["subPath"] == f"runs/{RUN}"


def test_verdicts_fail_their_index_and_faults_are_tried_again(
    jobs: dict[str, dict[str, Any]],
) -> None:
    first, second = next(iter(jobs.values()))["spec"]["podFailurePolicy"]["rules"]
    assert first["action"] == "Ignore"
    assert second["onExitCodes"]["values"] == CODES
    assert {SuiteRedError.exit_code, SuiteUndecidedError.exit_code} <= set(CODES)
    assert not {1, 137, 143} & set(CODES)
    assert not any(code % 10 == 3 for code in CODES)


def test_weights_outside_the_claim_are_folders_of_the_node(tmp_path: Path) -> None:
    site = cluster(tmp_path)
    (first, *_) = manifests(specs(site, "soak"), site, RUN).values()
    job = yaml.safe_load(first)
    assert schema_problems(job) + rule_problems(job) == []
    folder = {"path": "/shared/weights/flash", "type": "Directory"}
    assert job["spec"]["template"]["spec"]["volumes"][2] == {"name": "volume-1", "hostPath": folder}


POD = "spec/template/spec"
SUITE = f"{POD}/containers/0"
RULES = "spec/podFailurePolicy/rules"
CODE = f"{RULES}/1/onExitCodes"
# Path of a value; what is planted there, None to delete it; what must be said.
FAULTS: dict[str, tuple[str, object, str]] = {
    "unknown field": ("spec/backofLimitPerIndex", 1, "schema: Additional properties"),
    "wrong type": ("spec/completions", "3", "schema: '3'"),
    "mistyped mode": ("spec/completionMode", "Indexd", "completionMode: 'Indexd'"),
    "more parallel than jobs": ("spec/parallelism", 3, "parallelism"),
    "fewer indexes than jobs": ("spec/completions", 1, "completions: not the number"),
    "more failures than jobs": ("spec/maxFailedIndexes", 3, "maxFailedIndexes"),
    "dot in the name": ("metadata/name", "forge-b300-0.26", "name: with the index"),
    "mistyped action": (f"{RULES}/0/action", "Ignored", "rules.0.action: 'Ignored'"),
    "no limit per index": ("spec/backoffLimitPerIndex", None, "FailIndex needs"),
    "two conditions": (
        f"{RULES}/0/onExitCodes", {"operator": "In", "values": [1]}, "exactly one of",
    ),
    "mistyped status": (f"{RULES}/0/onPodConditions/0/status", "true", "status 'true'"),
    "mistyped operator": (f"{CODE}/operator", "in", "operator: 'in'"),
    "code 0": (f"{CODE}/values", [0, 91], "values: not ascending, has 0"),
    "codes out of order": (f"{CODE}/values", [91, 90], "values"),
    "mistyped container": (f"{CODE}/containerName", "siute", "containerName"),
    "restarts in place": (f"{POD}/restartPolicy", "OnFailure", "needs restartPolicy Never"),
    "suspended": ("spec/suspend", True, "suspend"),
    "label": (f"{POD}/nodeSelector", {"nvidia.com/gpu.product": "NVIDIA B300"}, "label"),
    "image by tag": (f"{SUITE}/image", "forge/vllm:0.26", "image: not by digest"),
    "GPUs as text": (f"{SUITE}/resources/limits", {"nvidia.com/gpu": "all"}, "gpu: 'all'"),
    "no such volume": (f"{SUITE}/volumeMounts/0/name", "smh", "no volume 'smh'"),
    "two at one path": (f"{SUITE}/volumeMounts/0/mountPath", "/forge", "two at one path"),
    "volume twice": (f"{POD}/volumes/0/name", "storage", "two of one name"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, jobs: dict[str, dict[str, Any]]) -> None:
    job = copy.deepcopy(next(iter(jobs.values())))
    path, value, said = FAULTS[fault]
    row: Any = job
    *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    for key in parents:
        row = row[key]
    if value is None:
        del row[last]
    else:
        row[last] = value
    found = schema_problems(job) if said.startswith("schema") else rule_problems(job)
    assert any(said in row for row in found), found


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('product = "NVIDIA-B300-SXM6-AC"', 'productt = "NVIDIA-B300-SXM6-AC"',
         "unknown key kubernetes.sku.b300.productt (did you mean 'product'?)"),
        ("kubernetes.sku.b300", "kubernetes.sku.b30",
         "kubernetes.sku.b30: not in matrix.toml (did you mean 'b300'?)"),
        ('"NVIDIA-B300-SXM6-AC"', '"NVIDIA B300"', "kubernetes.sku.b300.product"),
        ('claim = "forge"', 'claim = "Forge"', "kubernetes.claim"),
    ],
)  # fmt: skip
def test_wrong_row_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in CLUSTER
    with pytest.raises(SiteFileError) as caught:
        cluster(tmp_path, new=f"{CLUSTER.replace(old, new)}[slurm]")
    assert said in str(caught.value)


def test_more_gpus_than_a_node_has_are_refused(tmp_path: Path) -> None:
    site = cluster(tmp_path)
    with pytest.raises(ClusterMismatchError, match="needs 2 GPUs of one node; they have 1"):
        manifests(specs(site, "kernel", "tp2", skus=("rtxpro6000",)), site, RUN)


def test_what_the_site_lacks_is_named(tmp_path: Path) -> None:
    slurm_only = make_site(tmp_path, Project(REPO))
    with pytest.raises(SiteFileError, match=r"missing \[kubernetes\]"):
        manifests(specs(slurm_only, "kernel"), slurm_only, RUN)
    site = cluster(tmp_path)
    with pytest.raises(SiteFileError, match=r"missing kubernetes\.sku\.h200"):
        manifests(specs(site, "kernel", skus=("h200",)), site, RUN)
    row = next(line for line in SITE.splitlines() if line.startswith("registry"))
    site = cluster(tmp_path, row, CLUSTER)
    with pytest.raises(SiteFileError, match="missing registry"):
        find_runtime(site.model_copy(update={"runtime": POD_RUNTIME}))


def test_pod_runs_the_command_where_its_volumes_are(tmp_path: Path) -> None:
    site = cluster(tmp_path).model_copy(update={"runtime": POD_RUNTIME})
    (spec, *_) = specs(site, "kernel")
    job = node_job(spec, site, {})
    variables = [f"{name}={value}" for name, value in spec.environment.items()]
    assert job["argv"] == ["/usr/bin/env", *variables, *spec.command]
    assert job["prepare"] == [["ln", "--symbolic", "@OUTPUT@", "/output"]]


class Run:
    """A run of one job, and what the cluster and its pods say of it."""

    def __init__(self, folder: Path) -> None:
        site = cluster(folder)
        (self.spec, *_) = specs(site, "kernel")
        self.project = Project(folder)
        named = attempts([self.spec], site, RUN)
        self.record = RunRecord(
            run=RUN, scheduler="kubernetes", storage=str(folder), specs=(self.spec,), attempts=named
        )
        local_folder(self.project, self.record, "x").parent.mkdir(parents=True)
        self.api = Api(named[self.spec.name])
        self.results = self.record.folder / "results" / self.spec.name

    def leave(self, pod: str, code: int | None = 91, fault: str = "") -> None:
        """The marker and the result of a pod that ended, after all others."""
        plan = {"subject": {"sha256": self.spec.image[7:]}, "sku": "b300", "line": "0.26"}
        content = json.dumps({"plan": plan, "tier": "kernel"})
        files = {name: hashlib.sha256(content.encode()).hexdigest() for name in self.spec.artifacts}
        folder, at = self.results / pod, len(list(self.results.glob("*.done")))
        folder.mkdir(parents=True)
        for name in files:
            (folder / name).write_text(content)
        marker = {
            "job": self.spec.name, "image": self.spec.image, "attempt": pod, "restarts": 0,
            "node": "n1", "exit": code, "fault": fault, "files": {} if fault else files,
        }  # fmt: skip
        path = self.results / f"{pod}.done"
        path.write_text(json.dumps(marker))
        os.utime(path, (at, at))

    def verdict(self) -> tuple[str, str]:
        (row,) = outcomes(self.project, self.record, asking(self.api))
        return row.verdict, row.why


@pytest.fixture
def sent(tmp_path: Path) -> Run:
    return Run(tmp_path)


FAILED = condition("Failed", "FailedIndexes", "Job has failed indexes")
FAULT = "OSError: no space left"
NO_NODE = "0/9 nodes are available: 9 Insufficient nvidia.com/gpu."


def test_job_that_was_not_applied_waits_with_the_command(sent: Run) -> None:
    folder = sent.record.folder / "manifests"
    assert sent.verdict() == ("waiting", f"run: kubectl apply -f {folder}")
    assert sent.api.asked == [
        ["kubectl", "get", "jobs.batch,pods", "--namespace=lab",
         f"--selector=vllm-forge/run={RUN}", "--output=json"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("phase", "status", "why"),
    [
        ("Pending", {"conditions": [condition(
            "PodScheduled", "Unschedulable", NO_NODE, status="False")]},
         f"Unschedulable {NO_NODE}"),
        ("Pending", {"containerStatuses": container(
            "waiting", reason="ImagePullBackOff", message="Back-off pulling image")},
         "ImagePullBackOff Back-off pulling image"),
        ("Running", {"containerStatuses": container("running", startedAt="2026-11-30T12:41:00Z")},
         "Running"),
    ],
)  # fmt: skip
def test_job_that_waits_says_why(sent: Run, phase: str, status: dict[str, Any], why: str) -> None:
    sent.api.has_job(active=1)
    sent.api.has_pod(phase, **status)
    assert sent.verdict() == ("waiting", why)


def test_suspended_job_waits(sent: Run) -> None:
    sent.api.has_job(condition("Suspended", "JobSuspended", "Job suspended"))
    assert sent.verdict() == ("waiting", "the Job is suspended, by Kueue or by hand")


def test_index_without_pod_waits(sent: Run) -> None:
    sent.api.has_job()
    assert sent.verdict() == ("waiting", "no pod")


def test_two_pods_with_a_fault_end_the_job(sent: Run) -> None:
    sent.leave("pod-1", None, FAULT)
    sent.api.has_job(active=1)
    assert sent.verdict()[0] == "waiting"  # its index is started again
    sent.leave("pod-2", None, FAULT)
    sent.api.has_job(FAILED, failedIndexes="0", failed=2)
    assert sent.verdict() == ("fault", f"n1: {FAULT}")


def test_failed_index_without_a_marker_is_undecided(sent: Run) -> None:
    sent.api.has_job(failedIndexes="0", failed=2)
    sent.api.has_pod("Failed", containerStatuses=container(
        "terminated", exitCode=137, reason="OOMKilled"), at="12:50:13")  # fmt: skip
    sent.api.has_pod("Failed", containerStatuses=container(
        "terminated", exitCode=1, reason="Error"), at="12:40:13")  # fmt: skip
    verdict, why = sent.verdict()
    assert verdict == "undecided"
    assert why.startswith("no result was written (")
    assert "OOMKilled, exit code 137" in why
    (sent.results / "pod-2").mkdir(parents=True)
    assert sent.verdict()[1].startswith("half a result")


def test_job_over_its_own_time_is_undecided(sent: Run) -> None:
    message = "Job was active longer than specified deadline"
    sent.api.has_job(condition("Failed", "DeadlineExceeded", message))
    assert sent.verdict() == (
        "undecided", f"no result was written (Failed: DeadlineExceeded {message})"
    )  # fmt: skip


def test_deleted_job_ends(sent: Run) -> None:
    """Also one that no pod of has started: it was seen before."""
    sent.api.has_job()
    assert sent.verdict()[0] == "waiting"
    sent.api.items = []
    assert sent.verdict() == ("undecided", "no result was written (its Job was deleted)")


@pytest.mark.parametrize(
    ("codes", "verdict"),
    [([91], "red"), ([0], "green"), ([None, 91], "red"), ([0, 91], "refused"), ([0, 0], "refused")],
)
def test_results_of_a_deleted_job_count(sent: Run, codes: list[int | None], verdict: str) -> None:
    for number, code in enumerate(codes):
        sent.leave(f"pod-{number}", code, FAULT if code is None else "")
    assert sent.verdict()[0] == verdict, sent.verdict()


@pytest.mark.parametrize(
    ("codes", "status", "verdict"),
    [
        ([None, 0], {"completedIndexes": "0"}, "green"),
        ([92, 0], {"completedIndexes": "0"}, "green"),  # the first was evicted
        ([0, 0], {"completedIndexes": "0"}, "refused"),
        ([], {"completedIndexes": "0"}, "undecided"),
        ([None], {"completedIndexes": "0"}, "undecided"),
        ([None, 91], {"failedIndexes": "0"}, "red"),
        ([93, 91], {"failedIndexes": "0"}, "red"),  # 93 is no verdict: its index is started again
        ([92, 91], {"failedIndexes": "0"}, "red"),
        ([-9, 93], {"failedIndexes": "0"}, "fault"),
        ([0, 91], {"failedIndexes": "0"}, "refused"),
        ([91], {"failedIndexes": "0"}, "red"),
        ([91], {"active": 1}, "waiting"),
        ([91], {"failedIndexes": "1-3,5"}, "waiting"),
        ([91], {"failedIndexes": "0-3,5"}, "red"),
    ],
)  # fmt: skip
def test_the_cluster_says_what_ended_and_the_marker_how(
    sent: Run, codes: list[int | None], status: dict[str, Any], verdict: str
) -> None:
    for number, code in enumerate(codes):
        sent.leave(f"pod-{number}", code, FAULT if code is None else "")
    sent.api.has_job(**status)
    assert sent.verdict()[0] == verdict, sent.verdict()


def test_job_of_any_number_of_indexes_is_read(sent: Run) -> None:
    sent.leave("pod-1", 0)
    sent.api.has_job(completions=10**30, completedIndexes="0-999999999")
    assert sent.verdict()[0] == "green"


def test_index_that_completed_and_failed_has_no_verdict(sent: Run) -> None:
    sent.leave("pod-1", 0)
    sent.api.has_job(completedIndexes="0", failedIndexes="0-5")
    with pytest.raises(SchedulerError, match="index 0 both completed and failed"):
        sent.verdict()


def test_damaged_marker_is_refused(sent: Run) -> None:
    sent.leave("pod-1")
    (sent.results / "pod-1.done").write_text("{")
    sent.api.has_job(completedIndexes="0")
    assert sent.verdict()[0] == "refused"


@pytest.mark.parametrize(
    "text", ["", "x", "[]", '{"items": [{"kind": "Job"}]}', '{"items": [], "items": []}']
)
def test_other_output_of_kubectl_is_refused(sent: Run, text: str) -> None:
    sent.api.text = text or " "
    with pytest.raises(SchedulerError, match="invalid output of kubectl"):
        sent.verdict()


def test_cluster_that_does_not_answer_is_named(sent: Run) -> None:
    sent.api.code, sent.api.text = 1, "The connection to the server lab:6443 was refused"
    with pytest.raises(SchedulerError, match="kubectl exited with 1: The connection") as caught:
        sent.verdict()
    assert "see whether kubectl is installed" in (caught.value.remedy or "")
