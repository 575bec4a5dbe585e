"""The blocks of README.md that follow from matrix.toml, and the table of exit codes."""

from __future__ import annotations

import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Iterator

import vllm_forge
from vllm_forge.errors import ForgeError, UsageError
from vllm_forge.pages.markdown import table
from vllm_forge.patches import read_series
from vllm_forge.project import Project
from vllm_forge.serve.deployment import presets_of


def lines_table(project: Project) -> str:
    """One row per line: its pins, number of patches and SKUs."""
    matrix = project.matrix
    rows = []
    for name, line in matrix.line.items():
        skus = [f"{sku} (development)" if matrix.sku[sku].development else sku for sku in line.skus]
        shown = f"**{name}** (default)" if name == matrix.default_line else name
        count = len(read_series(project.root / line.series))
        rows.append([shown, line.vllm, line.torch, count, ", ".join(skus)])
    return table(["line", "vLLM", "torch", "patches", "SKUs"], rows)


def skus_table(project: Project) -> str:
    """One row per SKU: its build command and its presets."""
    matrix = project.matrix
    rows = []
    arches = [sku.arch for sku in matrix.sku.values()]
    for name, sku in matrix.sku.items():
        alone = arches.count(sku.arch) == 1  # as noxfile.py names its sessions
        session = f"nox -s build-{sku.arch.replace('_', '') if alone else name}"
        rows.append(
            [
                sku.device,
                name,
                f"`{session}`",
                ", ".join(f"`{p}`" for p in presets_of(matrix, name)),
            ]
        )
    return table(["GPU", "SKU", "build", "presets"], rows)


def exit_codes(_: Project) -> str:
    """docs/generated/exit-codes.md."""
    for module in pkgutil.walk_packages(vllm_forge.__path__, "vllm_forge."):
        if module.name.endswith(".errors"):
            importlib.import_module(module.name)
    rows: defaultdict[tuple[int, str], list[str]] = defaultdict(list)
    for kind in _classes(ForgeError):
        room = kind.__module__.removeprefix("vllm_forge.").removesuffix(".errors").partition(".")[0]
        rows[kind.exit_code, room].append(kind.__name__)
    cells = ([code, room, ", ".join(sorted(names))] for (code, room), names in sorted(rows.items()))
    return table(["exit", "part", "classes"], cells)


def _classes(kind: type[ForgeError]) -> Iterator[type[ForgeError]]:
    for child in kind.__subclasses__():
        if child is not UsageError and child.__module__.startswith("vllm_forge."):
            yield child
        yield from _classes(child)
