"""Kernel selection and kernel coverage."""

from __future__ import annotations

import argparse

from vllm_forge.commands.parsers import EVERY_LINE, Commands, command, group
from vllm_forge.host import Runner, console, report, write_json
from vllm_forge.project import Project


def register(choices: Commands) -> None:
    kernels = group(choices, "kernels", help="which kernels vLLM selects, and which it has")
    one = command(kernels, "select", select, EVERY_LINE)
    one.add_argument("--record", action="store_true", help="write records/selection instead")
    one = command(kernels, "coverage", coverage, EVERY_LINE)
    one.add_argument("--record", action="store_true", help="also write records/coverage")


def select(project: Project, args: argparse.Namespace) -> None:
    """Ask each line's vLLM which kernels it selects (as root), and compare with the record."""
    from vllm_forge.kernels.selection.record import require_fresh, require_same, write_selection
    from vllm_forge.pages.registry import write_pages
    from vllm_forge.pages.selection import selection_table
    from vllm_forge.proofs.environment import ask_line

    names = project.lines(args.line)
    if not args.record:
        for name in names:  # before the first is asked, which takes a minute
            require_fresh(project, name)
    for name in names:
        selection = ask_line(project, name, Runner())
        console.print(selection_table(selection))
        if args.record:
            print(write_selection(project.records, selection))
            write_pages(project, "docs/generated/selection.md")
            continue
        recorded = require_fresh(project, name)
        require_same(recorded, [answer for _, answer in selection.rows])
        require_same(recorded, [answer for _, answer in selection.published], published=True)
        print(f"line {name}: {len(selection.rows) + len(selection.published)} answers as recorded")


def coverage(project: Project, args: argparse.Namespace) -> None:
    """Print kernel families x SKUs (native, compiled later, missing); fail if a need is unmet."""
    from vllm_forge.images.checks import COVERAGE, line_coverage
    from vllm_forge.kernels.coverage.families import catalogue
    from vllm_forge.pages.coverage import terminal
    from vllm_forge.pages.registry import write_pages

    contracts = []
    for name in project.lines(args.line):
        with report(f"read the device code of line {name}"):
            record, of_cells = line_coverage(project, name)
        contracts += of_cells
        print(terminal(record, catalogue()))
        if args.record:
            write_json(project.root / COVERAGE / f"{name}.json", record)
    if args.record:
        write_pages(project, "docs/generated/coverage.md")
    for contract in contracts:
        contract.check()
