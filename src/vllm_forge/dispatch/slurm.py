"""Slurm: batches of jobs as array scripts, what the cluster must have for them, and their states.

Every version since 20.11 has the options and formats used here. Results do not come from Slurm: a
cluster without accounting forgets ended jobs after MinJobAge (slurm.conf), so it is only asked
which jobs it still has, and why others ended.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from vllm_forge.dispatch.errors import SITE, ClusterMismatchError, SchedulerError, SiteFileError
from vllm_forge.dispatch.jobs import RUNS, JobSpec, grouped
from vllm_forge.dispatch.results import State
from vllm_forge.dispatch.runs import Ask, RunRecord
from vllm_forge.dispatch.site import Site, Slurm, SlurmBuild, SlurmSku
from vllm_forge.errors import suggestion
from vllm_forge.gputest.kit import PYTHON
from vllm_forge.host import printable, write_whole

TERM_S = 60  # from SIGTERM to the end of a job's time, in which the suite writes what it has
GPUS = re.compile(r"\bgpu:([\w.-]+):(\d+)")
JOB = re.compile(r"^\d{1,20}(?=;|$)", re.ASCII | re.MULTILINE)
# As squeue(1) says of jobs that will not run again; one that it does not list has ended, too.
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "REVOKED", "TIMEOUT",
}  # fmt: skip
# Reasons of squeue(1) for which a job that waits never starts.
NEVER = {"BadConstraints", "DependencyNeverSatisfied", "InvalidAccount", "InvalidQOS"}


Batch = tuple[list[JobSpec], str]  # jobs that ask for the same, and the script of their array


def job_name(run: str) -> str:
    return f"forge-{run}"


def batches(specs: Sequence[JobSpec], site: Site, run: str) -> list[Batch]:
    """SiteFileError: a SKU has no row."""
    folder = Path(site.storage.root) / RUNS / run
    groups = grouped(specs, lambda spec: (spec.sku, spec.gpus, spec.minutes, spec.exclusive))
    return [(group, _script(group, site, run, folder)) for group in groups]


def _row(site: Site, sku: str) -> tuple[Slurm, SlurmSku]:
    if site.slurm is None or sku not in site.slurm.sku:
        what = f"missing slurm.sku.{sku}: partition and gres of this SKU"
        raise SiteFileError(what, where=SITE, remedy="add the row, or leave the SKU out of --skus")
    return site.slurm, site.slurm.sku[sku]


def _script(specs: Sequence[JobSpec], site: Site, run: str, folder: Path) -> str:
    """A job array: its index chooses the job by name.

    The user's variables stay behind. The batch step, which is the node's program, is sent SIGTERM
    before the time is over.
    """
    first = specs[0]
    slurm, row = _row(site, first.sku)
    options = [
        f"--job-name={job_name(run)}", f"--array=0-{len(specs) - 1}",
        f"--gres=gpu:{row.gres}:{first.gpus}", f"--time={first.minutes}",
        f"--signal=B:TERM@{TERM_S}", f"--output={folder}/logs/%A_%a.log",
        *(["--exclusive"] if first.exclusive else []),
    ]  # fmt: skip
    head = head_of(slurm, f"slurm.sku.{first.sku}", row, options)
    names = " ".join(spec.name for spec in specs)
    return f"""#!/bin/bash
{head}
names=({names})
{PYTHON}exec python3 {folder}/node.py {folder} "${{names[SLURM_ARRAY_TASK_ID]}}" \\
    --attempt "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}" \\
    --restarts "${{SLURM_RESTART_COUNT:-0}}" \\
    --cuda "${{CUDA_VISIBLE_DEVICES:-}}" --gpus "${{SLURM_JOB_GPUS:-}}"
"""


def head_of(slurm: Slurm, where: str, row: SlurmBuild, options: Sequence[str]) -> str:
    """Lines of an array's script for sbatch; ``where``: the site file's name of ``row``.

    SiteFileError: an option of the site, maybe abbreviated, replaces one of our own.
    """
    own = [
        *options, f"--partition={row.partition}", "--no-requeue", "--nodes=1", "--ntasks=1",
        "--export=HOME,PATH,USER", *([f"--account={slurm.account}"] if slurm.account else []),
    ]  # fmt: skip
    further = {"slurm.options": slurm.options, f"{where}.options": row.options}
    taken = {option.partition("=")[0] for option in own} | {"--requeue", "--wrap", "--gpus"}
    for place, added in further.items():
        for name in (option.partition("=")[0] for option in added):
            if any(word.startswith(name) for word in taken) or name.startswith("--gpus-per"):
                what = f"{place}: {name} is set by dispatch itself"
                raise SiteFileError(what, where=SITE, remedy="remove it from these options")
    return "".join(f"#SBATCH {word}\n" for word in (*own, *slurm.options, *row.options))


def _table(ask: Ask, *argv: str) -> list[list[str]]:
    """Three columns with | between them."""
    return [[*row.split("|"), "", ""][:3] for row in ask(argv).splitlines()]


def cluster_nodes(ask: Ask) -> list[list[str]]:
    """Partition, GPUs and longest time of the cluster's nodes, those that are alike as one."""
    return _table(ask, "sinfo", "--all", "--noheader", "--format=%R|%G|%l")


def nodes_of(partition: str, where: str, nodes: list[list[str]]) -> list[list[str]]:
    """Those of a partition; ClusterMismatchError names the site's row."""
    if own := [node for node in nodes if node[0] == partition]:
        return own
    hint = suggestion(partition, {node[0] for node in nodes})
    what = f"{where}.partition: no partition {partition!r}{hint}"
    raise ClusterMismatchError(what, remedy="see: sinfo")


def require_cluster(specs: Sequence[JobSpec], site: Site, ask: Ask) -> None:
    """Raise ClusterMismatchError, with the site's row, for what no node of the cluster has."""
    nodes = cluster_nodes(ask)
    for spec in specs:
        _, row = _row(site, spec.sku)
        where = f"slurm.sku.{spec.sku}"
        own = nodes_of(row.partition, where, nodes)
        has: dict[str, int] = {}
        for kind, count in GPUS.findall(",".join(node[1] for node in own)):
            has[kind] = max(int(count), has.get(kind, 0))
        what = ""
        if row.gres not in has:
            listed = ", ".join(f"gpu:{kind}" for kind in sorted(has)) or "no typed GPUs"
            what = f"gres: partition {row.partition} has no gpu:{row.gres}; it has {listed}"
            remedy = "name the type that gres.conf has: sinfo -o '%P %G'"
        elif spec.gpus > has[row.gres]:
            what = f"gres: {spec.name} needs {spec.gpus} GPUs of one node; "
            what = f"{what}those of {row.partition} have {has[row.gres]}"
            remedy = "leave that work out of --tiers, or name another partition"
        elif spec.minutes > (longest := max(_minutes(node[2]) for node in own)):
            what = f"partition: {spec.name} may take {spec.minutes} minutes; "
            what = f"{what}{row.partition} allows {longest:g}"
            remedy = "name a partition that allows more"
        if what:
            raise ClusterMismatchError(f"{where}.{what}", remedy=remedy)


def _minutes(text: str) -> float:
    """Slurm's [days-]hours:minutes:seconds, or minutes:seconds."""
    days, _, clock = text.rpartition("-")
    parts = [days or "0", *clock.split(":")]
    if not all(part.isdecimal() for part in parts):
        return float("inf")  # "infinite", "n/a"
    seconds = sum(int(part) * 60**place for place, part in enumerate(reversed(parts[1:])))
    return float(1440 * int(parts[0]) + seconds / 60)


def send(batches: Sequence[Batch], folder: Path, ask: Ask, record: RunRecord) -> RunRecord:
    """Send arrays, all or none; the record with what Slurm calls their jobs.

    Each is tried first without sending it. If one is refused all the same, or this is interrupted,
    the others are cancelled, by name: an answer may have been lost.
    """
    paths = [folder / f"batch-{number}.sh" for number in range(len(batches))]
    attempts: dict[str, str] = {}
    for path, (specs, script) in zip(paths, batches, strict=True):
        write_whole(path, script)
        require_accepted(path, f"slurm.sku.{specs[0].sku}", ask)
    try:
        for path, (specs, _) in zip(paths, batches, strict=True):
            job = _job_id(ask(["sbatch", "--parsable", str(path)]), path)
            attempts |= {spec.name: f"{job}_{index}" for index, spec in enumerate(specs)}
    except (SchedulerError, KeyboardInterrupt) as error:
        cancel = ["scancel", f"--jobname={job_name(record.run)}"]
        try:
            ask(cancel)
        except SchedulerError as second:
            what = f"{getattr(error, 'what', 'interrupted')}; other jobs may run: {second.what}"
            remedy = f"run `{shlex.join(cancel)}`, then send them again"
            raise SchedulerError(what, where=folder, remedy=remedy) from error
        raise
    return record.model_copy(update={"attempts": attempts})


def require_accepted(script: Path, where: str, ask: Ask) -> None:
    """Raise ClusterMismatchError, with the site's row, for a script that Slurm would refuse."""
    try:
        ask(["sbatch", "--test-only", str(script)])
    except SchedulerError as error:
        what = f"{where}: the cluster refuses its jobs: {error.what}"
        remedy = f"correct {where} of the site file, or its options"
        raise ClusterMismatchError(what, where=error.where, remedy=remedy) from None


def _job_id(text: str, path: Path) -> str:
    if len(jobs := JOB.findall(text)) != 1:  # plugins of sites print, too
        what = f"sbatch printed no job id, or several: {printable(text.strip()[:200])}"
        raise SchedulerError(what, where=path, remedy="see what its plugins print")
    return str(jobs[0])


def states(run: str, ask: Ask) -> dict[str, State]:
    """Attempt (job id and index) -> its state, of all that Slurm still knows."""
    argv = ["squeue", "-h", "--array", "--states=all", f"--name={job_name(run)}"]
    return {
        attempt: State(
            text=word if reason in {"", "None"} else f"{word}: {reason}",
            ended=word in ENDED or reason in NEVER,
        )
        for attempt, word, reason in _table(ask, *argv, "--format=%F_%K|%T|%r")
    }
