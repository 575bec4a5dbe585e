"""OpenVEX: what known vulnerabilities mean for an image, from hand-kept ``records/vex.toml``.

Each row names packages by purl, which must be in the image's SBOM as they are written: a row that
outlived its package says nothing, and is refused.

Source: github.com/openvex/spec, OPENVEX-SPEC.md v0.2.0.
"""

import os
from collections.abc import Iterator
from datetime import UTC, date, datetime, time
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from vllm_forge.host import read_data
from vllm_forge.images.layout import Image
from vllm_forge.matrix import FrozenModel, ImageCell
from vllm_forge.project import Project
from vllm_forge.release.errors import VexError
from vllm_forge.release.sbom import Document, make_sbom
from vllm_forge.release.statements import VEX, Statement, image_statement

FILE = "records/vex.toml"
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]+$", max_length=1000)]


class Row(FrozenModel):
    """``[[statement]]``: a vulnerability in packages of the images of some lines."""

    vulnerability: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.:-]+$")]
    packages: tuple[Annotated[str, Field(pattern=r"^pkg:[^\s]+$")], ...] = Field(min_length=1)
    lines: tuple[str, ...] = Field(min_length=1)
    status: Literal["not_affected", "affected", "fixed", "under_investigation"]
    justification: (
        Literal[
            "component_not_present",
            "vulnerable_code_not_present",
            "vulnerable_code_not_in_execute_path",
            "vulnerable_code_cannot_be_controlled_by_adversary",
            "inline_mitigations_already_exist",
        ]
        | None
    ) = None
    impact: Text | None = None
    action: Text | None = None
    date: date

    @model_validator(mode="after")
    def _says_why(self) -> Self:
        if self.status == "not_affected" and self.justification is None:
            raise ValueError("status not_affected needs a justification")
        if self.status == "affected" and self.action is None:
            raise ValueError("status affected needs an action")
        return self


class _File(FrozenModel):
    author: Text
    version: int = Field(ge=1)  # raised with every change
    statement: tuple[Row, ...] = Field(min_length=1)


def make_vex(
    project: Project, cell: ImageCell, image: Image, record: dict[str, Any]
) -> Statement | None:
    """The OpenVEX statement of an image; None where no row is about its line.

    Raises:
        VexError: the file is invalid, or a row names a line or package that is not there.
        SbomError: see ``make_sbom``.
    """
    path = project.root / FILE
    if not os.path.lexists(path):
        return None
    file = read_data(
        path, _File.model_validate, VexError, what="table of vulnerabilities",
        remedy="correct it; the fields are those of Row in release/vex.py",
    )  # fmt: skip
    for row in file.statement:
        if unknown := sorted(set(row.lines) - set(project.matrix.line)):
            raise _stale(row, f"line {unknown[0]}, which is not defined in matrix.toml")
    rows = [row for row in file.statement if cell.line_name in row.lines]
    if not rows:
        return None
    document = make_sbom(project, cell, image, record)
    known = set(_purls(document["components"]))
    for row in rows:
        if missing := [purl for purl in row.packages if purl not in known]:
            raise _stale(row, f"{missing[0]}, which the SBOM of {cell.name} does not have")
    product = document["metadata"]["component"]["purl"]
    predicate = {
        "@context": VEX,
        "@id": f"https://vllm-forge.dev/vex/sha256-{image.digest}",
        "author": file.author,
        "timestamp": _time(max(row.date for row in rows)),
        "version": file.version,
        "statements": [_statement(row, product, image.digest) for row in rows],
    }
    return image_statement(cell, image, VEX, predicate)


def _statement(row: Row, product: str, digest: str) -> dict[str, Any]:
    fields = {
        "vulnerability": {"name": row.vulnerability},
        "timestamp": _time(row.date),
        "products": [
            {
                "@id": product,
                "hashes": {"sha-256": digest},
                "subcomponents": [{"@id": purl} for purl in row.packages],
            }
        ],
        "status": row.status,
        "justification": row.justification,
        "impact_statement": row.impact,
        "action_statement": row.action,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _purls(components: list[Document]) -> Iterator[str]:
    """Of components, those nested in them, and the releases that they were patched from."""
    for row in components:
        if "purl" in row:
            yield row["purl"]
        yield from _purls(row.get("components", []))
        yield from _purls(row.get("pedigree", {}).get("ancestors", []))


def _time(day: date) -> str:
    return datetime.combine(day, time.min, UTC).isoformat()


def _stale(row: Row, what: str) -> VexError:
    what = f"the row of {row.vulnerability} names {what}"
    remedy = "change the row for the present packages, or delete it"
    return VexError(what, where=FILE, remedy=remedy)
