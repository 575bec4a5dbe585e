"""Every generated page and block; ``vllm-forge docs`` writes them, ``--check`` compares them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_forge.host import atomic_path
from vllm_forge.matrix import schema_text
from vllm_forge.pages.checkpoints import checks, verdicts
from vllm_forge.pages.coverage import coverage
from vllm_forge.pages.errors import StalePageError
from vllm_forge.pages.markdown import put_block
from vllm_forge.pages.measurements import measurements, sizes
from vllm_forge.pages.patches import drift, seed_installer
from vllm_forge.pages.race import race
from vllm_forge.pages.readme import exit_codes, lines_table, skus_table
from vllm_forge.pages.selection import selection
from vllm_forge.pages.status import status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vllm_forge.project import Project

# Path from the root of the checkout -> its whole text.
PAGES: dict[str, Callable[[Project], str]] = {
    "docs/generated/checks.md": checks,
    "docs/generated/coverage.md": coverage,
    "docs/generated/drift.md": lambda project: project.read_json("records/drift.json", drift),
    "docs/generated/exit-codes.md": exit_codes,
    "docs/generated/measurements.md": measurements,
    "docs/generated/race.md": lambda project: project.read_json("records/race.json", race),
    "docs/generated/seed-installer.md": seed_installer,
    "docs/generated/selection.md": selection,
    "docs/generated/sizes.md": (
        lambda project: project.read_json("benchmarks/results/sizes.json", sizes)
    ),
    "docs/generated/status.md": status,
    "docs/generated/verdicts.md": verdicts,
    "matrix.schema.json": lambda _: schema_text(),
}
# Path -> name of each generated block of a page written by hand -> the block's text.
BLOCKS: dict[str, dict[str, Callable[[Project], str]]] = {
    "README.md": {"lines": lines_table, "skus": skus_table},
}


def _stale(project: Project, paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Path and right text of these pages (default: all) that are missing or differ."""
    for path in paths or (*PAGES, *BLOCKS):
        target = project.root / path
        current = target.read_text(encoding="utf-8") if target.exists() else None
        if path in PAGES:
            text = PAGES[path](project)
        else:
            text = target.read_text(encoding="utf-8")
            for name, make in BLOCKS[path].items():
                text = put_block(text, name, make(project), where=path)
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
    """Compare these pages (default: all) with what the records give.

    Raises:
        StalePageError: some differ, or are missing.
    """
    if stale := [path for path, _ in _stale(project, paths)]:
        raise StalePageError(
            f"{len(stale)} generated pages are out of date",
            where=", ".join(stale),
            remedy="run: nox -s docs",
        )
