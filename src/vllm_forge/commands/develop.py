"""Generated pages and benchmarks."""

import argparse
import os
import sys
from pathlib import Path

from vllm_forge.commands.parsers import LINE, Commands, command, group
from vllm_forge.project import Project


def register(choices: Commands) -> None:
    one = command(choices, "docs", docs)
    one.add_argument("--check", action="store_true", help="compare only; fail if one differs")
    command(choices, "schema", schema)
    bench = group(choices, "bench", help="measure; results go to records/bench")
    one = command(bench, "build", bench_build, LINE)
    one.add_argument("--scratch", type=Path, help="parent of its folder (default: /var/tmp)")


def docs(project: Project, args: argparse.Namespace) -> None:
    """Write all generated pages from the records."""
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


def bench_build(project: Project, args: argparse.Namespace) -> None:
    """Time a full build and its parts."""
    argv = [sys.executable, str(project.root / "benchmarks" / "build.py")]
    argv += [f"--line={args.line}"] if args.line else []
    argv += [f"--scratch={args.scratch}"] if args.scratch else []
    os.execv(sys.executable, argv)  # noqa: S606
