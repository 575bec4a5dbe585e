"""The generated pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from vllm_forge.commands.register import Commands
    from vllm_forge.project import Project


def register(choices: Commands) -> None:
    """Add this module's command."""
    parser = choices.add_parser(
        "docs", help="write all generated pages from the records", allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="compare only; fail if one differs")
    parser.set_defaults(call=docs)


def docs(project: Project, args: argparse.Namespace) -> None:
    """Write or compare the generated pages."""
    from vllm_forge.pages.registry import check_pages, write_pages

    if args.check:
        check_pages(project)
        return
    for path in write_pages(project):
        print(path)
