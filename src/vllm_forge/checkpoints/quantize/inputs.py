"""What a quantization starts from: a whole BF16 model, and a row of recipes.toml."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from vllm_forge.checkpoints.architecture import all_tensors, has_dspark, require_deepseek_v4
from vllm_forge.checkpoints.checkpoint import Checkpoint
from vllm_forge.checkpoints.errors import ModelInputError, RecipeError
from vllm_forge.checkpoints.tensors import INDEX, TensorSpec
from vllm_forge.host import suggestion
from vllm_forge.matrix import FrozenModel

SHOWN = 5
QUANTIZED = ("quantization_config", "compression_config")
# Where the drafter's loader looks for embedding and output head (vLLM 0.26.0,
# vllm/models/deepseek_v4/nvidia/mtp.py, WEIGHT_NAME_REMAPPING): name in the block -> whose bytes.
ALIASES = {"emb.tok_emb.weight": "embed.weight", "head.weight": "head.weight"}
RECIPES = Path(__file__).with_name("recipes.toml")
DRAFT = "{draft}"


def open_model(folder: Path) -> Checkpoint:
    """Open the model and compare it with what its config implies.

    Raises:
        CheckpointUnreadableError: another model, or a file of it is missing or malformed.
        ModelInputError: a quantized one, shards that are not those of the index, or tensors that
            are missing, unknown, of the wrong shape, or of a dtype that has lost precision already.
    """
    checkpoint = Checkpoint.open(folder)
    require_deepseek_v4(checkpoint.config, str(folder))
    if any(checkpoint.config.get(key) is not None for key in QUANTIZED):
        raise ModelInputError(
            "the model is quantized already",
            where=str(folder),
            remedy="start from the BF16 model: convert the published FP8 one first",
        )
    unlisted = checkpoint.index is None and len(checkpoint.shards) > 1
    for missing in (INDEX,) if unlisted else checkpoint.missing_shards:
        raise ModelInputError(f"missing {missing}", where=str(folder), remedy="fetch it again")
    if checkpoint.misplaced:
        raise ModelInputError(
            f"{INDEX} does not match the shards: {len(checkpoint.misplaced)} tensors are not where "
            f"it says, e.g. {checkpoint.misplaced[0]}",
            where=str(folder),
            remedy="fetch index and shards of the same revision",
        )
    if problems := list(_problems(checkpoint)):
        shown = "\n".join(f"  - {problem}" for problem in problems[:SHOWN])
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ModelInputError(
            f"not the tensors that config.json describes:\n{shown}{more}",
            where=str(folder),
            remedy="an interrupted download, or a conversion that dropped or changed tensors: "
            "make the BF16 model again",
        )
    return checkpoint


def _problems(checkpoint: Checkpoint) -> Iterator[str]:
    expected: dict[str, TensorSpec] = {t.name: t for t in all_tensors(checkpoint.config)}
    for name, origin in _aliases(checkpoint.config).items():
        if name in checkpoint.tensors:
            expected[name] = replace(expected[origin], name=name)
    for name, tensor in expected.items():
        stored = checkpoint.tensors.get(name)
        if stored is None:
            yield f"{name} is missing"
        elif stored.shape != tensor.shape:
            yield f"{name} is {list(stored.shape)}, not {list(tensor.shape)}"
        elif stored.dtype not in {tensor.dtype, *(["F32"] if tensor.dtype == "BF16" else [])}:
            yield f"{name} is {stored.dtype}, not {tensor.dtype}"
    for name, stored in checkpoint.tensors.items():
        if name not in expected or stored.name != name:
            yield f"{stored.name} is not a tensor of this model"


def alias_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Aliases that the drafter needs and the model does not have: name -> whose bytes."""
    aliases = _aliases(checkpoint.config)
    return {name: source for name, source in aliases.items() if name not in checkpoint.tensors}


def _aliases(config: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"mtp.{index}.{leaf}": source
        for index in range(0 if has_dspark(config) else config["num_nextn_predict_layers"])
        for leaf, source in ALIASES.items()
    }


class Group(FrozenModel):
    """Modules that are quantized in one way; see the head of recipes.toml."""

    scheme: str = Field(description="preset of compressed-tensors")
    format: str = Field(description="how compressed-tensors stores it")
    tensors: str
    calibrate: tuple[str, ...]
    serve: tuple[str, ...]


class Recipe(FrozenModel):
    """One recipe; see the head of recipes.toml."""

    name: str
    about: str
    samples: int = Field(ge=1, description="conversations to calibrate with")
    tokens: int = Field(ge=1, description="of each conversation, at most")
    seed: int = Field(description="of their choice")
    scale_fmt: str = Field(description="in config.json; vLLM before 0.23 stops without it")
    ignore: tuple[str, ...] = Field(description="in config.json")
    group: tuple[Group, ...] = Field(min_length=1)

    def group_of(self, name: str) -> Group | None:
        """The group that a tensor belongs to, by its upstream name; None if it stays as it is."""
        for group in self.group:
            if re.fullmatch(rf"layers\.\d+\.{group.tensors}\.weight", name):
                return group
        return None

    def ignored(self, config: Mapping[str, Any]) -> list[str]:
        """The ignore list for a model, with the numbers of its draft layers."""
        first = config["num_hidden_layers"]
        drafts = range(first, first + config["num_nextn_predict_layers"])
        rows = []
        for row in self.ignore:
            rows += [row.replace(DRAFT, str(n)) for n in drafts] if DRAFT in row else [row]
        return rows


def load_recipe(name: str, path: Path = RECIPES) -> Recipe:
    """One row of the recipes, on top of those that it extends; RecipeError for another."""
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8"))["recipe"]
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise RecipeError(f"not a file of recipes: {error}", where=str(path)) from None
    if name not in rows:
        raise RecipeError(
            f"unknown recipe {name!r}{suggestion(name, rows)}",
            where=str(path),
            remedy="add a row, or name one of those",
        )
    row = rows[name]
    try:
        while "extends" in row:
            row = {**rows[row.pop("extends")], **row}
        return Recipe.model_validate({"name": name, **row})
    except (ValidationError, KeyError) as error:
        raise RecipeError(f"recipe {name}: {error}", where=str(path)) from None
