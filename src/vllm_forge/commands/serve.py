"""Serve a preset, or print how; plan a cell, check a host, lint all presets."""

import argparse
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

from vllm_forge.commands import parsers
from vllm_forge.commands.parsers import EVERY_LINE, JSON, LINE, SKU, command, option
from vllm_forge.errors import UsageError
from vllm_forge.host import HostProbe, PlainConsole, Probe, RecordedProbe, RecordingProbe, console
from vllm_forge.project import Project
from vllm_forge.serve.deployment import Deployment, find_deployment, needs_of, presets_of

PLAN_WIDTH = 120


def register(choices: parsers.Commands) -> None:
    artifact = option("--artifact", help="default: the preset's first")
    one = command(choices, "serve", serve, SKU, LINE, artifact, packaged=True)
    one.remedy = (
        "vLLM's options are those of the preset; to add others, append them to the command that "
        "--print prints, or add a [preset] row to matrix.toml"
    )
    one.add_argument("--preset", required=True, help="e.g. mtp, plain, tp2-mtp")
    one.add_argument("--engine", choices=["docker", "podman"], help="default: the one that answers")
    one.add_argument("--print", dest="print_only", action="store_true", help="only print it")
    command(choices, "plan", plan, SKU, LINE, JSON, packaged=True)
    one = command(choices, "doctor", doctor, SKU, LINE, JSON, artifact, packaged=True)
    one.add_argument("--preset", help="default: the SKU's first")
    source = one.add_mutually_exclusive_group()
    source.add_argument("--save", type=Path, metavar="DIR", help="keep what the host's tools said")
    source.add_argument("--replay", type=Path, metavar="DIR", help="judge what --save kept")
    command(choices, "lint", lint, EVERY_LINE)


def serve(project: Project, args: argparse.Namespace) -> None:
    """Serve a preset in its image."""
    import vllm_forge.serve.command as shell
    from vllm_forge.images.record import built_digest

    cell = project.cell(args.sku, args.line)
    deployment = find_deployment(project.matrix, cell, args.preset, args.artifact)
    deployment.require_served()
    digest = built_digest(project.root / "dist" / f"{cell.name}.json")
    _say(project, deployment, digest)
    engine: shell.Engine = args.engine or "docker"
    if not args.print_only:
        probe = HostProbe()
        shell.require_gpus(probe, deployment)
        engine = shell.running_engine(probe, args.engine)
    run = shell.container_command(deployment, engine=engine, digest=digest)
    if args.print_only:
        print(run.text())
    else:
        shell.become(run)


def lint(project: Project, args: argparse.Namespace) -> None:
    """Check every preset against what each line's vLLM says."""
    from vllm_forge.serve.lint import lint_line, require_clean

    names = project.lines(args.line)
    require_clean([finding for name in names for finding in lint_line(project, name)])
    print(f"{len(project.matrix.preset)} presets, lines {', '.join(names)}: no findings")


def _say(project: Project, deployment: Deployment, digest: str | None) -> None:
    """What a reader should know of the command; on stderr, so that stdout can be piped."""
    from rich.markup import escape

    from vllm_forge.receipts.verification import preset_state, read_receipts
    from vllm_forge.serve.command import bare_command, build_command
    from vllm_forge.serve.plan import first_start

    build = build_command(deployment.cell)
    what = f"its image is not built here: {build}"
    if digest is not None:
        what = f"image {digest}; if the engine lacks it: {build}"
    if network := first_start(project, deployment.cell):
        what += f"\n  {network}"
    receipts = read_receipts(project, datetime.now(UTC), image=digest)
    for line in replace(receipts, valid=()).lines(project.root):
        console.print(line, markup=False)
    preset, artifact = deployment.preset_name, deployment.artifact_name
    state = preset_state(project, receipts, deployment.cell, preset, artifact)
    console.print(
        f"[bold]{preset}[/], {artifact}, line {deployment.cell.line_name}: [bold]{state}[/]\n"
        f"  {escape(deployment.preset.note)}\n  {what}\n"
        "  without a container, in an environment with the line's patched vLLM:",
    )
    console.print(f"{bare_command(deployment).text()}\n", style="dim", markup=False)


def doctor(project: Project, args: argparse.Namespace) -> None:
    """Check this host for a preset."""
    from vllm_forge.serve.doctor import ask_host, judge, page
    from vllm_forge.serve.errors import HostUnfitError
    from vllm_forge.serve.machine import HostFinding
    from vllm_forge.serve.plan import first_start

    cell = project.cell(args.sku, args.line)
    preset = args.preset or next(iter(presets_of(project.matrix, cell.sku_name)), "")
    deployment = find_deployment(project.matrix, cell, preset, args.artifact)
    needs = needs_of(project.lock(cell.line_name), deployment)
    probe: Probe = RecordingProbe(HostProbe(), args.save) if args.save else HostProbe()
    if args.replay:
        if not args.replay.is_dir():
            what = f"invalid --replay: {args.replay} is not a directory"
            raise UsageError(what, remedy="give the directory that doctor --save wrote")
        probe = RecordedProbe(args.replay)
    findings = judge(ask_host(probe), deployment, needs)
    if network := first_start(project, cell):
        needed = "NVIDIA's server, or a mirror of it in FLASHINFER_CUBINS_REPOSITORY"
        findings.append(HostFinding("network", "unknown", f"the image {network}", needed))
    if args.json:
        parsers.print_json(args, [asdict(finding) for finding in findings])
    else:
        out = PlainConsole(soft_wrap=True)
        for text in page(findings):
            out.print(text)
    red = [finding.check for finding in findings if finding.level == "red"]
    if red:
        raise HostUnfitError(
            f"this host cannot serve {deployment.preset_name} ({deployment.artifact_name}, line "
            f"{cell.line_name}): {', '.join(dict.fromkeys(red))}",
            remedy="each red line above has its own",
        )


def plan(project: Project, args: argparse.Namespace) -> None:
    """Show what a cell is: pins, kernels, needs, command."""
    from vllm_forge.serve.plan import make_plan, page

    cell_plan = make_plan(project, project.cell(args.sku, args.line))
    if args.json:
        parsers.print_json(args, cell_plan)
        return
    out = PlainConsole()
    # A pipe has 80 columns for rich, which would fold every name of the tables.
    out.width = max(out.width, PLAN_WIDTH)
    for part in page(cell_plan):
        out.print(part)
