"""Points of the matrix that an image is built for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllm_forge.matrix.errors import (
    UnknownLineError,
    UnknownSkuError,
    UnsupportedCellError,
)
from vllm_forge.matrix.load import perhaps
from vllm_forge.matrix.model import Base, LayerRule, Line, Matrix, Sku


@dataclass(frozen=True, kw_only=True)
class ImageCell:
    """A SKU and a line: what one image is for."""

    root: Path
    sku_name: str
    sku: Sku
    line_name: str
    line: Line
    base: Base
    layers: tuple[LayerRule, ...]

    @property
    def name(self) -> str:
        """Used for the output folder and the image name."""
        return f"vllm-{self.line.vllm}-{self.sku_name}"


def find_line(matrix: Matrix, name: str | None) -> tuple[str, Line]:
    """The row of a line; None means the default one.

    Raises:
        UnknownLineError: with the nearest name.
    """
    wanted = matrix.default_line if name is None else name
    if wanted not in matrix.line:
        raise UnknownLineError(
            f"no line {wanted!r} in matrix.toml. {perhaps(wanted, matrix.line)}",
            remedy="lines: " + ", ".join(matrix.line),
        )
    return wanted, matrix.line[wanted]


def find_lines(matrix: Matrix, name: str | None) -> list[str]:
    """The name of a line, where one was asked for; None means all of them.

    Raises:
        UnknownLineError: with the nearest name.
    """
    return list(matrix.line) if name is None else [find_line(matrix, name)[0]]


def image_cell(matrix: Matrix, root: Path, sku: str, line: str | None = None) -> ImageCell:
    """The cell of a SKU, given by its name or by its arch (``sm_120``, ``sm120``).

    Raises:
        UnknownSkuError: no such row, or an arch that several have.
        UnknownLineError: no such row.
        UnsupportedCellError: the line's row says that it cannot serve this SKU, and why.
    """
    wanted = sku.replace("_", "")
    of_arch = [name for name, row in matrix.sku.items() if row.arch.replace("_", "") == wanted]
    if sku not in matrix.sku and len(of_arch) > 1:
        raise UnknownSkuError(
            f"{sku!r} is the arch of more than one SKU: {', '.join(of_arch)}",
            remedy="ask for one of them by its name",
        )
    sku_name = sku if sku in matrix.sku else "".join(of_arch)
    if not sku_name:
        known = [*matrix.sku, *(row.arch for row in matrix.sku.values())]
        raise UnknownSkuError(
            f"no SKU or arch {sku!r} in matrix.toml. {perhaps(sku, known)}",
            remedy="SKUs: " + ", ".join(f"{n} ({r.arch})" for n, r in matrix.sku.items()),
        )
    line_name, row = find_line(matrix, line)
    if sku_name in row.unsupported:
        raise UnsupportedCellError(
            f"line {line_name} cannot serve {sku_name} ({matrix.sku[sku_name].arch}): "
            f"{row.unsupported[sku_name]}",
            where=f"matrix.toml, line.{line_name}.unsupported.{sku_name}",
            remedy="choose a line that can: "
            + (", ".join(n for n, r in matrix.line.items() if sku_name in r.skus) or "none does"),
        )
    return ImageCell(
        root=root,
        sku_name=sku_name,
        sku=matrix.sku[sku_name],
        line_name=line_name,
        line=row,
        base=matrix.base,
        layers=matrix.layers,
    )
