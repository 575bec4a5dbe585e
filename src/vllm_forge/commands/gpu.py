"""The GPU suite, its kits and its receipts."""

import argparse
import math
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape

from vllm_forge.commands.bench import require_libraries
from vllm_forge.commands.parsers import LINE, SKU, Commands, command, group, option, positive
from vllm_forge.errors import UsageError
from vllm_forge.host import HostProbe, console, show
from vllm_forge.project import Project

RESULTS, REHEARSAL = "gpu-results", "rehearsal"
NAME = re.compile(r"\w[\w.-]*")


def _workers(text: str) -> str:
    """Processes of pytest-xdist."""
    if text != "auto" and not (text.isdecimal() and int(text) > 0):
        what = f"invalid value {text!r}: expected auto or a number above 0"
        raise argparse.ArgumentTypeError(what)
    return text


def register(choices: Commands) -> None:
    gpu = group(choices, "gpu", help="run the GPU suite and verify its receipts")
    inputs = option(
        "--checkpoint", action="append", default=[], metavar="NAME=DIR", help="for the suite"
    )
    inputs.add_argument("--workloads", type=Path, help="folder with prompts, for tier soak")
    key = option("--key", type=Path, help="private key (PEM) that signs the receipt")
    runs = option("--image", metavar="REF", help="in this image (default: the cell's own)")
    runs.add_argument("--minutes", type=positive, help="budget per tier (default: the suite's)")
    runs.add_argument("--caches", type=Path, help="folder for what JIT compilers make")
    runs.add_argument("--network", action="store_true", help="let the image reach the network")
    runs.add_argument("--output", type=Path, help=f"folder for results (default: dist/{RESULTS})")
    one = command(gpu, "test", test, SKU, LINE, inputs, runs, key)
    one.add_argument(
        "--tier", action="append",
        choices=["kernel", "server", "upstream", "tp2", "tp4", "pcie2", "pcie4", "replicas2",
                 "replicas4", "soak", REHEARSAL, "edges"],
        help="repeatable (default: kernel and server)",
    )  # fmt: skip
    one.add_argument(
        "-n", dest="workers", type=_workers, help="processes: a number, or auto (one a GPU)"
    )

    one = command(gpu, "rehearse", rehearse, SKU, LINE, runs, key)
    one.add_argument("--artifact", help="of matrix.toml (default: the first of the SKU's presets)")

    one = command(gpu, "kit", kit, SKU, LINE, inputs)
    one.add_argument("--output", type=Path, required=True, help="folder that will be made")
    one.add_argument("--image", type=Path, help="OCI layout (default: dist/<cell>)")
    one.add_argument("--max-part", type=positive, default=62, help="in megabytes (62)")
    one.add_argument("--caches", type=Path, help="JIT caches of an earlier run of the same stack")
    one.add_argument("--session", type=Path, action="append", default=[], metavar="TOML",
                     help="of benchmarks, for `sh run.sh bench`; repeatable")  # fmt: skip

    one = command(gpu, "prewarm", prewarm, SKU, LINE)
    one.add_argument("caches", type=Path, help="folder that --caches left of a green run")

    one = command(gpu, "receipts", receipts, key)
    one.add_argument("--result", action="append", default=[], type=Path, help="make one of this")
    one.add_argument("--signed", action="store_true", help="refuse unsigned ones")


def test(project: Project, args: argparse.Namespace) -> None:
    """Run the GPU suite and write receipts."""
    from vllm_forge.gputest.launch import run_in_image
    from vllm_forge.receipts import suite, verification

    cell = project.cell(args.sku, args.line)
    tiers = suite.read_suite(project.root).tier
    names = args.tier or [name for name, tier in tiers.items() if not tier.on_request]
    options = [f"--tier={name}" for name in names]
    options += [f"--minutes={args.minutes}"] if args.minutes else []
    options += ["-n", args.workers] if args.workers else []
    output = args.output or project.root / "dist" / RESULTS / cell.name
    console.print(f"[bold]{cell.name}[/], tiers {', '.join(names)}; results: {escape(str(output))}")
    run_in_image(
        project, cell, HostProbe(), args.image, output=output, args=options,
        inputs=_input_folders(args.checkpoint, args.workloads), caches=args.caches,
        network=args.network,
    )  # fmt: skip
    for name in names:
        show(verification.make_receipt(project, output / f"{name}.json", args.key))


def rehearse(project: Project, args: argparse.Namespace) -> None:
    """Serve a checkpoint of an artifact's size, without its weights, and measure."""
    from vllm_forge.checkpoints.fixtures.full import recipe_of, write_recipe

    cell = project.cell(args.sku, args.line)
    served = [row for row in project.matrix.preset.values() if row.sku == cell.sku_name]
    name = args.artifact or next((row.artifacts[0] for row in served), "")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        write_recipe(recipe_of(project.matrix, name), folder)
        args.tier, args.workers, args.workloads = [REHEARSAL], None, None
        args.checkpoint = [f"{name}={folder}"]
        test(project, args)


def kit(project: Project, args: argparse.Namespace) -> None:
    """Write the suite for a GPU host offline."""
    from vllm_forge.gputest.kit import make_kit

    inputs = _input_folders(args.checkpoint, args.workloads)
    add: Callable[[Path, dict[str, Any]], None] | None = None
    if args.session:
        require_libraries("aiohttp")
        from vllm_forge.gputest.sessions import write_sessions

        add = partial(write_sessions, root=project.root, paths=args.session, inputs=inputs)

    cell = project.cell(args.sku, args.line)
    make_kit(
        project, cell, args.image or project.root / "dist" / cell.name, args.output,
        max_part=math.ceil(args.max_part * 1e6), caches=args.caches,
        inputs=inputs, add=add,
    )  # fmt: skip
    show(args.output)


def prewarm(project: Project, args: argparse.Namespace) -> None:
    """Lock the compiled kernels that a released image carries."""
    from vllm_forge.gputest.launch import lock_prewarm

    show(lock_prewarm(project, project.cell(args.sku, args.line), args.caches))


def receipts(project: Project, args: argparse.Namespace) -> None:
    """Verify all receipts, or add one."""
    from vllm_forge.receipts.verification import describe, make_receipt, verify_all

    for result in args.result:
        show(make_receipt(project, result, args.key))
    print(describe(verify_all(project, signed=args.signed)))


def _input_folders(pairs: list[str], workloads: Path | None) -> dict[str, Path]:
    """Place in the bundle -> folder, of ``NAME=DIR`` arguments and of prompts."""
    folders = {}
    for pair in pairs:
        name, _, folder = pair.partition("=")
        if not NAME.fullmatch(name) or not folder or not Path(folder).is_dir():
            what = f"invalid --checkpoint {pair!r}: expected NAME=DIR"
            raise UsageError(what, where=folder, remedy="give a name and an existing directory")
        if f"checkpoints/{name}" in folders:
            what = f"duplicate --checkpoint {name}"
            raise UsageError(what, where=folder, remedy="give each checkpoint a name of its own")
        folders[f"checkpoints/{name}"] = Path(folder)
    if workloads is not None:
        if not workloads.is_dir():
            what = f"invalid --workloads: {workloads} is not a directory"
            raise UsageError(what, remedy="give the directory with the prompts")
        folders["workloads"] = workloads
    return folders
