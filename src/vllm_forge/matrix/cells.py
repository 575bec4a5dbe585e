"""Points of the matrix: a SKU and a line, an image's; a preset, a server's."""

from __future__ import annotations

import json
from dataclasses import dataclass

from vllm_forge.host import suggestion
from vllm_forge.matrix.errors import (
    UnknownLineError,
    UnknownSkuError,
    UnsupportedCellError,
    UnsupportedSkuError,
)
from vllm_forge.matrix.model import Base, LayerRule, Line, Matrix, Sku


@dataclass(frozen=True, kw_only=True)
class ImageCell:
    """A SKU and a line: what one image is for."""

    sku_name: str
    sku: Sku
    line_name: str
    line: Line
    base: Base
    layers: tuple[LayerRule, ...]

    @property
    def name(self) -> str:
        return f"vllm-{self.line.vllm}-{self.sku_name}"


def find_line(matrix: Matrix, name: str | None) -> tuple[str, Line]:
    """The row of a line; None means the default one. UnknownLineError has the nearest name."""
    wanted = matrix.default_line if name is None else name
    if wanted not in matrix.line:
        raise UnknownLineError(
            f"unknown line {wanted!r}{suggestion(wanted, matrix.line)}",
            remedy="lines: " + ", ".join(matrix.line),
        )
    return wanted, matrix.line[wanted]


def image_cell(matrix: Matrix, sku: str, line: str | None = None) -> ImageCell:
    """The cell of a SKU, given in any case by its name or by its arch (``sm_120``, ``sm120``).

    Raises:
        UnknownSkuError: no such row, or an arch that several have.
        UnsupportedSkuError: a product that no line can serve.
        UnknownLineError: no such row.
        UnsupportedCellError: the line's row says that it cannot serve this SKU, and why.
    """
    name = _find_sku(matrix, sku)
    line_name, row = find_line(matrix, line)
    if name in row.unsupported:
        raise UnsupportedCellError(
            f"line {line_name} cannot serve {name} ({matrix.sku[name].arch}): "
            f"{row.unsupported[name]}",
            where=f"matrix.toml, line.{line_name}.unsupported.{name}",
            remedy="choose a line that can: "
            + (", ".join(n for n, r in matrix.line.items() if name in r.skus) or "none does"),
        )
    return ImageCell(
        sku_name=name,
        sku=matrix.sku[name],
        line_name=line_name,
        line=row,
        base=matrix.base,
        layers=matrix.layers,
    )


def _find_sku(matrix: Matrix, given: str) -> str:
    name = given.lower()
    if name in matrix.sku:
        return name
    if name in matrix.unsupported_sku:
        raise UnsupportedSkuError(
            f"{name} is not supported: {matrix.unsupported_sku[name].reason}",
            where=f"matrix.toml, unsupported_sku.{name}",
            remedy=f"SKUs: {_skus(matrix)}",
        )
    arch = name.replace("_", "")
    of_arch = [sku for sku, row in matrix.sku.items() if row.arch.replace("_", "") == arch]
    if len(of_arch) > 1:
        raise UnknownSkuError(
            f"{given!r} is the arch of more than one SKU: {', '.join(of_arch)}",
            remedy="ask for one of them by its name",
        )
    if not of_arch:
        known = [*matrix.sku, *(row.arch for row in matrix.sku.values())]
        raise UnknownSkuError(
            f"unknown SKU {given!r}{suggestion(name, known)}", remedy=f"SKUs: {_skus(matrix)}"
        )
    return of_arch[0]


def _skus(matrix: Matrix) -> str:
    return ", ".join(f"{name} ({row.arch})" for name, row in matrix.sku.items())


def serve_arguments(matrix: Matrix, preset_name: str) -> tuple[list[str], dict[str, str]]:
    """What a preset adds to ``vllm serve MODEL``.

    Returns:
        The arguments after the model, each option with its value in one word
        (``--name=value``), and the environment of the server.
    """
    preset = matrix.preset[preset_name]
    args = [f"--tensor-parallel-size={preset.tensor_parallel}", *preset.flags]
    if preset.speculative_tokens:
        drafter = {"method": "mtp", "num_speculative_tokens": preset.speculative_tokens}
        args.append(f"--speculative-config={json.dumps(drafter, separators=(',', ':'))}")
    return args, dict(preset.env)
