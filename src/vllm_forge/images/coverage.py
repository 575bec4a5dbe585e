"""Which kernels each line has code for, on each SKU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_forge.images.content import wheel_groups
from vllm_forge.images.store import require_stored
from vllm_forge.images.wheels import site_packages
from vllm_forge.kernels.coverage import parse_capability
from vllm_forge.kernels.coverage.contract import Contract, contract, line_record, selections_of
from vllm_forge.kernels.coverage.families import digest
from vllm_forge.kernels.coverage.site_packages import SitePackages
from vllm_forge.kernels.selection.record import read_selection
from vllm_forge.project import Project

FOLDER = Path("records/coverage")


def line_coverage(project: Project, name: str) -> tuple[dict[str, Any], list[Contract]]:
    """The record of a line, and the contract of each of its cells."""
    line = project.matrix.line[name]
    cell = project.cell(line.skus[0], name)
    lock = project.lock(name)
    layers = [require_stored(group.key) for group in wheel_groups(cell, lock)]
    folders = [folder for layer in layers for folder in (layer.files, layer.code)]
    contents = SitePackages(tuple(folder / site_packages(line.python) for folder in folders))
    recorded = read_selection(project.records, name)
    contracts = {}
    for sku_name, sku in project.matrix.sku.items():
        contracts[sku_name] = (
            sku.compute_capability,
            (
                contract(
                    contents,
                    cell=project.cell(sku_name, name).name,
                    line=name,
                    capability=parse_capability(sku.compute_capability),
                    selections=selections_of(recorded.of_device(sku.device).answers),
                )
                if sku_name in line.skus
                else None
            ),
        )
    record = {"line": name, "vllm": line.vllm, "lock": lock.digest, "families": digest()}
    return record | line_record(contents, name, contracts), [
        of_cell for _, of_cell in contracts.values() if of_cell is not None
    ]
