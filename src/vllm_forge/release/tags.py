"""Names of images in a registry: which ones a stage gives, and which of them never move.

    dev        <line>-<sku>-dev                     moves
    candidate  <vllm>-forge.<n>-<sku>-rc<m>         never moves
    release    <vllm>-forge.<n>-<sku>               never moves
               <line>-<sku>                         moves, last

``n`` counts the releases of that vLLM for that SKU, ``m`` the candidates for release ``n``: both by
the tags that the registry has. An image that has such a tag keeps it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from vllm_forge.matrix import ImageCell
from vllm_forge.matrix.model import Stage
from vllm_forge.release.errors import TagTakenError

NUMBERED = re.compile(r"(?P<vllm>.+)-forge\.(?P<n>[1-9]\d*)-(?P<sku>.+?)(-rc(?P<m>[1-9]\d*))?")


@dataclass(frozen=True, kw_only=True)
class Names:
    """Tags that an image gets, in this order: one that never moves, and one that does."""

    fixed: str | None = None
    moving: str | None = None

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.fixed, self.moving)))


def forms(cell: ImageCell, stage: Stage) -> list[str]:
    """The tags of a stage before they are counted, for a dry run."""
    names = choose_names(cell, stage, "", (), lambda _: None).all
    return [re.sub(r"(forge\.|rc)1\b", r"\1<n>", name) for name in names]


def previous_release(tag: str) -> str | None:
    """The tag of the release before; None for a first one, and other tags."""
    match = NUMBERED.fullmatch(tag)
    if match is None or match["m"] or match["n"] == "1":
        return None
    return f"{match['vllm']}-forge.{int(match['n']) - 1}-{match['sku']}"


def choose_names(
    cell: ImageCell,
    stage: Stage,
    digest: str,
    tags: tuple[str, ...],
    resolve: Callable[[str], str | None],
) -> Names:
    """The tags of an image ``sha256:<hex>`` at a stage; ``resolve``: a tag's digest now."""
    if stage == "dev":
        return Names(moving=f"{cell.line_name}-{cell.sku_name}-dev")
    matches = filter(None, map(NUMBERED.fullmatch, tags))
    own = [m for m in matches if (m["vllm"], m["sku"]) == (cell.line.vllm, cell.sku_name)]
    released = {int(match["n"]): match[0] for match in own if not match["m"]}
    following = max(released, default=0) + 1
    prefix, suffix = f"{cell.line.vllm}-forge.", f"-{cell.sku_name}"
    if stage == "candidate":
        candidates = [match for match in own if match["m"]]
        for match in candidates:
            if resolve(match[0]) == digest:
                return Names(fixed=match[0])
        numbers = [int(match["m"]) for match in candidates if int(match["n"]) == following]
        return Names(fixed=f"{prefix}{following}{suffix}-rc{max(numbers, default=0) + 1}")
    for number, tag in released.items():
        if resolve(tag) == digest:
            following = number
    newest = following >= max(released, default=0)
    moving = f"{cell.line_name}{suffix}" if newest else None
    return Names(fixed=f"{prefix}{following}{suffix}", moving=moving)


def require_free(tag: str, digest: str, current: str | None) -> None:
    """TagTakenError if a tag that never moves names another image."""
    if current not in (None, digest):
        what = f"{tag} is {current} already, and never moves"
        remedy = (
            "another release took it meanwhile: run the command again, which takes the next one"
        )
        raise TagTakenError(what, where=f"to be given to {digest}", remedy=remedy)
