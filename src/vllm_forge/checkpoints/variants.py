"""Tiny checkpoints by name, made once and kept in the cache: rows of variants.toml.

Some need the quantization tools; those are made by ``nox -s tiny``. All are a function of the
row, of its parents and of the tools' lock.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_forge.checkpoints.changes import Change, apply_changes
from vllm_forge.checkpoints.environment import LOCK
from vllm_forge.checkpoints.recipe import RECIPES
from vllm_forge.checkpoints.shards import open_checkpoint
from vllm_forge.checkpoints.tiny import TinySpec, write_bf16
from vllm_forge.errors import RecipeError, ToolEnvironmentError
from vllm_forge.host import cache_root, exclusive
from vllm_forge.matrix.load import perhaps

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

VARIANTS = Path(__file__).with_name("variants.toml")
BF16 = "bf16"
# Goes into the cache's key: bump it when the same rows give other bytes.
REVISION = 2


class Variant(BaseModel):
    """One row.

    Attributes:
        about: what it is.
        breaks: what goes wrong with it; empty where nothing should.
        made: what makes it with the tools, or ``bf16``.
        parent: what it is derived from, by ``change`` or by ``made``.
        change: what is changed, in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    about: str
    breaks: str = ""
    made: str = ""
    parent: str = ""
    change: tuple[Change, ...] = Field(default=())


def load_variants(path: Path = VARIANTS) -> dict[str, Variant]:
    """All rows, parents before what is derived from them.

    Raises:
        RecipeError: a row that is not one.
    """
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8"))["variant"]
        made = {name: Variant.model_validate(row) for name, row in rows.items()}
    except (tomllib.TOMLDecodeError, KeyError, ValidationError) as error:
        raise RecipeError(f"not a file of variants: {error}", where=str(path)) from None
    for name, row in made.items():
        if row.parent and list(made).index(row.parent) > list(made).index(name):
            raise RecipeError(f"{name} stands before its parent {row.parent}", where=str(path))
        if not row.made and not row.change:
            raise RecipeError(f"{name} is neither made nor changed", where=str(path))
    return made


def variant_path(root: Path, name: str, spec: TinySpec | None = None) -> Path:
    """Where a variant is in the cache, or will be.

    Raises:
        RecipeError: no such variant; with the nearest known name.
    """
    return _path(root, name, spec or TinySpec(), load_variants())


def cached_variant(root: Path, name: str, spec: TinySpec | None = None) -> Path:
    """A variant; written now if that takes no tools and it is not there.

    Raises:
        ToolEnvironmentError: it, or its parent, takes the tools and is not there.
    """
    return make_variant(root, name, spec or TinySpec(), _refuse)


def make_variant(
    root: Path, name: str, spec: TinySpec, make: Callable[[Path, str, TinySpec, str, Path], None]
) -> Path:
    """A variant, made now if it is not there.

    Args:
        root: the checkout.
        name: of the variant.
        spec: sizes of the tiny model.
        make: what makes one that takes the tools: root, name, spec, the row's ``made``, folder.
    """
    variants = load_variants()
    target = _path(root, name, spec, variants)
    row = variants[name]
    with exclusive(f"variant-{target.parent.name}-{name}", wait=True):
        if target.exists():
            return target
        if row.made == BF16:
            write_bf16(target, spec)
        elif row.made:
            make(root, name, spec, row.made, target)
        else:
            parent = make_variant(root, row.parent, spec, make)
            apply_changes(open_checkpoint(parent), row.change, target)
    return target


def _refuse(root: Path, name: str, spec: TinySpec, made: str, target: Path) -> None:
    del root, spec, made
    raise ToolEnvironmentError(
        f"the tiny checkpoint {name!r} is made by the quantization tools",
        where=str(target),
        remedy="run: nox -s tiny",
    )


def _path(root: Path, name: str, spec: TinySpec, variants: Mapping[str, Variant]) -> Path:
    if name not in variants:
        raise RecipeError(
            f"there is no variant {name!r}. {perhaps(name, variants)}", where=str(VARIANTS)
        )
    inputs: list[str] = [str(REVISION)]
    at = name
    while at:
        inputs.append(json.dumps(variants[at].model_dump(mode="json"), sort_keys=True))
        at = variants[at].parent
    if any(variants[n].made not in {"", BF16} for n in _line(name, variants)):
        inputs += [(root / LOCK).read_text(encoding="utf-8"), RECIPES.read_text(encoding="utf-8")]
    digest = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:12]
    return cache_root() / "checkpoints" / spec.key / f"{name}-{digest}"


def _line(name: str, variants: Mapping[str, Variant]) -> list[str]:
    names = [name]
    while parent := variants[names[-1]].parent:
        names.append(parent)
    return names
