"""Locks and downloads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_forge.host import console, report

if TYPE_CHECKING:
    import argparse

    from vllm_forge.commands.register import Commands
    from vllm_forge.project import Project


def register(choices: Commands) -> None:
    """Add this module's commands."""
    one = choices.add_parser("lock", help="resolve a line, write its lock")
    one.add_argument("--line")
    one.add_argument("--tools", action="store_true", help="the quantization tools' lock instead")
    one.set_defaults(call=lock)

    one = choices.add_parser("fetch", help="download a line's wheels")
    one.add_argument("--line")
    one.set_defaults(call=fetch)


def lock(project: Project, args: argparse.Namespace) -> None:
    """Resolve a line and write its lock."""
    from vllm_forge.checkpoints.quantize.environment import make_lock as make_tool_lock
    from vllm_forge.sources import Index, make_lock

    if args.tools:
        with report("lock the quantization tools"):
            console.print(str(make_tool_lock(project.root)))
        return
    name, line = project.line(args.line)
    with report(f"lock line {name}"):
        made = make_lock(project.root, name, line, project.matrix.base, Index())
    total = sum(wheel.size for wheel in made.wheels)
    console.print(f"{made.path}: {len(made.wheels)} wheels, {total / 1e9:.2f} GB")


def fetch(project: Project, args: argparse.Namespace) -> None:
    """Download a line's wheels into the cache."""
    from vllm_forge.sources import Wheelhouse, read_lock

    name, line = project.line(args.line)
    made = read_lock(project.root, name, line, project.matrix.base)
    with report(f"fetch {len(made.wheels)} wheels of line {name}"):
        Wheelhouse().fetch(made.wheels)
