"""Every preset, with each of its artifacts, on each line of its SKU: judged by the rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_forge.kernels.selection import (
    artifact_config,
    grid_question,
    preset_question,
    require_fresh,
)
from vllm_forge.serve.case import Case
from vllm_forge.serve.errors import PresetLintError
from vllm_forge.serve.rules import judge

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from vllm_forge.kernels.selection import Recorded
    from vllm_forge.matrix import Matrix
    from vllm_forge.serve.case import Finding


def cases(matrix: Matrix, recorded: Recorded) -> Iterator[Case]:
    """All cases of a line, in the matrix's order."""
    line = matrix.line[recorded.line_name]
    answers, published = recorded.answers, recorded.published_answers
    for name, preset in matrix.preset.items():
        if preset.sku not in line.skus:
            continue
        for artifact in preset.artifacts:
            yield Case(
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


def lint_line(root: Path, matrix: Matrix, line_name: str) -> list[Finding]:
    """All findings on a line.

    Raises:
        SelectionFileError, SelectionStaleError: the facts are missing, or of other presets,
            artifacts, series or locks; with the command that writes them anew.
    """
    recorded = require_fresh(root, matrix, line_name)
    return [finding for case in cases(matrix, recorded) for finding in judge(case)]


def require_clean(findings: Sequence[Finding]) -> None:
    """Raise when there is a finding.

    Raises:
        PresetLintError: with all of them.
    """
    if findings:
        raise PresetLintError(
            f"{len(findings)} findings:\n" + "\n".join(finding.text() for finding in findings),
            where="matrix.toml, [preset]",
            remedy="mend the rows; each finding says how",
        )
