"""Dry loads of checkpoints by a line's own vLLM, in the environment that its images have."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm_forge.checkpoints.errors import DryLoadError
from vllm_forge.checkpoints.inspect.dry_load import (
    PROGRAM,
    Answers,
    read_answers,
    write_request,
)
from vllm_forge.errors import ForgeError
from vllm_forge.host import cache_root, exclusive, report, which
from vllm_forge.host.errors import CommandFailedError
from vllm_forge.images import BuildOptions, choose_engine, resolve
from vllm_forge.images.engine import ContainerRun
from vllm_forge.images.store import stored
from vllm_forge.matrix import image_cell
from vllm_forge.patches import check_line
from vllm_forge.project import Project
from vllm_forge.proofs.environment import ENGINE, PYTHON, open_line, require_root
from vllm_forge.sources import SourceRepo

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from vllm_forge.checkpoints.inspect.profile import Profile
    from vllm_forge.host import Runner
    from vllm_forge.matrix import Matrix

TOOLS = ("buildah", "runc", "unshare")


def ready(root: Path, matrix: Matrix, line_name: str) -> str:
    """Why a dry load on that line would have to install or build something first; "" if not."""
    if os.geteuid() != 0:
        return "only root may mount the line's layers"
    if absent := [tool for tool in TOOLS if which(tool) is None]:
        return f"{', '.join(absent)} not installed"
    line = matrix.line[line_name]
    try:
        cell = image_cell(matrix, root, line.skus[0], line_name)
        plan = resolve(
            Project(root), cell, BuildOptions(output=cache_root() / "work"), choose_engine(ENGINE)
        )
        missing = sum(stored(group.key) is None for group in plan.groups)
    except ForgeError as error:
        return error.what
    return f"{missing} of the line's layers are not in the cache" if missing else ""


def dry_load(
    root: Path,
    matrix: Matrix,
    line_name: str,
    profiles: Mapping[str, Profile],
    runner: Runner,
) -> Answers:
    """Let a line's vLLM, patched as its images have it, load checkpoints without their data.

    Args:
        root: the checkout.
        matrix: its matrix.
        line_name: a line; its first SKU is declared.
        profiles: name -> checkpoint, with headers.
        runner: runs the engine.

    Raises:
        EngineSetupError: not root.
        DryLoadError: it gave no answer.
        ForgeError: as the steps of a build say.
    """
    require_root()
    line = matrix.line[line_name]
    work = cache_root() / "inspect" / line_name
    with exclusive(f"inspect-{line_name}", wait=True), report(f"dry load on line {line_name}"):
        repo = SourceRepo()
        applied = check_line(root, line_name, line, repo)
        cell = image_cell(matrix, root, line.skus[0], line_name)
        environment = open_line(cell, runner, work)
        write_request(environment.inputs, profiles, cell.sku)
        tree = environment.write_tree(repo, applied.base, applied.result, "patched")
        run = ContainerRun(
            layout=work,
            config=environment.config,
            name="dry-load",
            lower_dirs=(tree, *environment.lower_dirs),
            inputs=environment.inputs,
            argv=(PYTHON, f"/mnt/{PROGRAM}"),
            work=work / "run",
            bytecode=work / "bytecode",
        )
        try:
            output = environment.plan.engine.run_in_image(runner, run)
        except CommandFailedError as error:
            raise DryLoadError(error.what, where=f"line {line_name}, {error.where}") from None
        return read_answers(output, f"line {line_name}", list(profiles))
