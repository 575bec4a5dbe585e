"""Why would a build do something?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from vllm_forge.commands.register import Commands
    from vllm_forge.project import Project


def register(choices: Commands) -> None:
    """Add this module's commands."""
    one = choices.add_parser(
        "why-rebuild", help="the inputs that changed since the last build", allow_abbrev=False
    )
    one.add_argument("--sku", required=True, help="a SKU or an arch of matrix.toml")
    one.add_argument("--line", help="vLLM line (default: the matrix's)")
    one.add_argument("--engine", help="docker or buildah (default: that of the last build)")
    one.add_argument("--base", default="rootfs", help="as given to the build")
    one.add_argument("--output", type=Path, help="as given to the build (default: dist/)")
    one.set_defaults(call=why_rebuild)


def why_rebuild(project: Project, args: argparse.Namespace) -> None:
    """Print what differs between a build's record and its inputs now."""
    from vllm_forge.images import BuildOptions, choose_engine, resolve
    from vllm_forge.images.rebuild_reasons import read_record, recorded_engine, why_rebuild

    cell = project.cell(args.sku, args.line)
    options = BuildOptions(
        output=args.output or project.root / "dist",
        base_image=None if args.base == "rootfs" else args.base,
    )
    record = read_record(options.output / f"{cell.name}.json")
    engine = args.engine or recorded_engine(record)
    # No engine need be here: its name is one of the inputs, and that is all.
    plan = resolve(project, cell, options, choose_engine(engine, dry_run=True))
    reason = why_rebuild(plan)
    print(f"{cell.name}: {reason.state}")
    for change in reason.changes:
        print(f"  {change.name}")
        for part in change.parts:
            print(f"    {part}")
