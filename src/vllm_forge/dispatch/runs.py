"""A run: jobs that were sent together. What this host relies on of it is in dist/dispatch/RUN."""

import os
import shlex
import shutil
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from vllm_forge.dispatch.errors import RunFolderError, SchedulerError
from vllm_forge.dispatch.jobs import BUNDLE, CACHES, IMAGES, RUNS, JobSpec
from vllm_forge.dispatch.results import UNDECIDED, WAITING, Outcome, State, judge
from vllm_forge.dispatch.runtimes import find_runtime, node_job
from vllm_forge.dispatch.site import Site
from vllm_forge.errors import suggestion
from vllm_forge.gputest.kit import make_kit
from vllm_forge.gputest.launch import SuiteImage, write_bundle
from vllm_forge.gputest.sessions import write_sessions
from vllm_forge.host import (
    Probe,
    Runner,
    console,
    printable,
    read_data,
    report,
    write_json,
    write_whole,
)
from vllm_forge.host.files import file_digest
from vllm_forge.images.archive import write_archive
from vllm_forge.images.layout import Image, read_image, verify
from vllm_forge.matrix import FrozenModel, ImageCell
from vllm_forge.project import Project

LOCAL = "dist/dispatch"
NODE = Path(__file__).with_name("node.py")
POLL_S = 15.0
SILENCE_S = 3600.0  # in which a scheduler that does not answer is asked again
ONE_PART = 1 << 50  # bytes: a kit on shared storage need not be cut
Ask = Callable[[Sequence[str]], str]
Judge = Callable[[JobSpec, str, Path, State, Path], Outcome]


class RunRecord(FrozenModel):
    """``run.json``: what was sent, and by which attempt each job is known to the scheduler."""

    run: str
    scheduler: str
    storage: str
    specs: tuple[JobSpec, ...]
    attempts: dict[str, str]

    @property
    def folder(self) -> Path:
        """On storage."""
        return Path(self.storage) / RUNS / self.run


def new_run() -> str:
    """A name that sorts by time."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"


def local_folder(project: Project, record: RunRecord, job: str) -> Path:
    """Where the verified files of a job are on this host."""
    return project.root / LOCAL / record.run / job


def write_record(project: Project, record: RunRecord) -> None:
    write_json(project.root / LOCAL / record.run / "run.json", record.model_dump(mode="json"))


def read_record(project: Project, run: str | None) -> RunRecord:
    """The record of a run, by default of the latest; RunFolderError if it is unknown here."""
    folder = project.root / LOCAL
    runs = sorted(path.parent.name for path in folder.glob("*/run.json"))
    if not runs or run not in (None, *runs):
        what = f"unknown run {run}{suggestion(run, runs)}" if run and runs else "no run was sent"
        remedy = "run this in the checkout that sent the run, or send one: dispatch --to SCHEDULER"
        raise RunFolderError(what, where=folder, remedy=remedy)
    path = folder / (run or runs[-1]) / "run.json"
    remedy = "restore it; without it, results cannot be told from what others wrote"
    return read_data(path, RunRecord.model_validate, RunFolderError, what="run", remedy=remedy)


def built_image(project: Project, cell: ImageCell) -> Image:
    """The cell's image of dist; RunFolderError if it is not built."""
    layout = project.root / "dist" / cell.name
    if not layout.is_dir():
        remedy = f"build it: nox -s forge -- build {cell.sku_name} --line {cell.line_name}"
        raise RunFolderError(f"{cell.name} is not built", where=layout, remedy=remedy)
    return read_image(layout)


def stage(
    project: Project,
    site: Site,
    specs: Sequence[JobSpec],
    images: Mapping[str, tuple[ImageCell, Image]],
    run: str,
    *,
    sessions: Sequence[Path] = (),
) -> Path:
    """Write a run's folder on storage, and its images there unless they are; returns it.

    ``images``: name of a cell -> the cell and its image. ``sessions``: of benchmarks.
    """
    root = Path(site.storage.root)
    for name in (RUNS, IMAGES, *((CACHES,) if site.storage.caches or sessions else ())):
        make_own(root / name)
    folder = root / RUNS / run
    (folder / "logs").mkdir(parents=True)
    archives = {}
    for name, (cell, image) in images.items():
        tested = SuiteImage(name=name, digest=image.digest, labels=image.config["config"]["Labels"])
        with report(f"write the suite for {name}"):
            plan = write_bundle(project, cell, tested, folder / name)
            if sessions:
                weights = {row: Path(place) for row, place in site.checkpoints.items()}
                write_sessions(
                    folder / name, plan, root=project.root, paths=sessions, inputs=weights
                )
        archives[name] = bring_image(project, site, cell, image)
    for spec in specs:
        for volume in spec.volumes:  # the bundle is mounted read-only: no runtime could make these
            if volume.target.startswith(f"{BUNDLE}/"):
                place = folder / spec.cell / volume.target.removeprefix(f"{BUNDLE}/")
                place.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(NODE, folder / "node.py")
    jobs = {}
    for spec in specs:
        job = node_job(spec, site, images[spec.cell][1].config["config"])
        jobs[spec.name] = job | {"archive": archives[spec.cell]}
    write_json(folder / "jobs.json", jobs)
    return folder


def make_own(folder: Path) -> None:
    """Make a folder of storage unless it is there. What is in it is run as this user, and believed.

    RunFolderError if another user may write to it.
    """
    if not (root := folder.parent).is_dir():
        what = "storage.root is not a directory of this host"
        raise RunFolderError(what, where=root, remedy="make it, or mount it here as on the nodes")
    os.umask(os.umask(0o022) | 0o022)  # of this program from here on
    folder.mkdir(exist_ok=True)
    require_own(folder)


def require_own(folder: Path) -> None:
    """Raise RunFolderError for a folder of storage that another user may write to."""
    status = folder.lstat()
    own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not own or status.st_mode & 0o022:
        what = "the folder is a link, of another user, or can be written by others"
        remedy = "set storage.root to a folder of your own; for an older one: chmod -R go-w"
        raise RunFolderError(what, where=folder, remedy=remedy)


def bring_image(project: Project, site: Site, cell: ImageCell, image: Image) -> str | None:
    """Have an image on storage in the form that the site's runtime needs; SHA-256 of an archive.

    This host keeps that hash: an archive that others wrote there is written again.
    """
    source = find_runtime(site).source
    if source == "registry":
        return None
    suffix = {"archive": "sqsh", "kit": "kit"}[source]
    target = Path(site.storage.root) / IMAGES / f"{image.digest}.{suffix}"
    target.parent.mkdir(exist_ok=True)
    if source == "kit":
        if not target.exists():
            make_kit(project, cell, image.path, target, max_part=ONE_PART, inputs={})
        return None
    known = project.root / LOCAL / IMAGES / f"{image.digest}.sha256"
    with report(f"verify {cell.name}, and have it at {target}"):
        if not (target.exists() and known.exists() and file_digest(target) == known.read_text()):
            verify(image)
            epoch = cell.base.source_date_epoch
            write_archive(Runner(), image.path, cell.name, target, epoch)
            write_whole(known, file_digest(target))
    return known.read_text()


def outcomes(
    project: Project, record: RunRecord, states: Mapping[str, State], judge: Judge = judge
) -> list[Outcome]:
    """The verdict on each job of a run; ``states``: of attempts that the scheduler knows."""
    rows = []
    for spec in record.specs:
        if (attempt := record.attempts.get(spec.name)) is None:
            rows.append(Outcome(name=spec.name, verdict=UNDECIDED, why="it was not sent"))
            continue
        state = states.get(attempt, State(text="the scheduler does not know it", ended=True))
        results = record.folder / "results" / spec.name
        rows.append(judge(spec, attempt, results, state, local_folder(project, record, spec.name)))
    return rows


def asking(probe: Probe) -> Ask:
    """A scheduler's own programs; SchedulerError has what they print."""

    def ask(argv: Sequence[str]) -> str:
        reply = probe.ask(argv[0], argv)
        if reply.code != 0:
            what = f"{argv[0]} exited with {reply.code}: {printable(reply.text.strip())}"
            remedy = f"see whether {argv[0]} is installed here, and reaches the cluster"
            raise SchedulerError(what, where=shlex.join(argv), remedy=remedy)
        return reply.text

    return ask


def wait(ask: Callable[[], list[Outcome]], minutes: float | None = None) -> list[Outcome]:
    """Ask until no job waits, or for so long; a scheduler that is silent a while is asked again."""
    shown, silent_since = -1, time.monotonic()
    end = silent_since + 60 * minutes if minutes else float("inf")
    while True:
        try:
            rows, silent_since = ask(), time.monotonic()
            waiting = sum(row.verdict == WAITING for row in rows)
            if waiting != shown:
                console.print(f"{waiting} of {len(rows)} jobs wait or run")
                shown = waiting
            if not waiting or time.monotonic() >= end:
                return rows
        except SchedulerError as error:
            if time.monotonic() > min(end, silent_since + SILENCE_S):
                raise
            console.print(f"{error.what.splitlines()[0]}; asking again", markup=False)
        time.sleep(POLL_S)
