"""Scripts of Slurm, and what is asked of a cluster before one is sent."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.site import make_site
from vllm_forge.dispatch import slurm
from vllm_forge.dispatch.errors import ClusterMismatchError, SchedulerError, SiteFileError
from vllm_forge.dispatch.jobs import cell_image, job_specs, suite_works
from vllm_forge.dispatch.results import State
from vllm_forge.dispatch.runs import RunRecord, asking
from vllm_forge.host import Reply
from vllm_forge.project import Project

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vllm_forge.dispatch.jobs import JobSpec
    from vllm_forge.dispatch.site import Site

NODES = "b300|gpu:b300:8(S:0-1)|1-00:00:00\nrtxpro6000|gpu:rtxpro6000:2,shard:4|30:00\n"


class Cluster:
    """Slurm's programs: what they print, and what they were asked."""

    def __init__(self, **replies: Reply) -> None:
        self.replies = {"sinfo": Reply(code=0, text=NODES)} | replies
        self.asked: list[list[str]] = []

    def ask(self, name: str, argv: Sequence[str]) -> Reply:
        self.asked.append(list(argv))
        return self.replies.get(name, Reply(code=0, text="7\n"))


def make(
    root: Path, folder: Path, *tiers: str, old: str = "", new: str = ""
) -> tuple[Site, tuple[JobSpec, ...]]:
    project = Project(root)
    site = make_site(folder, project, old, new)
    images = [
        cell_image(project, project.cell(sku, "0.26"), "sha256:" + "d1" * 32)
        for sku in ("b300", "rtxpro6000")
    ]
    works = suite_works(project)
    return site, job_specs(images, [works[name] for name in tiers], site, "r1")


def test_script_is_an_array_that_is_never_requeued(root: Path, tmp_path: Path) -> None:
    site, specs = make(root, tmp_path, "kernel", "server", "tp2")
    made = slurm.batches(specs, site, "r1")
    assert sum(len(group) for group, _ in made) == 6
    for group, script in made:
        first, lines = group[0], script.splitlines()
        assert f"#SBATCH --partition={first.sku}" in lines
        assert f"#SBATCH --gres=gpu:{first.sku}:{first.gpus}" in lines
        assert f"#SBATCH --array=0-{len(group) - 1}" in lines
        assert {"#SBATCH --no-requeue", "#SBATCH --account=lab"} <= set(lines)
        assert f"#SBATCH --time={first.minutes}" in lines
        assert len({(spec.sku, spec.gpus, spec.minutes) for spec in group}) == 1
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_old_python_of_a_node_is_named(root: Path, tmp_path: Path) -> None:
    """As RHEL 8 has it; node.py would be a syntax error."""
    site, specs = make(root, tmp_path, "kernel")
    (_, script), *_ = slurm.batches(specs, site, "r1")
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\n[ "$1" != -c ] || exit 1\necho SyntaxError\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", "-c", script], env={"PATH": str(tmp_path)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("no python3 of 3.9 or newer")


@pytest.mark.parametrize(
    ("old", "new", "tiers", "said"),
    [
        ('partition = "b300"', 'partition = "b30"', ["kernel"],
         "slurm.sku.b300.partition: no partition 'b30' (did you mean 'b300'?)"),
        ('gres = "b300"', 'gres = "b200"', ["kernel"],
         "slurm.sku.b300.gres: partition b300 has no gpu:b200; it has gpu:b300"),
        ("", "", ["tp4"],
         "slurm.sku.rtxpro6000.gres: rtxpro6000-0.26-tp4 needs 4 GPUs of one node; those of "
         "rtxpro6000 have 2"),
        ("", "", ["soak"],
         "slurm.sku.rtxpro6000.partition: rtxpro6000-0.26-soak may take 260 minutes; rtxpro6000 "
         "allows 30"),
    ],
)  # fmt: skip
def test_what_the_cluster_lacks_is_named_by_its_row(
    root: Path, tmp_path: Path, *, old: str, new: str, tiers: list[str], said: str
) -> None:
    site, specs = make(root, tmp_path, *tiers, old=old, new=new)
    with pytest.raises(ClusterMismatchError) as caught:
        slurm.require_cluster(specs, site, asking(Cluster()))
    assert caught.value.what == said


def test_untyped_gpus_are_refused(root: Path, tmp_path: Path) -> None:
    site, specs = make(root, tmp_path, "kernel")
    cluster = Cluster(sinfo=Reply(code=0, text="b300|gpu:8|infinite\n"))
    with pytest.raises(ClusterMismatchError, match="it has no typed GPUs"):
        slurm.require_cluster(specs[:1], site, asking(cluster))


def test_missing_row_of_a_sku_is_named(root: Path, tmp_path: Path) -> None:
    row = '[slurm.sku.rtxpro6000]\npartition = "rtxpro6000"\ngres = "rtxpro6000"\n'
    site, specs = make(root, tmp_path, "kernel", old=row, new="")
    with pytest.raises(SiteFileError, match=r"missing slurm\.sku\.rtxpro6000"):
        slurm.batches(specs, site, "r1")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("30:00", 30), ("1:00:00", 60), ("2-00:00:00", 2880), ("0:30", 0.5), ("infinite", 1e9)],
)
def test_times_of_partitions(text: str, minutes: float) -> None:
    assert min(slurm._minutes(text), 1e9) == minutes


def test_attempts_are_job_and_index(root: Path, tmp_path: Path) -> None:
    site, specs = make(root, tmp_path, "kernel", "server")
    record = slurm.send(slurm.batches(specs, site, "r1"), tmp_path, _ask(), _record(specs))
    assert record.attempts["b300-0.26-kernel"] == "7_0"


def test_what_plugins_of_a_site_print_is_skipped(root: Path, tmp_path: Path) -> None:
    site, specs = make(root, tmp_path, "kernel")
    reply = Reply(code=0, text="Your project has 12 hours left\n7;cluster\n")
    sent = slurm.send(
        slurm.batches(specs, site, "r1"), tmp_path, _ask(sbatch=reply), _record(specs)
    )
    assert sent.attempts["b300-0.26-kernel"] == "7_0"


def test_missing_programs_of_slurm_are_named() -> None:
    missing = Reply(code=127, text="sinfo: not found\n")
    with pytest.raises(SchedulerError, match="sinfo: not found") as raised:
        slurm.cluster_nodes(_ask(sinfo=missing))
    assert raised.value.remedy.startswith("see whether sinfo is installed here")


def _ask(**replies: Reply) -> Any:
    return asking(Cluster(**replies))


def _record(specs: tuple[JobSpec, ...]) -> RunRecord:
    return RunRecord(run="r1", scheduler="slurm", storage="/s", specs=specs, attempts={})


@pytest.mark.parametrize("cancelled", [True, False])
def test_failed_submission_cancels_what_was_sent(
    cancelled: bool, root: Path, tmp_path: Path
) -> None:
    """By the run's name: the answer of one that was accepted may have been lost."""
    site, specs = make(root, tmp_path, "kernel")

    class Dying(Cluster):
        def ask(self, name: str, argv: Sequence[str]) -> Reply:
            sent = [words for words in self.asked if words[:2] == ["sbatch", "--parsable"]]
            reply = super().ask(name, argv)
            second = argv[:2] == ["sbatch", "--parsable"] and len(sent) == 1
            dead = second or (argv[0] == "scancel" and not cancelled)
            return Reply(code=1, text="Socket timed out") if dead else reply

    cluster = Dying()
    with pytest.raises(SchedulerError, match="Socket timed out") as raised:
        slurm.send(slurm.batches(specs, site, "r1"), tmp_path, asking(cluster), _record(specs))
    assert cluster.asked[-1] == ["scancel", "--jobname=forge-r1"]
    told = "scancel --jobname=forge-r1" in (raised.value.remedy or "")
    assert (told, "may run" in raised.value.what) == (not cancelled, not cancelled)


def test_interrupted_submission_cancels_what_was_sent(root: Path, tmp_path: Path) -> None:
    """Else jobs run that the record does not know."""
    site, specs = make(root, tmp_path, "kernel")

    class Interrupted(Cluster):
        def ask(self, name: str, argv: Sequence[str]) -> Reply:
            reply = super().ask(name, argv)
            if argv[:2] == ["sbatch", "--parsable"]:
                raise KeyboardInterrupt
            return reply

    cluster = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        slurm.send(slurm.batches(specs, site, "r1"), tmp_path, asking(cluster), _record(specs))
    assert cluster.asked[-1] == ["scancel", "--jobname=forge-r1"]


def test_states_are_by_attempt() -> None:
    reply = Reply(code=0, text="7_0|RUNNING|None\n7_1|NODE_FAIL|NodeDown\n7_2|PENDING|Resources\n")
    assert slurm.states("r1", _ask(squeue=reply)) == {
        "7_0": State(text="RUNNING", ended=False),
        "7_1": State(text="NODE_FAIL: NodeDown", ended=True),
        "7_2": State(text="PENDING: Resources", ended=False),
    }
    with pytest.raises(SchedulerError, match="exited with 1"):
        slurm.states("r1", _ask(squeue=Reply(code=1, text="Unable to contact slurm controller")))


@pytest.mark.parametrize("reason", ["DependencyNeverSatisfied", "BadConstraints", "InvalidQOS"])
def test_job_that_never_starts_has_ended(reason: str) -> None:
    states = slurm.states("r1", _ask(squeue=Reply(code=0, text=f"7_0|PENDING|{reason}\n")))
    assert states["7_0"] == State(text=f"PENDING: {reason}", ended=True)
