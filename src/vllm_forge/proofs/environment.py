"""What a line's images run: their system and wheel layers, ready to be mounted, without patches.

A tree of the source becomes a folder with the Python files in which it differs from the release,
mounted above the layers. Nothing is copied or installed. A line's own vLLM answers questions of
kernel selection here, and loads checkpoints without data.
"""

import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_forge import images
from vllm_forge.checkpoints.errors import DryLoadError
from vllm_forge.checkpoints.inspect import dry_load as loading
from vllm_forge.checkpoints.inspect.profile import Profile
from vllm_forge.errors import ForgeError, UsageError
from vllm_forge.host import Runner, cache_root, console, exclusive, remove, report, which
from vllm_forge.host.errors import CacheError, CommandFailedError
from vllm_forge.images.bytecode import kept_bytecode
from vllm_forge.images.content import VLLM
from vllm_forge.images.engines import ContainerRun
from vllm_forge.images.errors import EngineSetupError
from vllm_forge.images.store import require_stored, usable
from vllm_forge.images.system import load_system
from vllm_forge.images.wheels import site_packages
from vllm_forge.kernels.selection import questions as asking
from vllm_forge.kernels.selection.questions import Question
from vllm_forge.kernels.selection.record import Rows, SelectionRecord, selection_inputs
from vllm_forge.patches import Applied, check_line
from vllm_forge.patches.wheel import GENERATED, changed_files, read_blob
from vllm_forge.project import Project
from vllm_forge.sources import SourceRepo, Wheelhouse

ENGINE = "buildah"
PYTHON = "/opt/venv/bin/python"
NAME = "checkpoint"
DISPOSITIONS = "patches/vllm"
# An image's Python does not search the folder of a script.
LOAD_ARGV = ("/usr/bin/env", "PYTHONPATH=/mnt", PYTHON, f"/mnt/{loading.PROGRAM}")
TOOLS = ("buildah", "runc", "unshare")


@dataclass(frozen=True, kw_only=True)
class LineEnvironment:
    """A line's layers, and ``work``, a folder of the cache with a subfolder for each run.

    ``lower_dirs``: unpacked layers with the release as published, highest first.
    """

    plan: images.ImagePlan
    repo: SourceRepo
    applied: Applied
    lower_dirs: tuple[Path, ...]
    config: dict[str, Any]
    work: Path
    runner: Runner

    @property
    def bytecode(self) -> Path:
        return self.work / "bytecode"

    def run(self, name: str, tree: str, inputs: Path, argv: tuple[str, ...]) -> str:
        """Run a command on a tree of the source, with /mnt: inputs; returns its stdout."""
        run = ContainerRun(
            layout=self.work / name,
            config=self.config,
            name=name,
            lower_dirs=(self.write_tree(tree, name), *self.lower_dirs),
            inputs=inputs,
            argv=argv,
            work=self.work / name,
            bytecode=self.bytecode,
        )
        return self.plan.engine.run_in_image(self.runner, run)

    def write_tree(self, tree: str, name: str) -> Path:
        """Write a folder with the files in which ``tree`` differs from the release."""
        folder = self.work / name / "files"
        site = folder / site_packages(self.plan.cell.line.python)
        remove(folder)
        site.mkdir(parents=True)
        for file in changed_files(self.repo, Applied(base=self.applied.base, trees=(tree,))):
            path = site / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read_blob(self.repo, file.after))
            # Python reuses compiled code if time and size agree, so the time encodes the content.
            stamp = int(file.after[:7], 16)
            os.utime(path, (stamp, stamp))
        return folder


def image_plan(project: Project, line_name: str) -> images.ImagePlan:
    """The image of a line's first SKU; all SKUs share its layers."""
    cell = project.cell(project.matrix.line[line_name].skus[0], line_name)
    options = images.BuildOptions(output=cache_root() / "work")
    return images.resolve(project, cell, options, images.choose_engine(ENGINE))


@contextmanager
def open_line(
    project: Project, line_name: str, runner: Runner, kind: str
) -> Iterator[LineEnvironment]:
    """The line's environment; builds what is missing or damaged in the cache.

    ``kind``: folder of the cache; the caller holds the lock of this kind and line. Raises
    EngineSetupError: the user is not root.
    """
    if os.geteuid() != 0:
        what = "proofs run on an overlay of the image's layers, which only root may mount"
        raise EngineSetupError(what, remedy="run it as root, e.g. in a container of its own")
    repo = SourceRepo()
    applied = check_line(project, line_name, repo)
    plan = image_plan(project, line_name)
    plan.require_disk()
    system = load_system(images.build_system(plan, runner))
    images.write_layers(plan, lambda: None, slim=False)
    if system.root is None:
        what = "the kept system has no unpacked root"
        remedy = "delete that folder and run again"
        raise CacheError(what, where=cache_root() / "systems", remedy=remedy)
    stored = [require_stored(group.key, checked=True) for group in reversed(plan.groups)]
    layers = [folder for layer in stored for folder in (layer.files, layer.code)]
    work = cache_root() / kind / line_name
    environment = LineEnvironment(
        plan=plan,
        repo=repo,
        applied=applied,
        lower_dirs=(_metadata(plan, work / "metadata"), *layers, system.root),
        config=system.config,
        work=work,
        runner=runner,
    )
    with kept_bytecode(environment.bytecode):
        yield environment


def _metadata(plan: images.ImagePlan, folder: Path) -> Path:
    """The published version and metadata, which an image has in its last layer."""
    remove(folder)
    site = folder / site_packages(plan.cell.line.python)
    site.mkdir(parents=True)
    info = f"vllm-{plan.cell.line.vllm}.dist-info/"
    with zipfile.ZipFile(Wheelhouse().verify(plan.lock.find(VLLM))) as wheel:
        names = [name for name in wheel.namelist() if name == GENERATED or name.startswith(info)]
        wheel.extractall(site, names)
    return folder


def ask_line(project: Project, line_name: str, runner: Runner) -> SelectionRecord:
    """Ask all questions of a line with its series, and of its release as published."""
    vllm = project.matrix.line[line_name].vllm
    with (
        exclusive(f"selection-{line_name}", wait=False),
        open_line(project, line_name, runner, "selection") as environment,
    ):

        def ask(name: str, tree: str, title: str, questions: Sequence[Question]) -> Rows:
            inputs = environment.work / name / "inputs"
            asking.write_inputs(inputs, questions)
            with report(f"{title}: {len(questions)} questions"):
                output = environment.run(name, tree, inputs, asking.ARGV)
            answers = asking.read_answers(output, questions, f"line {line_name}, {name}")
            return tuple(zip(questions, answers, strict=True))

        applied, title = environment.applied, f"vLLM {vllm} as published"
        asked = asking.line_questions(project.matrix, line_name)
        probes = asking.probe_questions(project.matrix, line_name)
        rows = ask("patched", applied.result, f"line {line_name}", (*asked, *probes))
        return SelectionRecord(
            line_name=line_name,
            vllm=vllm,
            made=datetime.now(UTC).date().isoformat(),
            inputs=selection_inputs(project, line_name),
            rows=rows[: len(asked)],
            probes=rows[len(asked) :],
            published=ask("published", applied.base, title, asking.grid_questions(project.matrix)),
        )


def ready(project: Project, line_name: str) -> str:
    """Why a dry load would have to install or build something first; "" if it is ready."""
    if os.geteuid() != 0:
        return "only root may mount the line's layers"
    if absent := [tool for tool in TOOLS if which(tool) is None]:
        return f"{', '.join(absent)} not installed"
    try:
        missing = sum(usable(each.key) is None for each in image_plan(project, line_name).groups)
    except ForgeError as error:
        return error.what
    return f"{missing} of the line's layers are not in the cache" if missing else ""


def dry_load(
    project: Project, line_name: str, profiles: Mapping[str, Profile], runner: Runner
) -> dict[str, loading.Answer]:
    """Let a line's vLLM, with its series, load checkpoints without data, on its first SKU."""
    where = f"line {line_name}"
    with (
        exclusive(f"inspect-{line_name}", wait=True),
        report(f"dry load on {where}"),
        open_line(project, line_name, runner, "inspect") as environment,
    ):
        inputs = environment.work / "inputs"
        loading.write_request(inputs, profiles, environment.plan.cell.sku)
        tree = environment.applied.result
        try:
            output = environment.run("dry-load", tree, inputs, LOAD_ARGV)
        except CommandFailedError as error:
            raise DryLoadError(error.what, where=f"{where}, {error.where}") from None
        return loading.read_answers(output, where, list(profiles))


def dry_loads(
    project: Project, names: Sequence[str], profile: Profile, resolve_by: str, runner: Runner
) -> dict[str, loading.Answer]:
    """Line -> its vLLM's answer; lines that cannot be asked, and may be left out, are missing.

    ``resolve_by``: ``rules`` asks none, ``auto`` those that are ready, ``vllm`` all.
    """
    if resolve_by == "rules" or (resolve_by == "auto" and not profile.tensors):
        return {}
    if not profile.tensors:
        what = "a dry load needs headers, and only the index is at hand"
        remedy = "fetch the shards, or leave out --resolve vllm"
        raise UsageError(what, where=profile.source, remedy=remedy)
    answers = {}
    for name in names:
        if resolve_by == "auto" and (why := ready(project, name)):
            console.print(f"line {name} is judged by rules, without its vLLM: {why}", markup=False)
            continue
        answers[name] = dry_load(project, name, {NAME: profile}, runner)[NAME]
    return answers
