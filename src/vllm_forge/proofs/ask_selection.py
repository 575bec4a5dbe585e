"""Asks a line's vLLM what it selects, in the environment of its images."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_forge.host import cache_root, exclusive, report
from vllm_forge.images.engine import ContainerRun
from vllm_forge.kernels.selection import (
    ARGV,
    line_questions,
    published_questions,
    read_answers,
    write_inputs,
)
from vllm_forge.matrix import image_cell
from vllm_forge.patches import check_line
from vllm_forge.proofs.environment import open_line, require_root
from vllm_forge.sources import SourceRepo

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vllm_forge.host import Runner
    from vllm_forge.kernels.selection import Answer, Question
    from vllm_forge.matrix import Matrix
    from vllm_forge.proofs.environment import Environment


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Questions and answers of a line with its series, and of its release as published."""

    questions: tuple[Question, ...]
    answers: tuple[Answer, ...]
    published_questions: tuple[Question, ...]
    published_answers: tuple[Answer, ...]
    seconds: float


def ask_line(root: Path, matrix: Matrix, line_name: str, runner: Runner) -> Asked:
    """Ask all questions of a line.

    Raises:
        EngineSetupError: not root.
        BusyError: another process asks this line.
        OracleFailedError: no answers, or our own code failed inside.
        ForgeError: as the steps of a build say.
    """
    require_root()
    line = matrix.line[line_name]
    questions, published = line_questions(matrix, line_name), published_questions(matrix)
    with exclusive(f"oracle-{line_name}", wait=False):
        repo = SourceRepo()
        applied = check_line(root, line_name, line, repo)
        work = cache_root() / "oracle" / line_name
        cell = image_cell(matrix, root, line.skus[0], line_name)
        environment = open_line(cell, runner, work)
        start = time.monotonic()
        trees = [
            environment.write_tree(repo, applied.base, tree, name)
            for name, tree in (("patched", applied.result), ("published", applied.base))
        ]
        with report(f"line {line_name}: {len(questions)} questions"):
            answers = _ask(environment, runner, trees[0], questions)
        seconds = time.monotonic() - start
        with report(f"vLLM {line.vllm} as published: {len(published)} questions"):
            others = _ask(environment, runner, trees[1], published)
    return Asked(
        questions=questions,
        answers=answers,
        published_questions=published,
        published_answers=others,
        seconds=seconds,
    )


def _ask(
    environment: Environment, runner: Runner, tree: Path, questions: Sequence[Question]
) -> tuple[Answer, ...]:
    """One run inside, on the tree whose changed files are in a folder."""
    folder = tree.parent
    write_inputs(folder / "inputs", questions)
    run = ContainerRun(
        layout=folder,
        config=environment.config,
        name=folder.name,
        lower_dirs=(tree, *environment.lower_dirs),
        inputs=folder / "inputs",
        argv=ARGV,
        work=folder,
        bytecode=environment.work / "bytecode",
    )
    output = environment.plan.engine.run_in_image(runner, run)
    where = f"line {environment.plan.cell.line_name}, {folder.name}"
    return read_answers(output, questions, where)
