"""What a line's vLLM was recorded to select for a preset as it is now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_forge.kernels.selection import preset_question, read_recorded
from vllm_forge.kernels.selection.recorded import path_of
from vllm_forge.matrix import serve_arguments

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_forge.kernels.selection import Answer
    from vllm_forge.matrix import Matrix


class Selections:
    """A line's recorded answers, for pages: where nothing was recorded, nothing is known.

    Whether they are of today's series and lock is what lint checks.

    Raises:
        SelectionFileError: the file is malformed.
    """

    def __init__(self, root: Path, line_name: str) -> None:
        known = path_of(root, line_name).is_file()
        rows = read_recorded(root, line_name).rows if known else ()
        self._rows = {question.name: (question, answer) for question, answer in rows}

    def of(self, matrix: Matrix, preset_name: str, artifact_name: str) -> Answer | None:
        """What was answered; None where the preset as it is now was not asked about."""
        row = self._rows.get(preset_question(preset_name, artifact_name))
        if row is None:
            return None
        question, answer = row
        arguments, environment = serve_arguments(matrix, preset_name)
        environment = {**matrix.sku[matrix.preset[preset_name].sku].env, **environment}
        same = question.arguments == tuple(arguments) and question.environment == environment
        return answer if same else None
