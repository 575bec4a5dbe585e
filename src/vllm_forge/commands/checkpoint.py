"""Inspect, quantize and make checkpoints."""

import argparse
import sys
from pathlib import Path

from vllm_forge.checkpoints.quantize.environment import enter, prepare
from vllm_forge.commands.parsers import EVERY_LINE, JSON, Commands, command, group, print_json
from vllm_forge.errors import UsageError
from vllm_forge.host import Runner, show
from vllm_forge.patches import read_dispositions
from vllm_forge.project import Project

FULL = "full"  # beside the names of tiny ones


def register(choices: Commands) -> None:
    checkpoint = group(choices, "checkpoint", help="inspect, quantize and make checkpoints")
    one = command(checkpoint, "inspect", inspect_checkpoint, EVERY_LINE, JSON, packaged=True)
    one.add_argument(
        "place", help="a folder, a model.safetensors.index.json, or owner/name[@revision]"
    )
    one.add_argument("--source", metavar="PLACE", help="what it was made from, to compare dtypes")
    one.add_argument(
        "--values", type=int, metavar="N",
        help="also decode N weights of each part, 0 for all, and compare them with --source",
    )  # fmt: skip
    one.add_argument(
        "--digests", action="store_true",
        help="also read all tensors and compare them with the SHA-256 in its manifest.json",
    )  # fmt: skip
    one.add_argument(
        "--manifest",
        help="the artifact that it must be (default: that of its repository, else the one it fits)",
    )
    one.add_argument(
        "--resolve", choices=("auto", "vllm", "rules"), default="auto",
        help="who says what modules resolve to: the line's vLLM in a dry load (auto: if its layers "
        "are in the cache; vllm: also if they must be made), or matching rules",
    )  # fmt: skip
    one.add_argument("--without-mtp", action="store_true", help="serving without MTP is enough")
    one.add_argument("--modules", action="store_true", help="also what each module resolves to")

    one = command(checkpoint, "quantize", quantize)
    one.add_argument("--model", type=Path, required=True, help="folder with the BF16 model")
    one.add_argument("--recipe", default="nvfp4-fp8-mtp", help="a row of checkpoints/recipes.toml")
    one.add_argument("--output", type=Path, required=True, help="folder that will be made")
    one.add_argument(
        "--data", default="auto", help="auto (ultrachat, else shipped), ultrachat, shipped, a JSONL"
    )
    one.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda:0, ..."
    )
    one.add_argument(
        "--dry-run", action="store_true", help="print what would be done; install and write nothing"
    )

    one = command(checkpoint, "fixtures", fixtures)
    one.add_argument(
        "names", nargs="*", metavar="NAME",
        help=f"bf16, card (default: both); {FULL}: of an artifact's size, see --artifact",
    )  # fmt: skip
    one.add_argument(
        "--tensor-parallel", type=int, choices=(2, 4, 8), default=2, metavar="N",
        help="GPUs that one may be split over: 4 or 8 (default: 2)",
    )  # fmt: skip
    one.add_argument(
        "--artifact", nargs=2, metavar=("NAME", "DIR"),
        help=f"with {FULL}: make a rehearsal of an artifact, which has holes for weights",
    )  # fmt: skip
    one.add_argument(
        "--recipe", action="store_true",
        help=f"with {FULL}: make its recipe, for a host where `python3 DIR/sparse.py` follows it",
    )  # fmt: skip
    command(checkpoint, "tools", tools)


def inspect_checkpoint(project: Project, args: argparse.Namespace) -> None:
    """Show what a checkpoint is, and what each line does with it."""
    from vllm_forge.checkpoints.inspect import inspection, manifest, page
    from vllm_forge.checkpoints.inspect.profile import Profile
    from vllm_forge.proofs.environment import DISPOSITIONS, dry_loads

    line, _ = project.line(args.line)
    names = project.lines(args.line)
    if args.manifest is not None:
        manifest.named(args.manifest)  # reject a mistyped name before anything is read
    if args.values is not None and (args.values < 0 or args.source is None):
        what = "invalid --values: expected a number from 0 on, and --source"
        raise UsageError(what, remedy="give --source, the checkpoint to compare with")
    profile = Profile.open(args.place)
    source = None if args.source is None else Profile.open(args.source)
    report = inspection.inspect(
        profile,
        {name: project.matrix.line[name].vllm for name in names},
        read_dispositions(project.root / DISPOSITIONS),
        dry_loads(project, names, profile, args.resolve, Runner()),
        artifact=args.manifest or manifest.published_as(project.matrix.artifact, args.place),
        source=source,
        values=args.values,
        digests=args.digests,
    )
    if args.json:
        print_json(args, report.model_dump_json(indent=1))
    else:
        page.show(report, modules=args.modules)
    if error := report.error(line, without_mtp=args.without_mtp):
        raise error


def quantize(project: Project, args: argparse.Namespace) -> None:
    """Quantize a BF16 DeepSeek-V4 by a recipe."""
    from vllm_forge.checkpoints.quantize import inputs, quantizer

    recipe = inputs.load_recipe(args.recipe)  # what can be refused at once is, before 3 GB of tools
    source = inputs.open_model(args.model)
    quantizer.check_output(args.model, args.output)
    if args.dry_run:
        print(quantizer.forecast(source, recipe))
        return
    enter(project, sys.argv[1:])

    from vllm_forge.checkpoints.quantize.calibrate import LayerQuantizer, pick_device

    engine = LayerQuantizer(source.config, recipe, pick_device(args.device))
    data = inputs.NO_DATA
    if engine.needs_data:
        data = inputs.calibrate_with(args.data, recipe, args.model)
    job = quantizer.Job(source=source, recipe=recipe, calibration=data, engine=engine)
    quantizer.quantize(job, args.output)
    show(args.output)


def fixtures(project: Project, args: argparse.Namespace) -> None:
    """Make tiny checkpoints in the cache, or one of an artifact's size."""
    from vllm_forge.checkpoints.fixtures.cached import FIXTURES, fixture, fixture_path, is_whole
    from vllm_forge.checkpoints.fixtures.full import recipe_of, write_full, write_recipe
    from vllm_forge.checkpoints.fixtures.tiny import TINY

    if args.artifact is not None or args.recipe or FULL in args.names:
        if args.names != [FULL] or args.artifact is None:
            what = f"expected: fixtures {FULL} --artifact NAME DIR [--recipe]"
            raise UsageError(what, remedy="give an artifact, and a directory that will be made")
        name, folder = args.artifact[0], Path(args.artifact[1])
        (write_recipe if args.recipe else write_full)(recipe_of(project.matrix, name), folder)
        show(folder)
        return

    names, spec = args.names or list(FIXTURES), TINY.split_over(args.tensor_parallel)
    if not all(is_whole(fixture_path(project, name, spec)) for name in names):
        enter(project, sys.argv[1:])
    for name in names:
        show(f"{name}: {fixture(project, name, spec)}")


def tools(project: Project, _: argparse.Namespace) -> None:
    """Install the quantization tools, print their Python."""
    show(prepare(project))
