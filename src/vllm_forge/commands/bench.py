"""Benchmarks: published figures, results of servers, the time of a build."""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from vllm_forge.commands.parsers import JSON, LINE, Commands, command, group, print_json
from vllm_forge.project import Project

LIBRARIES = ("scipy", "matplotlib")


def register(choices: Commands) -> None:
    bench = group(choices, "bench", help="judge published figures; time a build")
    command(bench, "claims", claims, JSON)
    one = command(bench, "build", build, LINE)
    one.add_argument("--scratch", type=Path, help="parent of its folder (default: /var/tmp)")


def _require_libraries() -> None:
    from vllm_forge.bench.errors import LibraryMissingError

    if missing := [name for name in LIBRARIES if importlib.util.find_spec(name) is None]:
        what = f"missing {', '.join(missing)}, which only benchmarks need"
        remedy = "install vllm-forge with its extra: pip install 'vllm-forge[bench]'"
        raise LibraryMissingError(what, where=sys.prefix, remedy=remedy)


def claims(project: Project, args: argparse.Namespace) -> None:
    """Judge the figures of a published model card; write the record, its chart and its page."""
    _require_libraries()
    from vllm_forge.bench.plots import forest
    from vllm_forge.bench.verdicts import judge
    from vllm_forge.host import PlainConsole, atomic_path, write_json
    from vllm_forge.pages.claims import CHART, PAGE, RECORD, claims_table, summary
    from vllm_forge.pages.registry import write_pages

    record = judge(project.root)
    write_json(project.root / RECORD, record)
    with atomic_path(project.root / CHART) as aside:
        aside.write_bytes(forest(record))
    write_pages(project, PAGE)
    if args.json:
        print_json(args, record)
        return
    PlainConsole().print(claims_table(record))
    print(f"{summary(record)}: {PAGE}")


def build(project: Project, args: argparse.Namespace) -> None:
    """Time a full build and its parts."""
    argv = [sys.executable, str(project.root / "benchmarks" / "build.py")]
    argv += [f"--line={args.line}"] if args.line else []
    argv += [f"--scratch={args.scratch}"] if args.scratch else []
    os.execv(sys.executable, argv)  # noqa: S606
