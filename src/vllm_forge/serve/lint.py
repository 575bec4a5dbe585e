"""Lint of presets, by what a line's own vLLM answers: each preset with each artifact.

The facts are the recorded kernel selection's: vLLM's argument parser, its environment variables,
the configuration that it resolves.
"""

from collections.abc import Iterator, Sequence

from vllm_forge.kernels.selection.questions import artifact_config, grid_question, preset_question
from vllm_forge.kernels.selection.record import SelectionRecord, require_fresh
from vllm_forge.matrix import Matrix
from vllm_forge.project import Project
from vllm_forge.serve.errors import PresetLintError
from vllm_forge.serve.rules import LintCase, LintFinding, judge, notes


def cases(matrix: Matrix, recorded: SelectionRecord) -> Iterator[LintCase]:
    """All cases of a line, in the matrix's order."""
    line = matrix.line[recorded.line_name]
    answers, published = recorded.answers, recorded.published_answers
    for name, preset in matrix.preset.items():
        if preset.sku not in line.skus:
            continue
        for artifact in preset.artifacts:
            yield LintCase(
                matrix=matrix,
                preset_name=name,
                artifact_name=artifact,
                line_name=recorded.line_name,
                answer=answers[preset_question(name, artifact)],
                published={
                    variable: published[grid_question(preset.sku, artifact, variable)]
                    for variable in matrix.retired
                },
                config=artifact_config(artifact),
            )


def lint_line(project: Project, line_name: str) -> tuple[list[LintFinding], list[str]]:
    """Findings, and notes on what is doubtful and no fault."""
    found = list(cases(project.matrix, require_fresh(project, line_name)))
    texts = dict.fromkeys(note for case in found for note in notes(case))
    return [finding for case in found for finding in judge(case)], list(texts)


def require_clean(findings: Sequence[LintFinding]) -> None:
    if findings:
        what = f"{len(findings)} findings:\n" + "\n".join(finding.text() for finding in findings)
        remedy = "fix the rows as each finding says"
        raise PresetLintError(what, where="matrix.toml, [preset]", remedy=remedy)
