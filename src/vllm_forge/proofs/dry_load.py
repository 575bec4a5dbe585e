"""Dry loads of checkpoints by a line's own vLLM, in the environment of its images."""

import os
from collections.abc import Mapping, Sequence

from vllm_forge.checkpoints.errors import DryLoadError
from vllm_forge.checkpoints.inspect import dry_load as loading
from vllm_forge.checkpoints.inspect.profile import Profile
from vllm_forge.errors import ForgeError, UsageError
from vllm_forge.host import Runner, console, exclusive, report, which
from vllm_forge.host.errors import CommandFailedError
from vllm_forge.images.store import usable
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
        answers[name] = dry_load(project, name, {NAME: profile}, runner)[NAME]
    return answers
