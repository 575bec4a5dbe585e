"""Variants that take the quantization tools: which function makes which.

Needs the environment of docker/locks/quantize.txt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vllm_forge.checkpoints.calibrate import LayerQuantizer
from vllm_forge.checkpoints.calibration import NO_DATA, calibrate_with
from vllm_forge.checkpoints.job import Job
from vllm_forge.checkpoints.native import write_fp8, write_modelopt, write_native
from vllm_forge.checkpoints.quantize import quantize
from vllm_forge.checkpoints.recipe import load_recipe
from vllm_forge.checkpoints.shards import open_checkpoint
from vllm_forge.checkpoints.source import open_source
from vllm_forge.checkpoints.variants import BF16, make_variant
from vllm_forge.errors import RecipeError

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_forge.checkpoints.tiny import TinySpec

CARD = "card"


def make_with_tools(root: Path, name: str, spec: TinySpec, made: str, folder: Path) -> None:
    """Make a variant.

    Args:
        root: the checkout.
        name: of the variant.
        spec: sizes of the tiny model.
        made: the row's field: ``recipe <name>``, or one of the words below.
        folder: appears when everything is in it.

    Raises:
        RecipeError: a word that is not known.
    """

    def model(of: str, sizes: TinySpec = spec) -> Path:
        return make_variant(root, of, sizes, make_with_tools)

    match made.split():
        case ["recipe", recipe]:
            run_recipe(model(BF16), recipe, folder)
        case ["native"]:
            write_native(open_source(model(BF16)), folder)
        case ["dspark"]:
            write_native(open_source(model(BF16, replace(spec, dspark=True))), folder)
        case ["modelopt" | "modelopt-fp8-mtp"]:
            source, card = open_source(model(BF16)), open_checkpoint(model(CARD))
            write_modelopt(source, card, folder, fp8_drafts=made == "modelopt-fp8-mtp")
        case ["fp8-mtp" | "fp8-compressor"]:
            write_fp8(open_checkpoint(model(CARD)), folder, made)
        case _:
            raise RecipeError(f"variant {name}: nothing makes {made!r}")


def run_recipe(model: Path, recipe_name: str, output: Path, device: str = "cpu") -> None:
    """Quantize with the shipped conversations and one thread: the same bytes on every host."""
    torch.set_num_threads(1)
    source, named = open_source(model), load_recipe(recipe_name)
    engine = LayerQuantizer(source.config, named.recipe, device)
    data = calibrate_with("shipped", named.recipe, model) if engine.needs_data else NO_DATA
    quantize(Job(source=source, recipe=named, calibration=data, engine=engine), output)
