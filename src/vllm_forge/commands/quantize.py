"""Quantize a model by a recipe, and make tiny ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_forge.checkpoints.quantize.calibration import AUTO

if TYPE_CHECKING:
    import argparse

    from vllm_forge.commands.register import Commands
    from vllm_forge.project import Project


def register(choices: Commands) -> None:
    """Add this module's commands."""
    one = choices.add_parser(
        "quantize", help="quantize a BF16 DeepSeek-V4 by a recipe", allow_abbrev=False
    )
    one.add_argument("--model", type=Path, required=True, help="folder with the BF16 model")
    one.add_argument("--recipe", default="nvfp4-fp8-mtp", help="a row of checkpoints/recipes.toml")
    one.add_argument("--output", type=Path, required=True, help="folder that will be made")
    one.add_argument(
        "--data", default=AUTO, help="auto (ultrachat, else shipped), ultrachat, shipped, a JSONL"
    )
    one.add_argument(
        "--device", default=AUTO, help="auto (a GPU if there is one), cpu, cuda:0, ..."
    )
    one.add_argument(
        "--dry-run", action="store_true", help="say what would be done; install and write nothing"
    )
    one.set_defaults(call=quantize)

    one = choices.add_parser("tiny", help="make tiny checkpoints in the cache", allow_abbrev=False)
    one.add_argument("names", nargs="*", metavar="VARIANT", help="default: all; see variants.toml")
    one.set_defaults(call=tiny)

    one = choices.add_parser("tools", help="install the quantization tools, print their Python")
    one.set_defaults(call=tools)


def quantize(project: Project, args: argparse.Namespace) -> None:
    """Quantize a model."""
    from vllm_forge.checkpoints.quantize.environment import enter
    from vllm_forge.checkpoints.quantize.quantizer import check_output, forecast
    from vllm_forge.checkpoints.quantize.quantizer import quantize as run
    from vllm_forge.checkpoints.quantize.recipe import load_recipe
    from vllm_forge.checkpoints.quantize.source import open_source

    recipe = load_recipe(args.recipe)  # what can be refused at once is, before 3 GB of tools
    source = open_source(args.model)
    check_output(args.model, args.output)
    if args.dry_run:
        print(forecast(source, recipe))
        return
    enter(project.root, sys.argv[1:])

    from vllm_forge.checkpoints.quantize.calibrate import LayerQuantizer, pick_device
    from vllm_forge.checkpoints.quantize.calibration import NO_DATA, calibrate_with
    from vllm_forge.checkpoints.quantize.job import Job

    engine = LayerQuantizer(source.config, recipe.recipe, pick_device(args.device))
    data = calibrate_with(args.data, recipe.recipe, args.model) if engine.needs_data else NO_DATA
    run(Job(source=source, recipe=recipe, calibration=data, engine=engine), args.output)
    print(args.output)


def tiny(project: Project, args: argparse.Namespace) -> None:
    """Make tiny checkpoints in the cache."""
    from vllm_forge.checkpoints.fixtures.tiny import TinySpec
    from vllm_forge.checkpoints.fixtures.variants import load_variants, make_variant, variant_path
    from vllm_forge.checkpoints.quantize.environment import enter

    names = args.names or list(load_variants())
    if not all(variant_path(project.root, name).exists() for name in names):
        enter(project.root, sys.argv[1:])
        from vllm_forge.checkpoints.fixtures.tool_fixtures import make_with_tools

        for name in names:
            make_variant(project.root, name, TinySpec(), make_with_tools)
    for name in names:
        print(f"{name}: {variant_path(project.root, name)}")


def tools(project: Project, args: argparse.Namespace) -> None:
    """Install the quantization tools and print their interpreter."""
    from vllm_forge.checkpoints.quantize.environment import prepare

    del args
    print(prepare(project.root))
