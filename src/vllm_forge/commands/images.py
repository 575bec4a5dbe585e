"""Build images, install their tools, clean the cache."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vllm_forge.host import RecordingRunner, SubprocessRunner, console, gigabytes, which
from vllm_forge.host.errors import ToolMissingError

if TYPE_CHECKING:
    import argparse

    from vllm_forge.commands.register import Commands
    from vllm_forge.images import Image
    from vllm_forge.project import Project


def register(choices: Commands) -> None:
    """Add this module's commands."""
    one = choices.add_parser("build", help="build one image", allow_abbrev=False)
    one.add_argument("sku", help="a SKU or an arch of matrix.toml, e.g. b300 or sm120")
    one.add_argument("--line", help="vLLM line (default: the matrix's)")
    one.add_argument("--engine", help="docker or buildah (default: the one that is here)")
    one.add_argument("--base", default="rootfs", help="rootfs, or NAME@sha256:... of a registry")
    one.add_argument("--refresh-base", action="store_true", help="make rootfs and system again")
    one.add_argument("--output", type=Path, help="folder for the OCI layout (default: dist/)")
    one.add_argument("--load", action="store_true", help="also load it into the engine's store")
    one.add_argument("--push", metavar="REF", help="also push it, e.g. registry/name:tag")
    one.add_argument("--prewarm", type=Path, help="kernels to carry: what test-gpu --caches left")
    one.add_argument("--provision", action="store_true", help="install missing build tools (apt)")
    one.add_argument("--dry-run", action="store_true", help="print the commands, do nothing")
    one.set_defaults(call=build)

    one = choices.add_parser("provision", help="install the build tools (apt, as root)")
    one.add_argument("--registry", action="store_true", help="also docker-registry, for the tests")
    one.set_defaults(call=install_tools)

    one = choices.add_parser("clean", help="delete what the cache holds and no line needs")
    one.add_argument("--all", action="store_true", help="everything, downloads included")
    one.set_defaults(call=clean)


def build(project: Project, args: argparse.Namespace) -> None:
    """Build one image."""
    from vllm_forge.gputest.prewarm import prewarm_of
    from vllm_forge.images import (
        BuildOptions,
        build_image,
        build_steps,
        choose_engine,
        provision,
        resolve,
    )

    cell = project.cell(args.sku, args.line)
    runner = RecordingRunner() if args.dry_run else SubprocessRunner()
    if args.provision:
        provision(runner)
    engine = choose_engine(args.engine, dry_run=args.dry_run)
    if engine.name == "buildah" and os.geteuid() != 0 and not args.dry_run:
        _as_namespace_root()
    options = BuildOptions(
        output=args.output or project.root / "dist",
        base_image=None if args.base == "rootfs" else args.base,
        refresh_base=args.refresh_base,
        prewarm=None if args.prewarm is None else prewarm_of(cell, args.prewarm.resolve()),
    )
    plan = resolve(project, cell, options, engine)
    made = None
    if args.dry_run:
        build_steps(plan, runner)
    else:
        made = build_image(plan, runner)
    target = plan.target
    if args.load:
        engine.load(runner, target, plan.name)
    if args.push:
        _push(runner, target, args.push)
    if made is not None:
        _announce(made.image, fresh=made.fresh)


def _as_namespace_root() -> NoReturn:
    """Go on as root of a user namespace; buildah maps the user's subordinate ids."""
    buildah = which("buildah")
    if buildah is None:
        raise ToolMissingError("buildah is not installed")
    argv = [buildah, "unshare", "--", sys.executable, "-m", "vllm_forge", *sys.argv[1:]]
    os.execv(buildah, argv)  # noqa: S606


def _push(runner: RecordingRunner | SubprocessRunner, target: Path, reference: str) -> None:
    """Copy the very bytes of the layout to a registry; skopeo checks the digests."""
    plain = ["--dest-tls-verify=false"] if reference.startswith(("127.0.0.1", "localhost")) else []
    runner.run(
        [
            "skopeo", "copy", "--quiet", "--all", *plain,
            f"--digestfile={target}.pushed", f"oci:{target}", f"docker://{reference}",
        ]
    )  # fmt: skip


def _announce(image: Image, *, fresh: bool) -> None:
    console.print(
        f"[bold green]{'built' if fresh else 'up to date'}[/] {image.path}\n"
        f"  sha256:{image.digest}  {image.size / 1e6:.0f} MB"
    )
    print(
        json.dumps({"image": str(image.path), "digest": f"sha256:{image.digest}", "built": fresh})
    )


def install_tools(_: Project, args: argparse.Namespace) -> None:
    """Install the build tools on this host."""
    from vllm_forge.images import provision

    provision(SubprocessRunner(), registry=args.registry)


def clean(project: Project, args: argparse.Namespace) -> None:
    """Delete what the cache holds and no line needs."""
    from vllm_forge.images.clean import clean as clean_cache

    if os.geteuid() != 0 and which("buildah") is not None:
        _as_namespace_root()  # system images hold files of mapped users
    freed = clean_cache(project, everything=args.all)
    console.print(f"{gigabytes(freed)} freed")
