"""Every generated page and block; ``vllm-forge docs`` writes them, ``--check`` compares them."""

import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import vllm_forge
from vllm_forge.dispatch.site import Site
from vllm_forge.errors import ForgeError, UsageError
from vllm_forge.host import write_whole
from vllm_forge.matrix.cells import schema_text
from vllm_forge.pages import ci, records
from vllm_forge.pages.claims import claims
from vllm_forge.pages.errors import StalePageError
from vllm_forge.pages.faults import known_faults
from vllm_forge.pages.kernels import coverage, late_stops, selection
from vllm_forge.pages.markdown import put_block, table
from vllm_forge.pages.rehearsal import edges, rehearsals
from vllm_forge.pages.sessions import sessions
from vllm_forge.pages.status import status
from vllm_forge.patches import read_series
from vllm_forge.project import Project
from vllm_forge.serve.command import build_session
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
    for name, sku in matrix.sku.items():
        presets = ", ".join(f"`{preset}`" for preset in presets_of(matrix, name))
        rows.append([sku.device, name, f"`{build_session(matrix, name)}`", presets])
    return table(["GPU", "SKU", "build", "presets"], rows)


def build_times(project: Project) -> str:
    from vllm_forge.dispatch.builds import MEASURED  # noqa: PLC0415 - loads what downloads

    return _of(MEASURED.format(project.matrix.default_line), records.build_times)(project)


def build_forecast(project: Project) -> str:
    """Builds of all images on so many nodes."""
    from vllm_forge.dispatch import builds  # noqa: PLC0415 - loads what downloads

    matrix = project.matrix
    cells = [project.cell(sku, line) for line, row in matrix.line.items() for sku in row.skus]
    rows = builds.forecasts(project, builds.line_builds(project, cells))
    return table(builds.FORECAST_HEAD, [row.cells for row in rows])


def exit_codes(_: Project) -> str:
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


def _of(path: str, render: Callable[[Any], str]) -> Callable[[Project], str]:
    return lambda project: project.read_json(path, render)


# Page -> name of each of its generated blocks -> the block's text. "" is the whole file.
PAGES: dict[str, dict[str, Callable[[Project], str]]] = {
    f"{ci.WORKFLOWS}/ci.yml": {"": ci.github_ci},
    f"{ci.WORKFLOWS}/release.yml": {"": ci.github_release},
    "README.md": {"lines": lines_table, "skus": skus_table},
    "docs/generated/benchmarks.md": {"sessions": sessions},
    "docs/generated/build-times.md": {"speed": build_times},
    "docs/generated/checks.md": {"checks": records.checks},
    "docs/generated/claims.md": {"claims": claims},
    "docs/generated/coverage.md": {"coverage": coverage},
    "docs/generated/drift.md": {"drift": _of("records/drift.json", records.drift)},
    "docs/generated/exit-codes.md": {"exit-codes": exit_codes},
    "docs/generated/known-faults.md": {"faults": known_faults},
    "docs/generated/late-stops.md": {"late-stops": late_stops},
    "docs/generated/race.md": {"race": _of("records/race.json", records.race)},
    "docs/generated/rehearsal.md": {"rehearsal": rehearsals, "edges": edges},
    "docs/generated/seed-installer.md": {
        "seed-installer": _of("records/seed-installer.json", records.seed_installer)
    },
    "docs/generated/selection.md": {"selection": selection},
    "docs/generated/sizes.md": {"sizes": _of("benchmarks/results/sizes.json", records.sizes)},
    "docs/generated/status.md": {"status": status},
    "docs/generated/verdicts.md": {"verdicts": _of("records/verdicts.json", records.verdicts)},
    "docs/operate/build-hosts.md": {"forecast": build_forecast},
    "matrix.schema.json": {"": lambda _: schema_text()},
    "site.schema.json": {"": lambda _: schema_text(Site)},
}


def _stale(project: Project, paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Path and right text of these pages (default: all) that differ."""
    for path in paths or PAGES:
        target = project.root / path
        current = text = target.read_text(encoding="utf-8") if target.exists() else ""
        for name, make in PAGES[path].items():
            text = put_block(text, name, make(project), where=path) if name else make(project)
        if current != text:
            yield path, text


def write_pages(project: Project, *paths: str) -> list[str]:
    """Write these pages (default: all); returns those that changed."""
    changed = []
    for path, text in _stale(project, paths):
        write_whole(project.root / path, text)
        changed.append(path)
    return changed


def check_pages(project: Project, *paths: str) -> None:
    """Raise StalePageError if some of these pages (default: all) differ from the records."""
    if stale := [path for path, _ in _stale(project, paths)]:
        what = f"{len(stale)} generated pages are out of date"
        raise StalePageError(what, where=", ".join(stale), remedy="run: nox -s docs")
