"""What is known of a cell's built image."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_forge.images.errors import BuildRecordError

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_forge.matrix import ImageCell


@dataclass(frozen=True, kw_only=True)
class BuiltImage:
    """An image that a build left in ``dist/``, by its record.

    Attributes:
        digest: ``sha256:<hex>`` of the manifest.
        size: bytes that a pull transfers.
        record: all of the record.
    """

    digest: str
    size: int
    record: dict[str, Any]


def record_path(cell: ImageCell) -> Path:
    """Where a build of the cell leaves its record by default."""
    return cell.root / "dist" / f"{cell.name}.json"


def built_image(cell: ImageCell) -> BuiltImage | None:
    """The cell's image; None where none was built here.

    Raises:
        BuildRecordError: there is a record, but it is not one.
    """
    path = record_path(cell)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return BuiltImage(digest=record["digest"], size=record["size"], record=record)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuildRecordError(
            f"not the record of a build: {type(error).__name__}: {error}",
            where=str(path),
            remedy=f"delete it and build again: {build_command(cell)}",
        ) from error


def build_command(cell: ImageCell) -> str:
    """The command that builds the cell's image and loads it into the engine."""
    line = f" --line {cell.line_name}"
    return f"nox -s build-{cell.sku.arch.replace('_', '')} --{line} --load"
