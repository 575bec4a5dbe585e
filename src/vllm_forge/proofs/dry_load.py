"""Dry loads of checkpoints by a line's own vLLM, in the environment of its images."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from vllm_forge.checkpoints.errors import DryLoadError
from vllm_forge.checkpoints.fixtures.variants import cached_variant, load_variants
from vllm_forge.checkpoints.inspect import dry_load as loading
from vllm_forge.checkpoints.inspect.inspection import (
    DATA,
    VariantRow,
    Verdicts,
    inspect,
    variant_row,
)
from vllm_forge.checkpoints.inspect.manifest import nearest
from vllm_forge.checkpoints.inspect.profile import Profile
from vllm_forge.errors import ForgeError, UsageError
from vllm_forge.host import Runner, console, exclusive, report, which, write_whole
from vllm_forge.host.errors import CommandFailedError
from vllm_forge.images.store import usable
from vllm_forge.patches import read_dispositions
from vllm_forge.project import Project
from vllm_forge.proofs.environment import PYTHON, image_plan, open_line

NAME = "checkpoint"
DISPOSITIONS = "patches/vllm"
# An image's Python does not search the folder of a script.
ARGV = ("/usr/bin/env", "PYTHONPATH=/mnt", PYTHON, f"/mnt/{loading.PROGRAM}")
TOOLS = ("buildah", "runc", "unshare")


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
) -> loading.Answers:
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
            output = environment.run("dry-load", tree, inputs, ARGV)
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
        answers[name] = dry_load(project, name, {NAME: profile}, runner).cases[NAME]
    return answers


def record_verdicts(project: Project, runner: Runner, names: Collection[str] = ()) -> Path:
    """Let every line's vLLM load tiny checkpoints (default: all); write and return the record."""
    variants, matrix = load_variants(), project.matrix
    kept: dict[str, VariantRow] = {}
    if names:
        record = project.read_json(str(DATA), Verdicts.model_validate)
        kept = {name: row for name, row in record.variants.items() if name in variants}
    profiles = {name: Profile.open(cached_variant(project, name)) for name in names or variants}
    answers = {line: dry_load(project, line, profiles, runner) for line in matrix.line}
    releases = {name: line.vllm for name, line in matrix.line.items()}
    dispositions = read_dispositions(project.root / DISPOSITIONS)
    for name, profile in profiles.items():
        cases = {line: answer.cases[name] for line, answer in answers.items()}
        # What is broken is measured by what it was to be.
        artifact = nearest(profile) if variants[name].breaks else None
        inspection = inspect(profile, releases, dispositions, cases, artifact=artifact)
        kept[name] = variant_row(variants[name], inspection, matrix.default_line)
    device = matrix.sku[matrix.line[matrix.default_line].skus[0]].device
    rows = {name: kept[name] for name in variants if name in kept}
    verdicts = Verdicts(vllm=releases, device=device, variants=rows)
    write_whole(project.root / DATA, verdicts.text())
    return project.root / DATA
