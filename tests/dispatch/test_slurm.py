"""Jobs on a real Slurm: each fault has its verdict, nothing is lost, nothing is counted twice."""

from __future__ import annotations

import subprocess
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.support.slurm import until
from vllm_forge.cli import main
from vllm_forge.dispatch.slurm import job_name
from vllm_forge.receipts.verification import read_receipts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.dispatch.conftest import Lab
    from vllm_forge.dispatch.runs import RunRecord

BOTH = ("--skus=b300,rtxpro6000", "--tiers=kernel,server,tp2")


def verdicts(document: dict[str, object]) -> dict[str, tuple[str, str]]:
    rows = document["jobs"]
    assert isinstance(rows, list)
    return {row["name"]: (row["verdict"], row["why"]) for row in rows}


def test_a_matrix_comes_back_as_signed_receipts(lab: Lab) -> None:
    """Three images, three tiers; the pair that the line does not support is named as not run."""
    out = lab.dispatch(lab.site(), *BOTH, "--lines=0.22,0.26", "--wait", f"--key={lab.key}")
    assert "not run: line 0.22 cannot serve rtxpro6000" in out
    receipts = read_receipts(lab.project)
    assert not receipts.refused
    assert len(receipts.valid) == 9
    assert all(row.signed_by for row in receipts.valid)
    logs = [path.read_text().split() for path in (lab.storage / "runs").glob("*/logs/*.log")]
    gpus = [words[-1].split(",") for words in logs if words[0] == "tp2"]
    assert [len(set(row)) for row in gpus] == [2, 2, 2], "not the GPUs that were asked for"


class Faults:
    """One run with a fault for most of its jobs, and what was collected of it."""

    def __init__(self, lab: Lab) -> None:
        told = {
            "b300_kernel": "slow", "b300_server": "red", "rtxpro6000_kernel": "stuck",
            "rtxpro6000_server": "stuck", "rtxpro6000_tp2": "slow",
        }  # fmt: skip
        self.lab, self.record = lab, lab.send(lab.site(told), *BOTH)
        rtx = [f"rtxpro6000-0.26-{tier}" for tier in ("kernel", "server", "tp2")]
        lab.started(self.record, "b300-0.26-kernel", *rtx)
        kernel, *late = (self.record.attempts[name] for name in rtx)
        for attempt in late:
            lab.cluster.run("scontrol", "update", f"jobid={attempt}", "endtime=now")
        self.requeue(kernel)
        self.lose_node()
        self.document = lab.collect(self.record.run, f"--key={lab.key}", code=91)
        self.verdicts = verdicts(self.document)

    def requeue(self, attempt: str) -> None:
        """An operator requeues the job, against what the job asked for."""
        argv = ["scontrol", "requeue", attempt]
        refused = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert refused.returncode != 0, "a job can be requeued without asking"
        self.lab.cluster.run("scontrol", "update", f"jobid={attempt}", "requeue=1")
        self.lab.cluster.run(*argv)
        state = ["squeue", "-h", "-j", attempt, "-o", "%T"]
        until("it waits", lambda: self.lab.cluster.run(*state).strip() == "PENDING")
        # Slurm itself would wait for two minutes.
        self.lab.cluster.run("scontrol", "update", f"jobid={attempt}", "starttime=now")

    def lose_node(self) -> None:
        """Switch off the node of the job of b300, and bring it back after Slurm noticed."""
        cluster, job = self.lab.cluster, self.record.attempts["b300-0.26-kernel"]
        node = cluster.run("squeue", "-h", "-o", "%N", "-j", job).strip()
        cluster.lose_node(node)
        cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        cluster.restart_node(node)


@pytest.fixture(scope="module")
def faults(lab: Lab) -> Faults:
    return Faults(lab)


@pytest.mark.parametrize(
    ("job", "verdict", "why"),
    [
        ("b300-0.26-kernel", "undecided", "half a result: .* (NODE_FAIL: NodeDown)"),
        ("b300-0.26-server", "red", "exit code 91"),
        ("b300-0.26-tp2", "green", ""),
        ("rtxpro6000-0.26-kernel", "refused", "it was requeued while it ran"),
        ("rtxpro6000-0.26-server", "undecided", "half a result: .* (TIMEOUT: TimeLimit)"),
        ("rtxpro6000-0.26-tp2", "undecided", "exit code 92"),
    ],
    ids=["node down", "red", "green", "requeued", "over time", "over time, ended in order"],
)
def test_each_fault_has_its_verdict(faults: Faults, job: str, verdict: str, why: str) -> None:
    actual, text = faults.verdicts[job]
    assert actual == verdict, text
    assert all(part in text for part in why.split(".*")), text


def test_only_what_is_green_gets_a_receipt(faults: Faults) -> None:
    receipts = faults.document["receipts"]
    assert isinstance(receipts, list)
    assert [path.rpartition("/")[2] for path in receipts] == ["b300--0.26--tp2.json"]


def test_collecting_again_changes_nothing(lab: Lab, faults: Faults) -> None:
    """Nor does what others leave among the results count."""
    folder = faults.record.folder / "results" / "b300-0.26-tp2"
    attempt = faults.record.attempts["b300-0.26-tp2"]
    (folder / "99_0.done").write_text((folder / f"{attempt}.done").read_text())
    before = {row.path: row.path.read_bytes() for row in read_receipts(lab.project).valid}
    again = lab.collect(faults.record.run, f"--key={lab.key}", code=91)
    assert again == faults.document
    assert {row.path: row.path.read_bytes() for row in read_receipts(lab.project).valid} == before


def test_restarted_controller_loses_nothing(lab: Lab) -> None:
    """It is killed while jobs run and others wait; those that run end while it is away."""
    cluster, tiers = lab.cluster, ("kernel", "server", "tp2")
    site = lab.site({f"b300_{tier}": "held" for tier in tiers})
    with site.open("a") as file:  # of the last SKU
        file.write('options = ["--hold"]\n')
    record = lab.send(site, *BOTH)
    running = [f"b300-0.26-{tier}" for tier in tiers]
    waiting = {record.attempts[f"rtxpro6000-0.26-{tier}"].partition("_")[0] for tier in tiers}
    with watching(lab, record) as waiter:
        lab.started(record, *running)
        cluster.save(record.attempts[running[0]])
        cluster.kill("slurmctld")
        for job in running:
            place = record.folder / "results" / job / record.attempts[job]
            (place / "go").touch()
            until(f"{job} has ended", place.with_name(f"{place.name}.done").exists)
        cluster.start_controller()
        until("the controller answers", cluster.answers)
        cluster.run("scontrol", "release", ",".join(waiting))
        waiter.join(60)
    document = lab.collect(record.run, f"--key={lab.key}")
    assert {verdict for verdict, _ in verdicts(document).values()} == {"green"}
    receipts = document["receipts"]
    assert isinstance(receipts, list)
    assert len(set(receipts)) == 6


@contextmanager
def watching(lab: Lab, record: RunRecord) -> Iterator[threading.Thread]:
    """``collect --wait`` goes on beside the block; it must end well, without another call."""
    argv, codes = ["dispatch", "collect", record.run, "--wait", f"--key={lab.key}"], list[int]()
    waiter = threading.Thread(target=lambda: codes.append(main(argv)), daemon=True)
    waiter.start()
    yield waiter
    assert codes == [0]


def test_full_disk_of_a_node_is_a_fault(lab: Lab, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "disk", scratch], check=True)
    try:
        record = lab.send(lab.site(scratch=scratch), "--skus=b300", "--tiers=kernel")
        document = lab.collect(record.run, code=93)
        (left,) = (path for path in scratch.iterdir())
        assert [path.name for path in left.iterdir()] == [".lock"], "it left files on the disk"
    finally:
        subprocess.run(["umount", scratch], check=True)
    ((verdict, why),) = verdicts(document).values()
    assert verdict == "fault"
    assert "No space left on device" in why
    assert document["receipts"] == []


def test_job_that_never_starts_is_undecided(lab: Lab) -> None:
    """Slurm keeps one whose dependency cannot be satisfied any more."""
    argv = ["sbatch", "--parsable", "--hold", "--partition=rtxpro6000", "--wrap=true"]
    cancelled = lab.cluster.run(*argv).strip()
    lab.cluster.run("scancel", cancelled)
    site = lab.site()
    with site.open("a") as file:  # of the last SKU
        file.write(f'options = ["--dependency=afterok:{cancelled}"]\n')
    record = lab.send(site, "--skus=rtxpro6000", "--tiers=kernel")
    document = lab.collect(record.run, code=92)
    why = "no result was written (PENDING: DependencyNeverSatisfied)"
    assert verdicts(document) == {"rtxpro6000-0.26-kernel": ("undecided", why)}
    lab.cluster.run("scancel", f"--jobname={job_name(record.run)}")
    document = lab.collect(record.run, code=92)
    assert verdicts(document)["rtxpro6000-0.26-kernel"][0] == "undecided"


def test_kit_runs_without_an_engine(lab: Lab) -> None:
    site = lab.site()
    site.write_text(site.read_text().replace('runtime = "runc"', 'runtime = "kit"'))
    document = lab.collect(lab.send(site, "--skus=b300", "--tiers=kernel").run, f"--key={lab.key}")
    assert verdicts(document)["b300-0.26-kernel"][0] == "green"


@pytest.mark.parametrize(
    ("old", "new", "tiers", "said"),
    [
        ('partition = "b300"', 'partition = "b3000"', "kernel",
         "slurm.sku.b300.partition: no partition 'b3000' (did you mean 'b300'?)"),
        ('gres = "b300"', 'gres = "b200"', "kernel",
         "slurm.sku.b300.gres: partition b300 has no gpu:b200; it has gpu:b300"),
        ("minutes = 1", "minutes = 99", "kernel",
         "slurm.sku.b300.partition: b300-0.26-kernel may take 100 minutes; b300 allows 60"),
        ("", "", "kernel,tp8",
         "slurm.sku.b300.gres: b300-0.26-tp8 needs 8 GPUs of one node; those of b300 have 4"),
        ('gres = "b300"', 'gres = "b300"\noptions = ["--qos=none", "--nodelist=rtx-1"]', "kernel",
         "slurm.sku.b300: the cluster refuses its jobs"),
    ],
    ids=["partition", "gres", "time", "gpus", "options"],
)  # fmt: skip
def test_what_the_cluster_lacks_is_refused_before_anything_is_sent(
    lab: Lab, old: str, new: str, tiers: str, said: str
) -> None:
    site = lab.site()
    text = site.read_text()
    assert old in text
    site.write_text(text.replace(old, new, 1) if old else text)
    jobs = lab.jobs()
    out = lab.dispatch(site, "--skus=b300,rtxpro6000", f"--tiers={tiers}", code=90)
    assert said in out
    assert lab.jobs() == jobs
