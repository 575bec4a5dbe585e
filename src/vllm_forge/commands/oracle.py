"""What does each line's vLLM select?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_forge.host import SubprocessRunner, console

if TYPE_CHECKING:
    import argparse

    from vllm_forge.commands.register import Commands
    from vllm_forge.kernels.selection import Recorded
    from vllm_forge.project import Project


def register(choices: Commands) -> None:
    """Add this module's commands."""
    one = choices.add_parser(
        "oracle", help="ask each line's vLLM which kernels it selects", allow_abbrev=False
    )
    one.add_argument("--line", help="vLLM line (default: all)")
    one.add_argument("--update", action="store_true", help="record the answers")
    one.set_defaults(call=oracle)


def oracle(project: Project, args: argparse.Namespace) -> None:
    """Ask, show, and compare with what was recorded; or record it."""
    from vllm_forge.kernels.selection import require_fresh, require_same

    names = project.lines(args.line)
    if not args.update:
        for name in names:
            require_fresh(project.root, project.matrix, name)
    for name in names:
        found = _ask(project, name)
        if args.update:
            _record(project, found)
            continue
        recorded = require_fresh(project.root, project.matrix, name)
        require_same(recorded, [answer for _, answer in found.rows])
        require_same(recorded, [answer for _, answer in found.published], published=True)
        print(f"line {name}: {len(found.rows) + len(found.published)} answers as recorded")


def _ask(project: Project, name: str) -> Recorded:
    from datetime import UTC, datetime

    from vllm_forge.kernels.selection import Recorded, inputs_of
    from vllm_forge.pages.selection import table
    from vllm_forge.proofs.ask_selection import ask_line

    asked = ask_line(project.root, project.matrix, name, SubprocessRunner())
    found = Recorded(
        line_name=name,
        vllm=project.matrix.line[name].vllm,
        made=datetime.now(UTC).date().isoformat(),
        inputs=inputs_of(project.root, project.matrix, name),
        rows=tuple(zip(asked.questions, asked.answers, strict=True)),
        published=tuple(zip(asked.published_questions, asked.published_answers, strict=True)),
    )
    console.print(table(found))
    console.print(f"  {len(found.rows)} questions in {asked.seconds:.0f} s", style="dim")
    return found


def _record(project: Project, found: Recorded) -> None:
    """Write the line's answers, then the page of all lines."""
    from vllm_forge.kernels.selection import write_recorded
    from vllm_forge.pages.registry import write_pages

    print(write_recorded(project.root, found))
    write_pages(project, "docs/generated/selection.md")
