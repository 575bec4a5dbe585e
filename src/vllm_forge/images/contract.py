"""No image without the kernels that vLLM selects for its SKU: the contract, as part of a build."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from vllm_forge.images.wheels import site_packages
from vllm_forge.kernels.coverage import (
    Contents,
    Contract,
    contract,
    parse_capability,
    selections_of,
)
from vllm_forge.kernels.coverage.families import digest
from vllm_forge.kernels.selection import require_fresh
from vllm_forge.kernels.selection.recorded import path_of
from vllm_forge.matrix import load

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vllm_forge.kernels.selection import Recorded
    from vllm_forge.matrix import ImageCell


def recorded_selection(cell: ImageCell) -> Recorded | None:
    """What the line's vLLM selects on a SKU; None for a SKU that no preset serves on.

    Raises:
        SelectionFileError, SelectionStaleError: it is not known for this lock and series.
    """
    matrix = load(cell.root)
    if not any(preset.sku == cell.sku_name for preset in matrix.preset.values()):
        return None
    return require_fresh(cell.root, matrix, cell.line_name).of_device(cell.sku.device)


def contract_inputs(cell: ImageCell) -> dict[str, str]:
    """Hashes of what the contract is a function of, beside the image."""
    path = path_of(cell.root, cell.line_name)
    recorded = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "none"
    return {"selection": recorded, "families": digest()}


def image_contract(cell: ImageCell, recorded: Recorded, folders: Sequence[Path]) -> Contract:
    """Compare what vLLM selects for the presets of a SKU with an image's files.

    Args:
        cell: SKU and line.
        recorded: of ``recorded_selection``.
        folders: the image's unpacked layers, lowest first.

    Raises:
        UnknownFamilyError: vLLM selects a backend that no row says the kernels of.
        UnknownFatbinError: a library's device code cannot be understood.
    """
    site = site_packages(cell.line.python)
    return contract(
        Contents(tuple(folder / site for folder in folders if (folder / site).is_dir())),
        cell=cell.name,
        line=cell.line_name,
        capability=parse_capability(cell.sku.compute_capability),
        selections=selections_of(recorded.answers),
    )
