"""What is a cell?"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from vllm_forge.commands.register import Commands
    from vllm_forge.project import Project


WIDTH = 120


def register(choices: Commands) -> None:
    """Add this module's commands."""
    one = choices.add_parser(
        "plan", help="what a cell is: pins, kernels, needs, command", allow_abbrev=False
    )
    one.add_argument("--sku", required=True, help="a SKU or an arch of matrix.toml")
    one.add_argument("--line", help="vLLM line (default: the matrix's)")
    one.add_argument("--json", action="store_true", help="print it as JSON, keys sorted")
    one.set_defaults(call=plan)


def plan(project: Project, args: argparse.Namespace) -> None:
    """Print a cell's plan."""
    from vllm_forge.serve.plan import as_json, make_plan

    made = make_plan(project.root, project.matrix, project.cell(args.sku, args.line))
    if args.json:
        print(as_json(made))
        return
    from rich.console import Console

    from vllm_forge.serve.plan_page import page

    out = Console(highlight=False)
    # A pipe has 80 columns for rich, which would fold every name of the tables.
    out.width = max(out.width, WIDTH)
    out.print(page(made))
