"""Series, proofs, drift and the installer; kernel selection and kernel coverage of each line."""

import argparse
import shlex
from datetime import UTC, datetime
from pathlib import Path

from vllm_forge.commands.parsers import EVERY_LINE, LINE, Commands, command, group
from vllm_forge.host import Runner, console, exclusive, hash_of, report, show, write_json
from vllm_forge.kernels.selection import record as selections
from vllm_forge.matrix import Line
from vllm_forge.pages.markdown import terminal_table
from vllm_forge.patches import Applied, authoring, check_line, read_series, update_line
from vllm_forge.patches.drift import survey_lines, write_drift
from vllm_forge.patches.errors import InstalledStateError
from vllm_forge.patches.wheel import Installer, find_python, probe
from vllm_forge.project import Project
from vllm_forge.sources import SourceRepo

# The first release whose DeepSeek V4 the patches' targets are known in.
OLDEST = "0.20.2"


def register(choices: Commands) -> None:
    patch = group(choices, "patch", help="check, prove and author the patches of each line")
    command(patch, "check", check, EVERY_LINE)
    command(patch, "lock", lock, EVERY_LINE)
    one = command(patch, "checkout", checkout, LINE)
    one.add_argument("directory", type=Path, help="work tree to create")
    one = command(patch, "export", export)
    one.add_argument("directory", type=Path, help="made by patch checkout")
    command(patch, "prove", prove, EVERY_LINE)
    command(patch, "upstream", upstream, EVERY_LINE)
    one = command(patch, "drift", drift)
    one.add_argument("--from", dest="first", default=OLDEST, help=f"oldest release ({OLDEST})")
    one.add_argument("--to", dest="last", help="newest release (default: the index's)")

    one = command(choices, "install", install, LINE, packaged=True)
    one.add_argument("--python", type=Path, help="its interpreter (default: the active one's)")
    one.add_argument("--revert", action="store_true", help="restore every published file")

    kernels = group(choices, "kernels", help="which kernels vLLM selects, and which it has")
    one = command(kernels, "select", select, EVERY_LINE)
    one.add_argument("--record", action="store_true", help="write records/selection instead")
    one = command(kernels, "coverage", coverage, EVERY_LINE)
    one.add_argument("--record", action="store_true", help="also write records/coverage")


def check(project: Project, args: argparse.Namespace) -> None:
    """Apply every series: no fuzz, no offset, locked trees."""
    for name in project.lines(args.line):
        _print_series(project, name, check_line(project, name, SourceRepo()))


def lock(project: Project, args: argparse.Namespace) -> None:
    """Apply every series, write its lock.toml."""
    for name in project.lines(args.line):
        _print_series(project, name, update_line(project, name, SourceRepo()))


def _print_series(project: Project, name: str, applied: Applied | None = None) -> None:
    series = read_series(project.root / project.matrix.line[name].series)
    print(f"line {name}: {len(series)} patches" + (f", tree {applied.result}" if applied else ""))
    for patch in series:
        print(f"  {patch.name}: {patch.summary}")


def checkout(project: Project, args: argparse.Namespace) -> None:
    """Make a git branch of a line's patches."""
    name, _ = project.line(args.line)
    count = authoring.checkout(project, name, SourceRepo(), args.directory)
    show(f"{args.directory}: {count} patches on {authoring.BASE}")
    done = f"nox -s forge -- patch export {shlex.quote(str(args.directory))}"
    console.print(f"edit them with git (commit, rebase -i), then run: {done}", markup=False)


def export(project: Project, args: argparse.Namespace) -> None:
    """Write a line's series from a branch that patch checkout made."""
    _print_series(project, authoring.export(project, args.directory)[0])


def prove(project: Project, args: argparse.Namespace) -> None:
    """Run each patch's proof without it (red) and with it (green), as root."""
    from vllm_forge.proofs.prove import prove as prove_lines

    prove_lines(project, project.lines(args.line), Runner())


def upstream(project: Project, args: argparse.Namespace) -> None:
    """Run vLLM's own tests as published and as patched, as root; what is lost is red."""
    from vllm_forge.proofs.prove import compare_upstream

    for name in project.lines(args.line):
        show(f"line {name}: {compare_upstream(project, name, Runner()).relative_to(project.root)}")


def drift(project: Project, args: argparse.Namespace) -> None:
    """Record what each vLLM release does to each patch."""
    from vllm_forge.pages import records, registry

    found = survey_lines(project, SourceRepo(), first=args.first, last=args.last)
    day = datetime.now(UTC).date().isoformat()
    console.print(terminal_table(*records.drift_summary(write_drift(project, found, day))))
    registry.write_pages(project, "docs/generated/drift.md")


def install(project: Project, args: argparse.Namespace) -> None:
    """Patch the vLLM of an environment."""
    name, line = project.line(args.line)
    python = find_python(args.python)
    environment = hash_of(str(python.parent.parent.resolve()))[:16]
    with exclusive(f"install-{environment}", wait=True):
        target = probe(python)
        if target.site is None and args.revert:
            remedy = "name the interpreter that has it with --python"
            raise InstalledStateError("no vLLM is installed there", where=python, remedy=remedy)
        repo = SourceRepo()
        applied = check_line(project, name, repo)
        if target.site is None:
            _install_release(project.root / line.lock, line, target.python_version, python)
            target = probe(python)
        installer = Installer(target, repo, applied, line.vllm)
        if args.revert:
            installer.revert()
            show(f"vLLM {installer.release} as published: {installer.site}")
        else:
            installer.patch()
            show(f"vLLM {installer.version}: {installer.site}")


def _install_release(lock_path: Path, line: Line, python_version: str, python: Path) -> None:
    """The line's pinned vLLM: all of the lock where the Python is the lock's."""
    from uv import find_uv_bin

    from vllm_forge.sources.index import index_url

    argv = [find_uv_bin(), "pip", "install", f"--python={python}"]
    if python_version == line.python:
        argv += ["--require-hashes", "--no-deps", f"--requirements={lock_path}"]
    else:
        console.print(
            f"[yellow]the lock is for Python {line.python}, this is {python_version}:[/] only vLLM "
            "itself is pinned, its dependencies are what the index offers today"
        )
        argv += [f"vllm=={line.vllm}", f"torch=={line.torch}"]
    # Not an option: every user of the host can read a command line. pip.conf is not uv's.
    Runner().run(argv, env={"UV_DEFAULT_INDEX": index_url()})


def select(project: Project, args: argparse.Namespace) -> None:
    """Ask each line's vLLM which kernels it selects (as root), and compare with the record."""
    from vllm_forge.pages import kernels, registry
    from vllm_forge.proofs.environment import ask_line

    names = project.lines(args.line)
    if not args.record:
        for name in names:  # before the first is asked, which takes a minute
            selections.require_fresh(project, name)
    for name in names:
        selection = ask_line(project, name, Runner())
        console.print(kernels.selection_table(selection))
        if args.record:
            show(selections.write_selection(project.records, selection))
            registry.write_pages(project, "docs/generated/selection.md")
            continue
        selections.require_same(selections.require_fresh(project, name), selection)
        print(f"line {name}: {len(selection.answers)} answers as recorded, and as published")


def coverage(project: Project, args: argparse.Namespace) -> None:
    """Print kernel families x SKUs (native, compiled later, missing); fail if a need is unmet."""
    from vllm_forge.images.checks import COVERAGE, line_coverage
    from vllm_forge.kernels.coverage.families import catalogue
    from vllm_forge.pages import kernels, registry

    contracts = []
    for name in project.lines(args.line):
        with report(f"read the device code of line {name}"):
            record, of_cells = line_coverage(project, name)
        contracts += of_cells
        print(kernels.coverage_table(record, catalogue()))
        if args.record:
            write_json(project.root / COVERAGE / f"{name}.json", record)
    if args.record:
        registry.write_pages(project, "docs/generated/coverage.md")
    for contract in contracts:
        contract.check()
