"""Trees of a series: without one patch, twice, and in another order.

A tree without one patch is what its proof must be red on. It is made by git alone: nothing here
reads code.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from unidiff.patch import PatchSet

from vllm_forge.errors import ForgeError
from vllm_forge.patches.apply import MOVED, Applied, TreeIndex, apply_series
from vllm_forge.patches.errors import AlreadyUpstreamError, InseparablePatchError, SeriesOrderError
from vllm_forge.patches.header import Patch
from vllm_forge.sources import SourceRepo

OTHERS = "the others applied"
TAKEN_OUT = "taken out of the whole"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A tree that lacks one patch of its series; ``way``: how it was made."""

    left_out: Patch
    tree: str
    way: str


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Names of two neighbours of a series, and whether their order does not matter."""

    first: str
    second: str
    commutes: bool


def without(repo: SourceRepo, applied: Applied, patches: Sequence[Patch], index: int) -> Variant:
    """The whole series without ``patches[index]``; InseparablePatchError if there is no such."""
    patch = patches[index]
    tree: str | None = before(applied, index)
    for other in patches[index + 1 :]:
        tree = tree and apply_one(repo, tree, other)
    if tree is not None:
        return Variant(left_out=patch, tree=tree, way=OTHERS)
    if (tree := _taken_out(repo, applied, patch, index)) is not None:
        return Variant(left_out=patch, tree=tree, way=TAKEN_OUT)
    raise InseparablePatchError(
        f"{patch.name} can neither be left out nor be taken out: later patches build on it",
        where=str(patch.path),
        remedy="make one patch of those that cannot do without each other",
    )


def before(applied: Applied, index: int) -> str:
    """The tree that patch number ``index`` is applied to."""
    return applied.trees[index - 1] if index else applied.base


def require_idempotent(repo: SourceRepo, applied: Applied, patches: Sequence[Patch]) -> None:
    """A second run gives the same trees; no patch goes onto its own result. SeriesOrderError."""
    again = apply_series(repo, applied.base, patches)
    if again != applied:
        raise SeriesOrderError(
            f"applied twice to the same source, the series gave {applied.result}, then "
            f"{again.result}",
            remedy="no result can be trusted: look for what is not a function of the patches",
        )
    for patch, tree in zip(patches, applied.trees, strict=True):
        try:
            apply_series(repo, tree, [patch])
        except AlreadyUpstreamError:
            continue
        except ForgeError as error:
            said = f"was refused as {type(error).__name__}"
        else:
            said = "applied again"
        raise SeriesOrderError(
            f"{patch.name} {said} on its own result, where it must be refused as "
            f"{AlreadyUpstreamError.__name__}",
            where=str(patch.path),
            remedy="its hunks fit in more than one place: give them context that fits in one",
        )


def pairs(repo: SourceRepo, applied: Applied, patches: Sequence[Patch]) -> tuple[Pair, ...]:
    """Neighbours of the series in both orders.

    SeriesOrderError if hunks apart from each other do not commute, or both orders apply and give
    different trees.
    """
    found = []
    for index, (first, second) in enumerate(pairwise(patches)):
        tree: str | None = apply_one(repo, before(applied, index), second, moved=True)
        tree = tree and apply_one(repo, tree, first, moved=True)
        same = tree == applied.trees[index + 1]
        if not same and (tree is not None or not _touch(first, second)):
            raise SeriesOrderError(
                f"{first.name} and {second.name} "
                + ("give another tree" if tree else "do not apply")
                + " in the other order",
                where=str(first.path.parent),
                remedy="make one patch of the two, or see which lines they share",
            )
        found.append(Pair(first=first.name, second=second.name, commutes=same))
    return tuple(found)


def trees_of_moved(repo: SourceRepo, base: str, patches: Sequence[Patch]) -> list[str]:
    """The base and the tree after each patch, hunks at other lines and other forms allowed."""
    trees = [base]
    for patch in patches:
        after = apply_one(repo, trees[-1], patch, moved=True)
        # Refused: the strict way says best why.
        trees.append(after or apply_series(repo, trees[-1], [patch]).result)
    return trees


def apply_one(repo: SourceRepo, tree: str, patch: Patch, *, moved: bool = False) -> str | None:
    """The tree after one patch, None where git refuses it; ``moved`` allows an offset."""
    with TreeIndex(repo, tree) as index:
        done = index.apply(patch)
        if done.returncode != 0:
            return None
        if not moved and MOVED.search(done.stderr.decode(errors="replace")):
            return None
        return index.tree()


def _taken_out(repo: SourceRepo, applied: Applied, patch: Patch, number: int) -> str | None:
    """The whole without what one patch did to its files, by a three-way merge; None: a conflict.

    Not by applying it in reverse: a hunk at other lines may be found at the wrong ones.
    """
    trees = (applied.result, applied.trees[number], before(applied, number))
    with (
        TreeIndex(repo, applied.result) as index,
        tempfile.TemporaryDirectory(prefix="vllm-forge-merge-") as folder,
    ):
        files = [Path(folder) / name for name in ("whole", "with", "without")]
        for path in patch.files:
            for file, tree in zip(files, trees, strict=True):
                blob = repo.git("cat-file", "blob", f"{tree}:{path}", check=False)
                if blob.returncode != 0:  # the patch, or a later one, adds or deletes the file
                    return None
                file.write_bytes(blob.stdout)
            merged = repo.git("merge-file", "--quiet", "-p", *map(str, files), check=False)
            if merged.returncode != 0:
                return None
            mode = index.git("ls-files", "--stage", "--", path).split()[0]
            index.put(path, mode, merged.stdout)
        return index.tree()


def _touch(first: Patch, second: Patch) -> bool:
    """Whether hunks of the two, with their context, share a line or lie against each other."""
    ends = {
        file.path: [(hunk.target_start, hunk.target_start + hunk.target_length) for hunk in file]
        for file in PatchSet(first.diff)
    }
    return any(
        start <= hunk.source_start + hunk.source_length and hunk.source_start <= end
        for file in PatchSet(second.diff)
        for hunk in file
        for start, end in ends.get(file.path, [])
    )
