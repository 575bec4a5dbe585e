"""What is made from matrix.toml itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_forge.host import atomic_path
from vllm_forge.matrix import schema_text

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
    with atomic_path(project.root / "matrix.schema.json") as aside:
        aside.write_text(schema_text())
