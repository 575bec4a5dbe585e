"""Every generated page and block; ``vllm-forge docs`` writes them, ``--check`` compares them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_forge.host import atomic_path
from vllm_forge.matrix import schema_text
from vllm_forge.pages import (
    checks,
    coverage,
    drift,
    measurements,
    race,
    readme,
    seed_installer,
    selection,
    status,
    verdicts,
)
from vllm_forge.pages.errors import StalePageError
from vllm_forge.pages.markdown import put_block

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_forge.project import Project

# Path from the root of the checkout -> its whole text.
PAGES: dict[str, Callable[[Project], str]] = {
    "docs/generated/checks.md": checks.page,
    "docs/generated/coverage.md": coverage.page,
    "docs/generated/drift.md": drift.page,
    "docs/generated/exit-codes.md": readme.exit_codes,
    "docs/generated/measurements.md": measurements.page,
    "docs/generated/race.md": race.page,
    "docs/generated/seed-installer.md": seed_installer.page,
    "docs/generated/selection.md": selection.page,
    "docs/generated/sizes.md": measurements.sizes_page,
    "docs/generated/status.md": status.page,
    "docs/generated/verdicts.md": verdicts.page,
    "matrix.schema.json": lambda project: schema_text(),
}
# Path -> name of each generated block of a page written by hand -> the block's text.
BLOCKS: dict[str, dict[str, Callable[[Project], str]]] = {
    "README.md": {"lines": readme.lines_table, "skus": readme.skus_table},
}


def render(project: Project, path: str) -> str:
    """The text that a page should have.

    Raises:
        UsageError: a page written by hand lacks the marks of its block.
        ForgeError: the records cannot be read.
    """
    if path in PAGES:
        return PAGES[path](project)
    text = (project.root / path).read_text(encoding="utf-8")
    for name, make in BLOCKS[path].items():
        text = put_block(text, name, make(project), where=path)
    return text


def write_pages(project: Project, *paths: str) -> list[str]:
    """Write these pages (default: all); returns those that changed."""
    changed = []
    for path in paths or (*PAGES, *BLOCKS):
        text, target = render(project, path), project.root / path
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            with atomic_path(target) as aside:
                aside.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


def check_pages(project: Project, *paths: str) -> None:
    """Compare these pages (default: all) with what the records give.

    Raises:
        StalePageError: some differ, or are missing.
    """
    stale = []
    for path in paths or (*PAGES, *BLOCKS):
        target = project.root / path
        if not target.exists() or target.read_text(encoding="utf-8") != render(project, path):
            stale.append(path)
    if stale:
        raise StalePageError(
            f"{len(stale)} generated pages are out of date",
            where=", ".join(stale),
            remedy="run: nox -s docs",
        )
