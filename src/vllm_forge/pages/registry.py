"""Every generated page and block; ``vllm-forge docs`` writes them, ``--check`` compares them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from vllm_forge.host import atomic_path
from vllm_forge.matrix import schema_text
from vllm_forge.pages.checkpoints import checks, verdicts
from vllm_forge.pages.coverage import coverage
from vllm_forge.pages.errors import StalePageError
from vllm_forge.pages.markdown import put_block
from vllm_forge.pages.measurements import inspection, quantization, sizes, starts
from vllm_forge.pages.patches import drift, seed_installer
from vllm_forge.pages.race import race
from vllm_forge.pages.readme import exit_codes, lines_table, skus_table
from vllm_forge.pages.selection import selection
from vllm_forge.pages.status import status
from vllm_forge.project import Project

RESULTS = "benchmarks/results"
# Page -> name of each of its generated blocks -> the block's text. "" is the whole file.
PAGES: dict[str, dict[str, Callable[[Project], str]]] = {
    "README.md": {"lines": lines_table, "skus": skus_table},
    "docs/generated/checks.md": {"checks": checks},
    "docs/generated/coverage.md": {"coverage": coverage},
    "docs/generated/drift.md": {"drift": lambda p: p.read_json("records/drift.json", drift)},
    "docs/generated/exit-codes.md": {"exit-codes": exit_codes},
    "docs/generated/measurements.md": {
        "starts": lambda p: p.read_json(f"{RESULTS}/first-token.json", starts),
        "quantization": lambda p: p.read_json(f"{RESULTS}/quantize.json", quantization),
        "inspection": lambda p: p.read_json(f"{RESULTS}/inspect.json", inspection),
    },
    "docs/generated/race.md": {"race": lambda p: p.read_json("records/race.json", race)},
    "docs/generated/seed-installer.md": {"seed-installer": seed_installer},
    "docs/generated/selection.md": {"selection": selection},
    "docs/generated/sizes.md": {"sizes": lambda p: p.read_json(f"{RESULTS}/sizes.json", sizes)},
    "docs/generated/status.md": {"status": status},
    "docs/generated/verdicts.md": {"verdicts": verdicts},
    "matrix.schema.json": {"": lambda _: schema_text()},
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
        with atomic_path(project.root / path) as aside:
            aside.write_text(text, encoding="utf-8")
        changed.append(path)
    return changed


def check_pages(project: Project, *paths: str) -> None:
    """Raise StalePageError if some of these pages (default: all) differ from the records."""
    if stale := [path for path, _ in _stale(project, paths)]:
        raise StalePageError(
            f"{len(stale)} generated pages are out of date",
            where=", ".join(stale),
            remedy="run: nox -s docs",
        )
