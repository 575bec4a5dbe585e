"""Quantization recipes: rows of recipes.toml."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from vllm_forge.checkpoints.errors import RecipeError
from vllm_forge.host import suggestion
from vllm_forge.matrix import FrozenModel

if TYPE_CHECKING:
    from collections.abc import Mapping

RECIPES = Path(__file__).with_name("recipes.toml")
DRAFT = "{draft}"


class Group(FrozenModel):
    """Modules that are quantized in one way; see the head of recipes.toml."""

    scheme: str = Field(description="preset of compressed-tensors")
    format: str = Field(description="how compressed-tensors stores it")
    tensors: str
    calibrate: tuple[str, ...]
    serve: tuple[str, ...]

    def holds(self, name: str) -> bool:
        """Whether ``layers.<i>.<...>.weight`` is the weight of one of its modules."""
        return bool(re.fullmatch(rf"layers\.\d+\.{self.tensors}\.weight", name))


class Recipe(FrozenModel):
    """One recipe.

    Attributes:
        samples: conversations to calibrate with.
        tokens: of each conversation, at most.
        seed: of their choice.
        scale_fmt: in config.json; vLLM before 0.23 stops without it.
        ignore: in config.json.
    """

    about: str
    samples: int = Field(ge=1)
    tokens: int = Field(ge=1)
    seed: int
    scale_fmt: str
    ignore: tuple[str, ...]
    group: tuple[Group, ...] = Field(min_length=1)

    def group_of(self, name: str) -> Group | None:
        """The group that a tensor belongs to, by its upstream name; None if it stays as it is."""
        return next((group for group in self.group if group.holds(name)), None)

    def ignored(self, config: Mapping[str, Any]) -> list[str]:
        """The ignore list for a model, with the numbers of its draft layers."""
        first = config["num_hidden_layers"]
        drafts = range(first, first + config["num_nextn_predict_layers"])
        rows = []
        for row in self.ignore:
            rows += [row.replace(DRAFT, str(n)) for n in drafts] if DRAFT in row else [row]
        return rows


@dataclass(frozen=True, kw_only=True)
class NamedRecipe:
    """A recipe and the name of its row."""

    name: str
    recipe: Recipe


def load_recipe(name: str, path: Path = RECIPES) -> NamedRecipe:
    """One row of the recipes.

    Raises:
        RecipeError: no such recipe, or a row that is not one; with the nearest known name.
    """
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
    try:
        recipe = Recipe.model_validate(_merged(name, rows))
    except (ValidationError, KeyError) as error:
        raise RecipeError(f"recipe {name}: {error}", where=str(path)) from None
    return NamedRecipe(name=name, recipe=recipe)


def _merged(name: str, rows: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A row on top of the one that it extends."""
    row = dict(rows[name])
    parent = row.pop("extends", None)
    return row if parent is None else _merged(parent, rows) | row
