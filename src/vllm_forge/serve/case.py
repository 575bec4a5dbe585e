"""What is judged, and what is found: a preset with one artifact on one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_forge.kernels.selection.model import Answer
    from vllm_forge.matrix import Line, Matrix, Preset


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something to mend: of which preset, for which artifact and line, and how."""

    preset: str
    artifact: str
    line: str
    what: str
    remedy: str

    def text(self) -> str:
        """As `nox -s lint` prints it."""
        return (
            f"preset {self.preset}, {self.artifact}, line {self.line}: {self.what}\n"
            f"    remedy: {self.remedy}"
        )


@dataclass(frozen=True, kw_only=True)
class Case:
    """A preset with one of its artifacts on one line, and what was found out about it.

    Attributes:
        answer: of the line's vLLM, with the line's series applied.
        published: variable -> the answer of the release as published, to the same question
            with that retired variable set.
        config: the artifact's config.json.
    """

    matrix: Matrix
    preset_name: str
    artifact_name: str
    line_name: str
    answer: Answer
    published: Mapping[str, Answer]
    config: Mapping[str, Any]

    @property
    def preset(self) -> Preset:
        """The preset's row."""
        return self.matrix.preset[self.preset_name]

    @property
    def line(self) -> Line:
        """The line's row."""
        return self.matrix.line[self.line_name]

    @property
    def release(self) -> str:
        """How messages call the line's vLLM."""
        return f"vLLM {self.line.vllm}"

    def finding(self, what: str, remedy: str) -> Finding:
        """A finding about this case."""
        return Finding(
            preset=self.preset_name,
            artifact=self.artifact_name,
            line=self.line_name,
            what=what,
            remedy=remedy,
        )
