"""Locks, downloads and patched wheels; generated pages."""

import argparse
import shutil
from pathlib import Path

from vllm_forge.commands.parsers import LINE, Commands, command, group
from vllm_forge.host import atomic_path, console, report, show, write_whole
from vllm_forge.project import Project
from vllm_forge.sources import Wheelhouse, make_lock


def register(choices: Commands) -> None:
    wheels = group(choices, "wheels", help="lock, download and patch wheels")
    one = command(wheels, "lock", lock, LINE)
    other = one.add_mutually_exclusive_group()
    other.add_argument("--tools", action="store_true", help="the quantization tools' lock instead")
    other.add_argument("--base", action="store_true", help="the image's Debian packages instead")
    command(wheels, "fetch", fetch, LINE)
    command(wheels, "record", record, LINE)
    one = command(wheels, "patched", patched, LINE)
    one.add_argument("--output", type=Path, help="folder (default: dist/wheels)")

    one = command(choices, "docs", docs)
    one.add_argument("--check", action="store_true", help="compare only; fail if one differs")
    one = command(choices, "report", report_page)
    one.add_argument("--output", type=Path, help="file (default: dist/report.html)")
    ci = group(choices, "ci", help="print the pipeline of a CI service")
    command(ci, "buildkite", buildkite)


def lock(project: Project, args: argparse.Namespace) -> None:
    """Resolve a line with uv and write its lock."""
    from vllm_forge.checkpoints.quantize.environment import make_lock as make_tool_lock
    from vllm_forge.images.rootfs import lock_base

    if args.tools:
        with report("lock the quantization tools"):
            console.print(str(make_tool_lock(project)), markup=False)
        return
    if args.base:
        with report("lock the Debian packages"):
            debs = lock_base(project)
        size = sum(package.size for package in debs.packages)
        what = f"{debs.path}: {len(debs.packages)} packages, {size / 1e6:.0f} MB"
        console.print(what, markup=False)
        return
    name, line = project.line(args.line)
    with report(f"lock line {name}"):
        result = make_lock(project.root, name, line, project.matrix.base, project.index)
    size = sum(wheel.size for wheel in result.wheels)
    what = f"{result.path}: {len(result.wheels)} wheels, {size / 1e9:.2f} GB"
    console.print(what, markup=False)


def fetch(project: Project, args: argparse.Namespace) -> None:
    """Download a line's wheels, resumable, hash-checked."""
    name, _ = project.line(args.line)
    wheels = project.lock(name).wheels
    with report(f"fetch {len(wheels)} wheels of line {name}"):
        Wheelhouse().fetch(wheels)


def record(project: Project, args: argparse.Namespace) -> None:
    """Record hashes of a line's layers that are in the cache, so that builds compute fewer."""
    from vllm_forge.images.wheel_layers import record_layers

    name, _ = project.line(args.line)
    with report(f"record the layers of line {name}"):
        path = record_layers(project, name)
    show(path)


def patched(project: Project, args: argparse.Namespace) -> None:
    """Write a line's patched vLLM wheel."""
    from vllm_forge.images import patched_wheel

    name, line = project.line(args.line)
    with report(f"patch the wheel of line {name}"):
        wheel = patched_wheel(project, project.cell(line.skus[0], name))
        target = (args.output or project.root / "dist" / "wheels") / wheel.path.name
        with atomic_path(target) as aside:
            shutil.copyfile(wheel.path, aside)
    show(target)


def docs(project: Project, args: argparse.Namespace) -> None:
    """Write all generated pages from the records."""
    from vllm_forge.pages.registry import check_pages, write_pages

    if args.check:
        check_pages(project)
        return
    for path in write_pages(project):
        show(path)


def report_page(project: Project, args: argparse.Namespace) -> None:
    """Write what is proven, of all records, as one HTML file."""
    from vllm_forge.pages.report import report as render

    target = args.output or project.root / "dist" / "report.html"
    write_whole(target, render(project))
    show(target)


def buildkite(project: Project, _: argparse.Namespace) -> None:
    """Print the pipeline for `buildkite-agent pipeline upload`."""
    from vllm_forge.pages.ci import buildkite as pipeline

    print(pipeline(project), end="")
