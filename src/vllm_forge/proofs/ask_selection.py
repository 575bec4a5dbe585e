"""Ask a line's vLLM what it selects, in the environment of its images."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from vllm_forge.host import Runner, exclusive, report
from vllm_forge.kernels.selection.model import Question
from vllm_forge.kernels.selection.mount import ARGV, read_answers, write_inputs
from vllm_forge.kernels.selection.questions import grid_questions, line_questions
from vllm_forge.kernels.selection.record import Rows, SelectionRecord, selection_inputs
from vllm_forge.project import Project
from vllm_forge.proofs.environment import open_line


def ask_line(project: Project, line_name: str, runner: Runner) -> SelectionRecord:
    """Ask all questions of a line with its series, and of its release as published.

    Raises:
        BusyError: another process asks this line.
        ForgeError: an error of open_line or read_answers.
    """
    vllm = project.matrix.line[line_name].vllm
    with exclusive(f"selection-{line_name}", wait=False):
        environment = open_line(project, line_name, runner, "selection")

        def ask(name: str, tree: str, title: str, questions: Sequence[Question]) -> Rows:
            inputs = environment.work / name / "inputs"
            write_inputs(inputs, questions)
            folder = environment.write_tree(tree, name)
            with report(f"{title}: {len(questions)} questions"):
                output = environment.run(runner, name, folder, inputs, ARGV)
            answers = read_answers(output, questions, f"line {line_name}, {name}")
            return tuple(zip(questions, answers, strict=True))

        applied, title = environment.applied, f"vLLM {vllm} as published"
        asked = line_questions(project.matrix, line_name)
        return SelectionRecord(
            line_name=line_name,
            vllm=vllm,
            made=datetime.now(UTC).date().isoformat(),
            inputs=selection_inputs(project, line_name),
            rows=ask("patched", applied.result, f"line {line_name}", asked),
            published=ask("published", applied.base, title, grid_questions(project.matrix)),
        )
