"""Which row is meant: a preset by its short name, and one of its artifacts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_forge.matrix.errors import UnsupportedCellError
from vllm_forge.matrix.load import perhaps
from vllm_forge.serve.errors import UnknownArtifactError, UnknownPresetError

if TYPE_CHECKING:
    from vllm_forge.matrix import Artifact, ImageCell, Matrix, Preset


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A point of the matrix to serve: an image's cell, a preset and an artifact."""

    cell: ImageCell
    preset_name: str
    preset: Preset
    artifact_name: str
    artifact: Artifact

    def why_not(self, line: str) -> str | None:
        """Why a line does not serve this; None if it does."""
        return self.artifact.why_not(line, drafting=self.preset.speculative_tokens > 0)

    def require_served(self) -> None:
        """Refuse what the cell's line does not serve.

        Raises:
            UnsupportedCellError: with the reason.
        """
        if (reason := self.why_not(self.cell.line_name)) is not None:
            raise UnsupportedCellError(
                f"line {self.cell.line_name} does not serve {self.artifact_name} with preset "
                f"{self.preset_name}: {reason}",
                where=f"matrix.toml, artifact.{self.artifact_name}.unserved",
                remedy="choose another --line, --artifact or --preset",
            )

    @property
    def short_name(self) -> str:
        """The preset's name without its SKU."""
        return self.preset_name.removeprefix(f"{self.cell.sku_name}-")


def presets_of(matrix: Matrix, sku: str) -> dict[str, str]:
    """Short name -> name of each preset of a SKU, in the matrix's order."""
    return {
        name.removeprefix(f"{sku}-"): name
        for name, preset in matrix.preset.items()
        if preset.sku == sku
    }


def find_preset(matrix: Matrix, sku: str, wanted: str) -> str:
    """The name of a SKU's preset, given by its name or its short name.

    Raises:
        UnknownPresetError: with the nearest name.
    """
    known = presets_of(matrix, sku)
    if wanted in known:
        return known[wanted]
    if wanted in known.values():
        return wanted
    raise UnknownPresetError(
        f"no preset {wanted!r} of {sku} in matrix.toml. {perhaps(wanted, known)}",
        remedy=f"presets of {sku}: {', '.join(known) or 'none'}",
    )


def find_artifact(matrix: Matrix, preset_name: str, wanted: str | None) -> str:
    """One of a preset's artifacts; None means its first.

    Raises:
        UnknownArtifactError: no such artifact, or one that the preset does not serve.
    """
    served = matrix.preset[preset_name].artifacts
    if wanted is None:
        return served[0]
    if wanted in served:
        return wanted
    if wanted in matrix.artifact:
        what = f"preset {preset_name} does not serve artifact {wanted}."
    else:
        what = f"no artifact {wanted!r} in matrix.toml. {perhaps(wanted, matrix.artifact)}"
    raise UnknownArtifactError(what, remedy=f"{preset_name} serves: {', '.join(served)}")


def serving(matrix: Matrix, cell: ImageCell, preset: str, artifact: str | None = None) -> Serving:
    """The rows that a cell, a preset's name and an artifact's name stand for.

    Raises:
        UnknownPresetError, UnknownArtifactError.
    """
    preset_name = find_preset(matrix, cell.sku_name, preset)
    artifact_name = find_artifact(matrix, preset_name, artifact)
    return Serving(
        cell=cell,
        preset_name=preset_name,
        preset=matrix.preset[preset_name],
        artifact_name=artifact_name,
        artifact=matrix.artifact[artifact_name],
    )
