"""What is made from matrix.toml itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from vllm_forge.commands.register import Commands
    from vllm_forge.project import Project


def register(choices: Commands) -> None:
    """Add this module's commands."""
    one = choices.add_parser("schema", help="write matrix.schema.json")
    one.set_defaults(call=schema)


def schema(project: Project, args: argparse.Namespace) -> None:
    """Write matrix.schema.json."""
    del args
    from vllm_forge.pages.registry import write_pages

    write_pages(project, "matrix.schema.json")
