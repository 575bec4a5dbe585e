"""Generated pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_forge.commands.parsers import Commands, command

if TYPE_CHECKING:
    import argparse

    from vllm_forge.project import Project


def register(choices: Commands) -> None:
    """Add this module's commands."""
    one = command(choices, "docs", docs, help="write all generated pages from the records")
    one.add_argument("--check", action="store_true", help="compare only; fail if one differs")
    command(choices, "schema", schema, help="write matrix.schema.json")


def docs(project: Project, args: argparse.Namespace) -> None:
    """Write or compare the generated pages."""
    from vllm_forge.pages.registry import check_pages, write_pages

    if args.check:
        check_pages(project)
        return
    for path in write_pages(project):
        print(path)


def schema(project: Project, _: argparse.Namespace) -> None:
    """Write matrix.schema.json."""
    from vllm_forge.pages.registry import write_pages

    write_pages(project, "matrix.schema.json")
