"""What is recorded of a line's packages: records/coverage/<line>.json."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.kernels.coverage.device_code import device_code
from vllm_forge.kernels.coverage.library import code_sizes, mapped
from vllm_forge.kernels.coverage.target import parse_capability

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vllm_forge.kernels.coverage.contract import Contract
    from vllm_forge.kernels.coverage.site_packages import Coverage, SitePackages


def line_record(
    *,
    line: str,
    vllm: str,
    lock: str,
    rows: str,
    contents: SitePackages,
    contracts: Mapping[str, tuple[str, Contract]],
) -> dict[str, Any]:
    """What is written to records/coverage/<line>.json.

    Args:
        line: name of the line.
        vllm: its release.
        lock: SHA-256 of its lock.
        rows: SHA-256 of families.toml.
        contents: its packages.
        contracts: SKU -> compute capability, and the contract of its cell.
    """
    coverage: dict[str, dict[str, Any]] = {}
    for name in contents.rows.family:
        coverage[name] = {}
        for sku, (capability, made) in contracts.items():
            finding = next((item for item in made.findings if item.family == name), None)
            found = contents.coverage(name, parse_capability(capability), line)
            coverage[name][sku] = {
                **_coverage(finding.coverage if finding else found),
                "needed_by": _needed_by(finding.needed_by) if finding else None,
                "exception": finding.exemption.reason if finding and finding.exemption else None,
            }
    return {
        "line": line,
        "vllm": vllm,
        "lock": lock,
        "families": rows,
        "skus": {sku: capability for sku, (capability, _) in contracts.items()},
        "coverage": coverage,
        "libraries": libraries(contents),
    }


def _needed_by(reasons: Sequence[str]) -> list[str]:
    return list(reasons) or ["every cell"]


def _coverage(found: Coverage | None) -> dict[str, Any]:
    if found is None:
        return {"verdict": None, "codes": [], "detail": ""}
    return {"verdict": found.verdict, "codes": list(found.codes), "detail": found.detail}


def libraries(contents: SitePackages) -> dict[str, dict[str, Any]]:
    """Every library with device code: its size, and bytes per target, by path."""
    found = {}
    for name, path in sorted(_shared_objects(contents.sites).items()):
        if contents.rows.patterns_of(name):
            code = contents.library(name, path).code
        else:
            with mapped(path) as buffer:
                code = code_sizes(device_code(buffer, str(path)))
        if code:
            found[name] = {"size": path.stat().st_size, "code": dict(code)}
    return found


def _shared_objects(sites: Iterable[Path]) -> dict[str, Path]:
    found = {}
    for site in sites:
        for folder, _, names in os.walk(site):
            for name in names:
                path = Path(folder, name)
                if ".so" in name and not path.is_symlink():
                    found[path.relative_to(site).as_posix()] = path
    return found
