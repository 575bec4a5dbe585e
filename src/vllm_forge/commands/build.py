"""Build images, install their tools, clean the cache."""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.markup import escape

from vllm_forge.commands.parsers import JSON, LINE, SKU, Commands, command, option, print_json
from vllm_forge.errors import UsageError
from vllm_forge.host import RecordingRunner, Runner, console, gigabytes, show, which
from vllm_forge.host.errors import ToolMissingError
from vllm_forge.matrix import ImageCell
from vllm_forge.project import Project
from vllm_forge.serve.deployment import presets_of

if TYPE_CHECKING:
    from vllm_forge.release.registry import Reference

ENGINES = ("docker", "buildah")
OF_IMAGE = ("base", "output", "prewarm", "engine", "builder")
DEFAULTS = (None, "rootfs")  # of these


def register(choices: Commands) -> None:
    base = option(
        "--base", default="rootfs", metavar="BASE",
        help="rootfs: of locked packages, or current ones where those are gone; locked: or refuse; "
        "current; NAME@sha256:... of a registry",
    )  # fmt: skip
    base.add_argument("--output", type=Path, help="folder for the OCI layout (default: dist)")
    base.add_argument(
        "--kernels", action="store_true",
        help="carry the kernel archives that FlashInfer downloads at the first start otherwise",
    )  # fmt: skip
    one = command(choices, "build", build, SKU, LINE, JSON, base)
    one.add_argument("--engine", choices=ENGINES, help="default: the one that is installed")
    one.add_argument(
        "--builder", metavar="BUILDER",
        help="BuildKit that builds what needs RUN: tcp://HOST:PORT, kube-pod://POD, or the name of "
        "a builder of docker buildx; no daemon is needed here",
    )  # fmt: skip
    one.add_argument("--load", action="store_true", help="also load it into the engine's store")
    one.add_argument("--push", metavar="REF", help="also push it, e.g. HOST/NAME:TAG")
    one.add_argument(
        "--archive", type=Path, metavar="FILE",
        help="also write it to one file: .tar, or .sqsh for enroot and Apptainer",
    )  # fmt: skip
    one.add_argument("--prewarm", type=Path, help="kernels to carry: what gpu test --caches left")
    one.add_argument("--provision", action="store_true", help="install missing build tools (apt)")
    one.add_argument("--dry-run", action="store_true", help="print the commands, do nothing")
    one = command(choices, "why-rebuild", why_rebuild, SKU, LINE, JSON, base)
    one.add_argument("--engine", choices=ENGINES, help="default: that of the last build")
    one = command(choices, "provision", provision)
    one.add_argument("--registry", action="store_true", help="also what the tests need")
    one = command(choices, "clean", clean)
    one.add_argument("--all", action="store_true", help="everything, downloads included")


def build(project: Project, args: argparse.Namespace) -> None:
    """Build one image."""
    from vllm_forge import images
    from vllm_forge.images.archive import require_archive, write_archive

    cell = project.cell(args.sku, args.line)
    reference = args.push and _push_target(args.push)
    runner = RecordingRunner() if args.dry_run else Runner()
    if args.provision:
        images.provision(runner)
    if args.archive:
        require_archive(args.archive, dry_run=args.dry_run)
    if args.builder is not None and args.engine is not None:
        raise UsageError("--builder and --engine exclude each other", remedy="give one of them")
    engine = images.choose_engine(args.engine, dry_run=args.dry_run, builder=args.builder or "")
    if engine.name != "docker" and os.geteuid() != 0 and not args.dry_run:
        as_namespace_root()
    prewarm = None
    if args.prewarm:
        from vllm_forge.gputest.launch import prewarm_of

        prewarm = prewarm_of(project, cell, args.prewarm.resolve())
    options = images.BuildOptions(
        output=args.output or project.root / "dist",
        base=args.base,
        prewarm=prewarm,
        kernels=args.kernels,
    )
    plan = images.resolve(project, cell, options, engine)
    if args.dry_run:
        images.build_steps(plan, runner)
    else:
        image, fresh = images.build_image(plan, runner)
        if args.load or args.push or args.archive:
            # A registry takes layers that no engine could unpack; --load unpacks them itself.
            images.verify(image, unpacked=bool(args.push))
    if args.load:
        engine.load(runner, plan.target, plan.name)
    if args.push:
        _push(runner, plan.target, reference, "DIGEST" if args.dry_run else image.digest)
    if args.archive:
        write_archive(runner, plan.target, plan.name, args.archive, cell.base.source_date_epoch)
    if args.dry_run:
        return
    console.print(
        f"[bold green]{'built' if fresh else 'up to date'}[/] {escape(str(image.path))}\n"
        f"  sha256:{image.digest}  {image.size / 1e6:.0f} MB"
    )
    document = {"image": str(image.path), "digest": f"sha256:{image.digest}", "built": fresh}
    print_json(args, json.dumps(document))
    console.print(f"next: {_next_command(project, cell, args)}", markup=False)


def as_namespace_root() -> NoReturn:
    """Go on as root of a user namespace; buildah maps the user's subordinate ids."""
    buildah = which("buildah")
    if buildah is None:
        raise ToolMissingError(
            "buildah is not installed", remedy="install it, or build with docker"
        )
    argv = [buildah, "unshare", "--", sys.executable, "-m", "vllm_forge", *sys.argv[1:]]
    os.execv(buildah, argv)  # noqa: S606


def _push_target(text: str) -> "Reference":
    from vllm_forge.release.registry import Reference

    reference = Reference.parse(text)
    if reference.digest is not None:
        what = f"invalid --push {reference}: expected HOST[:PORT]/NAME[:TAG]"
        raise UsageError(what, remedy="leave the digest out: it is what is built")
    return reference


def _push(runner: Runner, layout: Path, reference: "Reference", digest: str) -> None:
    """Copy the very bytes of a layout to a registry; only then does the tag name them."""
    from vllm_forge.release import mirror, registry

    digest, tag = f"sha256:{digest}", reference.tag
    mirror.push_layout(runner, layout, reference, digest)
    if tag is not None:
        runner.act(f"set tag {tag}", lambda: registry.Repository(reference).set_tag(tag, digest))


def _next_command(project: Project, cell: ImageCell, args: argparse.Namespace) -> str:
    """What a user does after this build."""
    from vllm_forge.serve.command import build_command

    if not args.load and not args.push:
        # With the options of this build: without them it would be another image, or elsewhere.
        given = {name: getattr(args, name) for name in OF_IMAGE}
        again = [f"--{name}={value}" for name, value in given.items() if value not in DEFAULTS]
        again += ["--kernels"] if args.kernels else []
        return " ".join([build_command(project.matrix, cell), *map(shlex.quote, again)])
    options = f"--sku {cell.sku_name} --line {cell.line_name}"
    presets = list(presets_of(project.matrix, cell.sku_name).values())
    if not presets:
        return f"nox -s plan -- {options}"
    return f"nox -s serve -- {options} --preset {presets[0]}"


def provision(_: Project, args: argparse.Namespace) -> None:
    """Install the build tools (apt, as root)."""
    from vllm_forge.images import provision as install_tools

    install_tools(Runner(), registry=args.registry)


def clean(project: Project, args: argparse.Namespace) -> None:
    """Delete what the cache holds and no line needs."""
    from vllm_forge.images.clean import clean as clean_cache

    if os.geteuid() != 0 and which("buildah") is not None:
        as_namespace_root()  # system images hold files of mapped users
    freed = clean_cache(project, everything=args.all)
    console.print(f"{gigabytes(freed)} freed")


def why_rebuild(project: Project, args: argparse.Namespace) -> None:
    """Name the inputs that changed since the last build."""
    from vllm_forge.images import BuildOptions, choose_engine, resolve
    from vllm_forge.images.plan import why_rebuild
    from vllm_forge.images.record import read_record

    cell = project.cell(args.sku, args.line)
    options = BuildOptions(
        output=args.output or project.root / "dist", base=args.base, kernels=args.kernels
    )
    record = read_record(options.output / f"{cell.name}.json")
    engine = args.engine or (None if record is None else str(record["engine"]))
    # No engine need be here: its name is one of the inputs, and that is all.
    plan = resolve(project, cell, options, choose_engine(engine, dry_run=True))
    state, changes = why_rebuild(plan)
    if args.json:
        rows = [{"name": name, "parts": parts} for name, parts in changes.items()]
        print_json(args, {"cell": cell.name, "state": state, "changes": rows})
        return
    show(f"{cell.name}: {state}")
    for name, parts in changes.items():
        show(f"  {name}")
        for part in parts:
            show(f"    {part}")
