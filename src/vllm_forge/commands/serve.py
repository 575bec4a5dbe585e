"""Serve a preset, or print how; plan a cell, check a host, lint all presets."""

import argparse
import re
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from vllm_forge.commands import parsers
from vllm_forge.commands.parsers import EVERY_LINE, JSON, LINE, SKU, command, option
from vllm_forge.errors import UsageError, problems
from vllm_forge.host import HostProbe, PlainConsole, Probe, RecordedProbe, RecordingProbe, console
from vllm_forge.project import Project
from vllm_forge.serve.deployment import (
    KEY,
    Deployment,
    find_deployment,
    needs_of,
    presets_of,
    recorded_rows,
)

if TYPE_CHECKING:
    import vllm_forge.serve.command as shell

PLAN_WIDTH = 130
# A value in a command line is seen by every user of the host.
SECRETS = {KEY: "give --api-key-file: every user of the host sees a command line"} | dict.fromkeys(
    ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"), "leave its value out: it is taken from the environment"
)
OBJECT = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")  # of Kubernetes


def register(choices: parsers.Commands) -> None:
    artifact = option("--artifact", help="default: the preset's first")
    one = command(choices, "serve", serve, SKU, LINE, artifact, packaged=True)
    one.remedy = "put flags of vLLM after --, e.g.: serve … -- --max-model-len=131072"
    one.set_defaults(vllm_flags=())
    one.add_argument("--preset", help="required; of the SKU, e.g. mtp, plain, tp2-mtp")
    one.add_argument("--engine", choices=["docker", "podman"], help="default: the one that answers")
    shown = one.add_mutually_exclusive_group()
    shown.add_argument("--print", dest="print_only", action="store_true", help="only print it")
    for form, what in (("compose", "a compose file"), ("systemd", "a unit of systemd"),
                       ("k8s", "a Deployment for Kubernetes")):  # fmt: skip
        shown.add_argument(
            f"--{form}", dest="form", action="store_const", const=form, help=f"print {what} instead"
        )
    _container_options(one)
    command(choices, "plan", plan, SKU, LINE, JSON, packaged=True)
    one = command(choices, "doctor", doctor, SKU, LINE, JSON, artifact, packaged=True)
    one.set_defaults(vllm_flags=())
    one.add_argument("--preset", help="default: the SKU's first")
    source = one.add_mutually_exclusive_group()
    source.add_argument("--save", type=Path, metavar="DIR", help="keep what the host's tools said")
    source.add_argument("--replay", type=Path, metavar="DIR", help="judge what --save kept")
    command(choices, "lint", lint, EVERY_LINE)


def _container_options(one: parsers.Parser) -> None:
    one.add_argument("--model", type=Path, metavar="DIR", help="folder with the artifact's files")
    one.add_argument("--image", metavar="REF", help="default: the cell's image, by its digest")
    one.add_argument("--port", type=int, help="of the host, for the first replica (default: 8000)")
    one.add_argument("--name", help="of the container (default: vllm-PRESET)")
    one.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]",
                     help="variable of the server; without a value: this shell's")  # fmt: skip
    one.add_argument("--api-key-file", type=Path, metavar="PATH", help="file with the API key")
    one.add_argument("--detach", action="store_true", help="in the background, started again")
    one.add_argument("--replica", type=int, default=1, metavar="N",
                     help="the Nth server of this host: next GPUs, next port")  # fmt: skip
    one.add_argument("--gpu-ids", metavar="ID,ID", help="default: the first that fit")
    one.add_argument("--ask", action="store_true",
                     help="ask the image's vLLM where no record covers the flags")  # fmt: skip


def _options(args: argparse.Namespace) -> "shell.ServeOptions":
    from vllm_forge.serve.command import ServeOptions

    key = args.api_key_file and args.api_key_file.resolve()
    named = {name: getattr(args, name) for name in ("image", "port", "name", "detach", "replica")}
    ids = args.gpu_ids.split(",") if args.gpu_ids else ()
    for variable in args.env:
        name, given, _ = variable.partition("=")
        if given and name in SECRETS:
            raise UsageError(f"--env {name} with a value", remedy=SECRETS[name])
    try:
        return ServeOptions.model_validate({**named, "key": key, "gpu_ids": ids, "env": args.env})
    except ValidationError as error:
        text = problems(error)[0]
        if place := error.errors()[0]["loc"]:
            name = str(place[0])
            text = (
                f"{name.replace('_', '-')}: expected {ServeOptions.model_fields[name].description}"
            )
        raise UsageError(f"invalid --{text}", where=args.parser.prog) from None


def serve(project: Project, args: argparse.Namespace) -> None:
    """Serve a preset in its image; flags of vLLM follow after --."""
    import vllm_forge.serve.command as shell
    from vllm_forge.images.record import built_digest
    from vllm_forge.matrix.flags import refuse_ours
    from vllm_forge.serve import errors, judge, render, variables

    refuse_ours(args.vllm_flags)
    options = _options(args)
    for variable in args.env:
        if text := variables.doubt(variable.partition("=")[0]):
            console.print(text, markup=False)
    if args.form == "k8s":
        _require_kubernetes(args, options)
    cell = project.cell(args.sku, args.line)
    if args.preset is None:
        remedy = (
            f"presets of {cell.sku_name}: {', '.join(presets_of(project.matrix, cell.sku_name))}"
        )
        raise UsageError("missing --preset", where="vllm-forge serve", remedy=remedy)
    deployment = replace(
        find_deployment(project.matrix, cell, args.preset, args.artifact),
        flags=args.vllm_flags,
        env=options.env,
        model=args.model and args.model.resolve(),
    )
    deployment.require_served()
    if deployment.model is not None:
        judge.require_model(deployment)
    printed = args.print_only or args.form is not None
    engine: shell.Engine = args.engine or "docker"
    probe = HostProbe()
    if not options.gpu_ids:
        with suppress(
            *([errors.NoGpuError] if printed else [])
        ):  # a command may be for another host
            chosen = shell.choose_gpus(probe, deployment, options.replica)
            options = options.model_copy(update={"gpu_ids": chosen})
    if not printed:
        engine = shell.running_engine(probe, args.engine)
    digest = built_digest(project.root / "dist" / f"{cell.name}.json")
    service = shell.service_of(deployment, options, digest=digest)
    image = str(service.image) if args.ask or not printed else None
    doubt = judge.require_served(deployment, recorded_rows(project, cell.line_name), image, engine)
    _say(project, deployment, digest)
    if doubt:
        console.print(f"NOT JUDGED: {doubt}; --ask asks the image's vLLM", markup=False)
    if args.form is not None:
        print(render.render(args.form, service, engine), end="")
        return
    run = shell.container_command(service, engine=engine)
    if printed:
        print(run.text())
    else:
        shell.become(run)


def _require_kubernetes(args: argparse.Namespace, options: "shell.ServeOptions") -> None:
    """Refuse what a Deployment cannot express."""
    if options.gpu_ids or options.port or options.replica > 1:
        args.parser.error("--k8s: no --gpu-ids, --port or --replica: the cluster chooses the host, "
                          "its GPUs and, by a Service, the port")  # fmt: skip
    if not options.image:
        args.parser.error("--k8s: missing --image: nodes pull it from a registry (build --push)")
    if not OBJECT.fullmatch(options.name or "vllm"):
        args.parser.error("--k8s: a --name is of a-z, 0-9, '.' and '-'")


def lint(project: Project, args: argparse.Namespace) -> None:
    """Check every preset against what each line's vLLM says."""
    from vllm_forge.serve.rules import lint_line, require_clean

    names = project.lines(args.line)
    linted = {name: lint_line(project, name) for name in names}
    for name, (_, notes) in linted.items():
        for note in notes:
            console.print(f"line {name}, {note}", markup=False)
    require_clean([finding for findings, _ in linted.values() for finding in findings])
    print(f"{len(project.matrix.preset)} presets, lines {', '.join(names)}: no findings")


def _say(project: Project, deployment: Deployment, digest: str | None) -> None:
    """What a reader should know of the command; on stderr, so that stdout can be piped."""
    from rich.markup import escape

    from vllm_forge.receipts.verification import preset_state, read_receipts
    from vllm_forge.serve.command import bare_command, build_command
    from vllm_forge.serve.plan import chat_note, first_start, issue_notes

    build = build_command(deployment.matrix, deployment.cell)
    what = f"its image is not built here: {build}"
    if digest is not None:
        what = f"image {digest}; if the engine lacks it: {build}"
    if network := first_start(project, deployment.cell):
        what += f"\n  {network}"
    what += f"\n  a chat {chat_note(deployment.cell) or 'behaves in a way that is unknown'}"
    for issue in issue_notes(project, deployment.cell):
        what += f"\n  undecided here: {issue['about']}: {issue['title']}"
    receipts = read_receipts(project, datetime.now(UTC), image=digest)
    for line in replace(receipts, valid=()).lines(project.root):
        console.print(line, markup=False)
    preset, artifact = deployment.preset_name, deployment.artifact_name
    state = preset_state(project, receipts, deployment.cell, preset, artifact)
    console.print(
        f"[bold]{preset}[/], {artifact}, line {deployment.cell.line_name}: [bold]{state}[/]\n"
        f"  {escape(deployment.preset.note)}\n  {escape(what)}\n"
        "  without a container, in an environment with the line's patched vLLM:"
    )
    console.print(f"{bare_command(deployment).text()}\n", style="dim", markup=False)


def doctor(project: Project, args: argparse.Namespace) -> None:
    """Check this host for a preset."""
    from vllm_forge.serve import doctor as doctors
    from vllm_forge.serve import errors, plan
    from vllm_forge.serve.machine import HostFinding

    cell = project.cell(args.sku, args.line)
    preset = args.preset or next(iter(presets_of(project.matrix, cell.sku_name)), "")
    found = find_deployment(project.matrix, cell, preset, args.artifact)
    deployment = replace(found, flags=args.vllm_flags)
    deployment.require_served()
    rows = recorded_rows(project, cell.line_name)
    needs = needs_of(project.lock(cell.line_name), deployment, rows)
    probe: Probe = RecordingProbe(HostProbe(), args.save) if args.save else HostProbe()
    if args.replay:
        if not (args.replay / "meminfo.txt").is_file():
            what = f"invalid --replay: {args.replay} has no saved report"
            raise UsageError(what, remedy="give the directory that doctor --save wrote")
        probe = RecordedProbe(args.replay)
    findings = doctors.judge(doctors.ask_host(probe), deployment, needs)
    if network := plan.first_start(project, cell):
        needed = "NVIDIA's server, or a mirror of it in FLASHINFER_CUBINS_REPOSITORY"
        findings.append(HostFinding("network", "unknown", f"the image {network}", needed))
    for issue in plan.issue_notes(project, cell):
        needed = f"none: {issue['settled_by']} would settle it"
        findings.append(
            HostFinding("open issue", "unknown", f"{issue['about']}: {issue['title']}", needed)
        )
    if args.json:
        parsers.print_json(args, [asdict(finding) for finding in findings])
    else:
        out = PlainConsole(soft_wrap=True)
        for text in doctors.page(findings):
            out.print(text)
    red = [finding.check for finding in findings if finding.level == "red"]
    if red:
        what = f"this host cannot serve {deployment.preset_name} ({deployment.artifact_name}, line "
        what += f"{cell.line_name}): {', '.join(dict.fromkeys(red))}"
        raise errors.HostUnfitError(what, remedy="each red line above has its own")


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
