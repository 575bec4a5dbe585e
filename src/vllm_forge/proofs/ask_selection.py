"""Ask a line's vLLM what it selects, in the environment of its images."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from vllm_forge.host import cache_root, exclusive, report
from vllm_forge.kernels.selection.mount import ARGV, read_answers, write_inputs
from vllm_forge.kernels.selection.questions import grid_questions, line_questions
from vllm_forge.kernels.selection.record import SelectionRecord, selection_inputs
from vllm_forge.patches import check_line
from vllm_forge.proofs.environment import open_line, require_root
from vllm_forge.sources import SourceRepo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_forge.host import Runner
    from vllm_forge.kernels.selection.model import Question
    from vllm_forge.kernels.selection.record import Rows
    from vllm_forge.project import Project


def ask_line(project: Project, line_name: str, runner: Runner) -> SelectionRecord:
    """Ask all questions of a line with its series, and of its release as published.

    Raises:
        EngineSetupError: not root.
        BusyError: another process asks this line.
        SelectionFailedError: no answers, or this project's code failed inside.
        ForgeError: an error of a build's steps.
    """
    require_root()
    line = project.matrix.line[line_name]
    with exclusive(f"selection-{line_name}", wait=False):
        repo = SourceRepo()
        applied = check_line(project, line_name, repo)
        environment = open_line(project, line_name, runner, cache_root() / "selection" / line_name)

        def ask(name: str, tree: str, title: str, questions: Sequence[Question]) -> Rows:
            inputs = environment.work / name / "inputs"
            write_inputs(inputs, questions)
            folder = environment.write_tree(repo, applied.base, tree, name)
            with report(f"{title}: {len(questions)} questions"):
                output = environment.run(runner, name, folder, inputs, ARGV)
            answers = read_answers(output, questions, f"line {line_name}, {name}")
            return tuple(zip(questions, answers, strict=True))

        return SelectionRecord(
            line_name=line_name,
            vllm=line.vllm,
            made=datetime.now(UTC).date().isoformat(),
            inputs=selection_inputs(project, line_name),
            rows=ask(
                "patched",
                applied.result,
                f"line {line_name}",
                line_questions(project.matrix, line_name),
            ),
            published=ask(
                "published",
                applied.base,
                f"vLLM {line.vllm} as published",
                grid_questions(project.matrix),
            ),
        )
