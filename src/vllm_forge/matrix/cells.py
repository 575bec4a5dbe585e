"""matrix.toml, with the errors a person can act on, and its points: images and servers."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from vllm_forge.errors import problems, suggestion
from vllm_forge.host import read_data
from vllm_forge.matrix import errors
from vllm_forge.matrix.flags import parallel, values
from vllm_forge.matrix.model import Base, FrozenModel, LayerRule, Line, Matrix, Sku

# What a wheel has of the checkout that it was built from, see scripts/hatch_build.py.
PACKAGED = Path(__file__).resolve().parents[1] / "data"


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
        what = f"unknown line {wanted!r}{suggestion(wanted, matrix.line)}"
        raise errors.UnknownLineError(what, remedy="lines: " + ", ".join(matrix.line))
    return wanted, matrix.line[wanted]


def image_cell(matrix: Matrix, sku: str, line: str | None = None) -> ImageCell:
    """The cell of a SKU, given in any case by its name or by its arch (``sm_120``, ``sm120``)."""
    name = _find_sku(matrix, sku)
    line_name, row = find_line(matrix, line)
    if name in row.unsupported:
        raise errors.UnsupportedCellError(
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
    remedy = "SKUs: " + ", ".join(f"{sku} ({row.arch})" for sku, row in matrix.sku.items())
    product = "".join(filter(str.isalnum, name))  # "RTX 5090", "dgx-spark"
    if product in matrix.unsupported_sku:
        what = f"{name} is not supported: {matrix.unsupported_sku[product].reason}"
        where = f"matrix.toml, unsupported_sku.{product}"
        raise errors.UnsupportedCellError(what, where=where, remedy=remedy)
    arch = name.replace("_", "")
    of_arch = [sku for sku, row in matrix.sku.items() if row.arch.replace("_", "") == arch]
    if len(of_arch) > 1:
        what = f"{given!r} is the arch of more than one SKU: {', '.join(of_arch)}"
        raise errors.UnknownSkuError(what, remedy="ask for one of them by its name")
    if not of_arch:
        known = [*matrix.sku, *(row.arch for row in matrix.sku.values())]
        what = f"unknown SKU {given!r}{suggestion(name, known)}"
        raise errors.UnknownSkuError(what, remedy=remedy)
    return of_arch[0]


def serve_arguments(
    matrix: Matrix, preset_name: str, line_name: str | None = None
) -> tuple[list[str], dict[str, str]]:
    """What a preset adds to ``vllm serve MODEL``: arguments, each in one word, and environment.

    With a line also its parsers, each unless the preset sets it.
    """
    preset = matrix.preset[preset_name]
    args = [f"--tensor-parallel-size={preset.tensor_parallel}", *preset.flags]
    if preset.speculative_tokens:
        drafter = {
            "method": preset.speculative_method,
            "num_speculative_tokens": preset.speculative_tokens,
        }
        args.append(f"--speculative-config={json.dumps(drafter, separators=(',', ':'))}")
    chat = None if line_name is None else matrix.line[line_name].chat
    given = {name.replace("--no-", "--") for name in values(preset.flags)}
    args += [flag for flag in chat.flags if flag.partition("=")[0] not in given] if chat else []
    return args, dict(preset.env)


def gpus_of(matrix: Matrix, preset_name: str) -> int:
    """How many GPUs a server of a preset has, by all its parallel sizes."""
    return parallel(serve_arguments(matrix, preset_name)[0]).gpus


def find_root() -> Path:
    """Folder that holds matrix.toml: ``VLLM_FORGE_ROOT``, the working directory or a parent.

    Where there is none, an installed wheel has its data. Its user relies on the keys in them, so it
    takes no checkout that another user may have put above the working directory.
    """
    given = os.environ.get("VLLM_FORGE_ROOT")
    start = Path(given or Path.cwd()).resolve()
    packaged = not given and (PACKAGED / "matrix.toml").is_file()
    for folder in (start, *start.parents):
        if (path := folder / "matrix.toml").is_file():
            owners = {folder.stat().st_uid, path.stat().st_uid}
            if packaged and not owners <= {0, os.geteuid()}:
                what = "matrix.toml, in the working directory or above, is of another user"
                remedy = "run in another folder; to use that checkout, set VLLM_FORGE_ROOT"
                raise errors.MatrixFileError(what, where=path, remedy=remedy)
            return folder
    if packaged:
        return PACKAGED
    remedy = "run inside a checkout of vllm-forge, or set VLLM_FORGE_ROOT"
    raise errors.MatrixFileError("no matrix.toml here or above", where=start, remedy=remedy)


def load(root: Path) -> Matrix:
    """Parse ``root/matrix.toml``; one error has all that is wrong."""
    path = root / "matrix.toml"
    remedy = "correct the line that it names; it is TOML in UTF-8"
    data = read_data(path, dict, errors.MatrixFileError, what="matrix.toml", remedy=remedy)
    try:
        matrix = Matrix.model_validate(data)
    except ValidationError as error:
        what = "\n  - ".join(["matrix.toml is refused:", *problems(error, Matrix)])
        remedy = "the allowed keys and their meaning are in matrix.schema.json"
        if re.search(r"unknown key line\.\d+\.\d", what):
            remedy = f'write [line."0.27"], as a dot in a name needs quotes; {remedy}'
        raise errors.MatrixValueError(what, where=path, remedy=remedy) from None
    places = {"base.lock": matrix.base.lock or ""}
    for name, line in matrix.line.items():
        places |= {f"line.{name}.lock": line.lock, f"line.{name}.series": line.series}
    for field, given in places.items():
        target = (root / given).resolve()  # through links
        if not target.is_relative_to(root.resolve()):
            what = f"{field} is outside the checkout: {target}"
            remedy = "give a path below the folder of matrix.toml, without links out of it"
            raise errors.MatrixValueError(what, where=path, remedy=remedy)
    return matrix


def schema_text(model: type[FrozenModel] = Matrix) -> str:
    """The JSON schema of a file, as committed in matrix.schema.json or site.schema.json."""
    return json.dumps(model.model_json_schema(), indent=2, sort_keys=True) + "\n"
