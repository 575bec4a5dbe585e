"""Series, proofs, drift, patched wheels and the installer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_forge.host import SubprocessRunner, atomic_path, console, report
from vllm_forge.patches.errors import NotPatchedError

if TYPE_CHECKING:
    import argparse

    from vllm_forge.commands.register import Commands
    from vllm_forge.matrix import Line
    from vllm_forge.project import Project

# The first release whose DeepSeek V4 the patches' targets are known in.
OLDEST = "0.20.2"


def register(choices: Commands) -> None:
    """Add this module's commands."""
    one = choices.add_parser("patches", help="prove that every series applies exactly")
    one.add_argument("--line")
    one.add_argument("--update", action="store_true", help="write lock.toml anew")
    one.add_argument("--export", action="store_true", help="write each diff anew for this tree")
    one.set_defaults(call=patches)

    one = choices.add_parser(
        "patch-checkout", help="make a git branch of a line's patches", allow_abbrev=False
    )
    one.add_argument("--line")
    one.add_argument("directory", type=Path, help="work tree to create")
    one.set_defaults(call=patch_checkout)

    one = choices.add_parser(
        "patch-export", help="write a line's series from such a branch", allow_abbrev=False
    )
    one.add_argument("directory", type=Path, help="made by patch-checkout")
    one.set_defaults(call=patch_export)

    one = choices.add_parser(
        "prove", help="run each patch's proof without it and with it", allow_abbrev=False
    )
    one.add_argument("--line", help="vLLM line (default: all)")
    one.set_defaults(call=prove)

    one = choices.add_parser(
        "drift", help="what each vLLM release does to each patch", allow_abbrev=False
    )
    one.add_argument("--from", dest="first", default=OLDEST, help=f"oldest release ({OLDEST})")
    one.add_argument("--to", dest="last", help="newest release (default: the index's)")
    one.set_defaults(call=drift)

    one = choices.add_parser("wheel", help="write a line's patched wheel")
    one.add_argument("--line")
    one.add_argument("--output", type=Path)
    one.set_defaults(call=wheel)

    one = choices.add_parser("install", help="patch the vLLM of a virtual environment")
    one.add_argument("--python", type=Path, help="its interpreter (default: the active one's)")
    one.add_argument("--line")
    one.add_argument("--revert", action="store_true", help="put every file back as published")
    one.set_defaults(call=install)


def patches(project: Project, args: argparse.Namespace) -> None:
    """Apply every series to its pinned source and compare the trees."""
    from vllm_forge.patches import check_line, read_series, update_line
    from vllm_forge.patches.treelock import export_line, fetch_base, read_tree_lock
    from vllm_forge.patches.variants import trees_of_moved
    from vllm_forge.sources import Index, SourceRepo

    names = project.lines(args.line)
    repo = SourceRepo()
    for name in names:
        line = project.matrix.line[name]
        if args.export:
            base = fetch_base(read_tree_lock(project.root / line.series, name), line.vllm, repo)
            series = read_series(project.root / line.series)
            export_line(project.root, line, repo, trees_of_moved(repo, base, series))
        if args.update:
            applied = update_line(project.root, name, line, repo, Index())
        else:
            applied = check_line(project.root, name, line, repo)
        series = read_series(project.root / line.series)
        print(f"line {name}: {len(series)} patches, tree {applied.result}")
        for patch in series:
            print(f"  {patch.name}: {patch.summary}")


def patch_checkout(project: Project, args: argparse.Namespace) -> None:
    """Make a git work tree of a line's source, one commit a patch."""
    from vllm_forge.patches.authoring import BASE, checkout
    from vllm_forge.sources import SourceRepo

    count = checkout(project, project.line(args.line)[0], SourceRepo(), args.directory)
    print(f"{args.directory}: {count} patches on {BASE}")
    console.print("edit them with git (commit, rebase -i), then run patch-export", style="dim")


def patch_export(project: Project, args: argparse.Namespace) -> None:
    """Write a line's patch files, series and lock from the commits of a work tree."""
    from vllm_forge.patches.authoring import export

    name, series = export(project, args.directory)
    print(f"line {name}: {len(series)} patches")
    for patch in series:
        print(f"  {patch.name}: {patch.summary}")


def prove(project: Project, args: argparse.Namespace) -> None:
    """Run each patch's proof without it and with it, in the images' own environment."""
    from vllm_forge.proofs import prove as prove_lines

    names = project.lines(args.line)
    prove_lines(project.root, project.matrix, names, SubprocessRunner())


def drift(project: Project, args: argparse.Namespace) -> None:
    """Say what each release does to each patch."""
    from datetime import UTC, datetime

    from vllm_forge.pages.drift import summary
    from vllm_forge.pages.registry import write_pages
    from vllm_forge.patches.drift_data import survey_lines, write_drift
    from vllm_forge.patches.seed_installer import record_outcomes
    from vllm_forge.sources import Index, SourceRepo

    repo = SourceRepo()
    found = survey_lines(
        project.root, project.matrix, repo, Index(), first=args.first, last=args.last
    )
    day = datetime.now(UTC).date().isoformat()
    console.print(summary(write_drift(project.root, project.matrix, found, day)))
    record_outcomes(project, repo)
    write_pages(project, "docs/generated/drift.md", "docs/generated/seed-installer.md")


def wheel(project: Project, args: argparse.Namespace) -> None:
    """Write a line's patched wheel."""
    import shutil

    from vllm_forge.images import patched_wheel
    from vllm_forge.patches import check_line
    from vllm_forge.sources import SourceRepo, Wheelhouse, read_lock

    name, line = project.line(args.line)
    repo, wheelhouse = SourceRepo(), Wheelhouse()
    made = read_lock(project.root, name, line, project.matrix.base)
    applied = check_line(project.root, name, line, repo)
    wheelhouse.fetch([made.find("vllm")])
    cell = project.cell(line.skus[0], name)
    with report(f"patch the wheel of line {name}"):
        patched = patched_wheel(cell, made, applied, repo, wheelhouse)
        target = (args.output or project.root / "dist" / "wheels") / patched.path.name
        with atomic_path(target) as aside:
            shutil.copyfile(patched.path, aside)
    print(target)


def install(project: Project, args: argparse.Namespace) -> None:
    """Patch the vLLM of a virtual environment, or put it back."""
    from vllm_forge.patches import check_line
    from vllm_forge.patches.install import Installer, find_python, probe
    from vllm_forge.sources import SourceRepo

    name, line = project.line(args.line)
    python = find_python(args.python)
    target = probe(python)
    if target.site is None and args.revert:
        raise NotPatchedError("no vLLM is installed there", where=str(python))
    repo = SourceRepo()
    applied = check_line(project.root, name, line, repo)
    if target.site is None:
        _install_release(project.root / line.lock, line, target.python_version, python)
        target = probe(python)
    installer = Installer(target, repo, applied, line.vllm)
    if args.revert:
        installer.revert()
        print(f"vLLM {installer.release} as published: {installer.site}")
    else:
        installer.patch()
        print(f"vLLM {installer.version}: {installer.site}")


def _install_release(lock_path: Path, line: Line, python_version: str, python: Path) -> None:
    """The line's pinned vLLM: all of the lock where the Python is the lock's."""
    from uv import find_uv_bin

    argv = [find_uv_bin(), "pip", "install", f"--python={python}"]
    if python_version == line.python:
        argv += ["--require-hashes", "--no-deps", f"--requirements={lock_path}"]
    else:
        console.print(
            f"[yellow]the lock is for Python {line.python}, this is {python_version}:[/] only vLLM "
            "itself is pinned, its dependencies are what the index offers today"
        )
        argv += [f"vllm=={line.vllm}", f"torch=={line.torch}"]
    SubprocessRunner().run(argv)
