"""A line's folder: the ordered list of its patches, exactly its patch files, and ``lock.toml``.

The lock names what the series starts from and must end at. Trees without one patch, which a proof
must be red on, and in another order are made by git alone: nothing here reads code.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import Field
from unidiff.patch import PatchSet

from vllm_forge.errors import ForgeError
from vllm_forge.host import cache_root, exclusive, read_data, write_whole
from vllm_forge.matrix import FrozenModel
from vllm_forge.patches import apply, errors
from vllm_forge.patches.apply import Applied, Patch
from vllm_forge.patches.wheel import changed_files
from vllm_forge.project import Project
from vllm_forge.sources import Download, Index, SourceRepo, download_all, verified
from vllm_forge.sources.errors import LockFileError
from vllm_forge.sources.index import pins
from vllm_forge.sources.shared import take

COMMAND = "nox -s forge -- patch lock --line"
OTHERS = "the others applied"
TAKEN_OUT = "taken out of the whole"


class TreeLock(FrozenModel):
    """A line's source archive (name, bytes, hash); git's hashes of its tree, as is and patched."""

    sdist: str = Field(pattern=r"^[\w.+-]+\.tar\.gz$")  # a name in the cache
    size: int
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    base: str = Field(pattern=r"^([0-9a-f]{40})?$")
    result: str = Field(pattern=r"^([0-9a-f]{40})?$")


def read_series(folder: Path) -> tuple[Patch, ...]:
    """Parse ``folder/series`` and its patches; SeriesFileError or AppliedTwiceError."""
    path = folder / "series"
    if not path.is_file():
        remedy = "list the names of the line's patches there, in order, if there are any"
        raise errors.SeriesFileError("no series file", where=path, remedy=remedy)
    rows = path.read_text(encoding="utf-8", errors="replace").splitlines()
    names = [row.strip() for row in rows if row.strip() and not row.startswith("#")]
    for name in names:
        if names.count(name) > 1:
            what = f"{name} is listed twice"
            raise errors.AppliedTwiceError(what, where=path, remedy="delete one of the lines")
        if "/" in name or (folder / name).is_symlink() or not (folder / name).is_file():
            what = f"the series lists {name}, which is not a file of its folder"
            remedy = "add the file, or delete the line"
            raise errors.SeriesFileError(what, where=path, remedy=remedy)
    present = {file.name for file in folder.iterdir() if file.suffix in {".patch", ".diff"}}
    if unlisted := sorted(present - set(names)):
        what = f"not in the series: {', '.join(unlisted)}"
        remedy = "list it where it belongs, or delete the file"
        raise errors.SeriesFileError(what, where=path, remedy=remedy)
    return tuple(apply.read_patch(folder / name) for name in names)


def series_text(folder: Path, names: list[str]) -> str:
    """The series file for ``names``; a comment stays above the patch that it is above now."""
    comments: dict[str, list[str]] = {}
    pending: list[str] = []
    for row in (folder / "series").read_text(encoding="utf-8").splitlines():
        if row.startswith("#") or not row.strip():
            pending.append(row)
        else:
            comments[row.strip()], pending = pending, []
    rows = [row for name in names for row in [*comments.get(name, []), name]]
    return "".join(f"{row}\n" for row in [*rows, *pending])


def read_tree_lock(folder: Path, line_name: str) -> TreeLock:
    """Parse ``folder/lock.toml``; LockFileError if it is missing or malformed."""
    return read_data(
        folder / "lock.toml",
        lambda data: TreeLock.model_validate(data, strict=True),
        LockFileError,
        what="tree lock",
        remedy=f"run: {COMMAND} {line_name}",
    )


def fetch_base(lock: TreeLock, version: str, repo: SourceRepo) -> str:
    """Tree hash of the pristine source; downloads the archive only when it is not cached."""
    tree = repo.tree(version)
    if tree is not None and tree != lock.base:  # of a release that was published again
        repo.forget(version)
        tree = None
    if tree is None:
        tree = repo.import_archive(version, fetch_archive(lock))
    if tree != lock.base:
        what = f"the source tree of vLLM {version} is {tree}, the series is for {lock.base}"
        remedy = "the release may have been published again: look at what changed before you "
        raise errors.WrongBaseError(what, where=repo.path, remedy=f"{remedy}make a new lock")
    return tree


def check_line(project: Project, line_name: str, repo: SourceRepo) -> Applied:
    """Apply a line's series and compare with its lock: WrongBaseError or TreeMismatchError.

    WheelSourceError if it changes what no wheel has, or more than the content of a file.
    """
    line = project.matrix.line[line_name]
    folder = project.root / line.series
    patches = read_series(folder)
    lock = read_tree_lock(folder, line_name)
    with repo.mending():
        base = fetch_base(lock, line.vllm, repo)
        applied = apply.apply_series(repo, base, patches)
    if applied.result != lock.result:
        what = f"the series gives tree {applied.result}, the lock says {lock.result}"
        remedy = f"if the change is meant, run: {COMMAND} {line_name}"
        raise errors.TreeMismatchError(what, where=folder / "lock.toml", remedy=remedy)
    changed_files(repo, applied)
    return applied


def update_line(project: Project, line_name: str, repo: SourceRepo) -> Applied:
    """Apply a line's series and write its lock; WheelSourceError as ``check_line``."""
    line, index = project.matrix.line[line_name], project.index
    folder = project.root / line.series
    patches = read_series(folder)
    sdist = f"vllm-{line.vllm}.tar.gz"
    sha256, size = pins(index.find("vllm", sdist))
    draft = TreeLock(sdist=sdist, size=size, sha256=sha256, base="", result="")
    if repo.tree(line.vllm) is not None:  # maybe of another archive of this release
        repo.forget(line.vllm)
    base = repo.import_archive(line.vllm, fetch_archive(draft, index))
    applied = apply.apply_series(repo, base, patches)
    changed_files(repo, applied)
    lock = draft.model_copy(update={"base": applied.base, "result": applied.result})
    write_whole(folder / "lock.toml", lock_text(lock, line_name))
    return applied


def lock_text(lock: TreeLock, line_name: str) -> str:
    # JSON's strings and numbers are TOML's.
    rows = (f"{name} = {json.dumps(value)}\n" for name, value in lock)
    return f"# Made by: {COMMAND} {line_name}\n" + "".join(rows)


def fetch_archive(lock: TreeLock, index: Index | None = None) -> Path:
    """The line's source archive, in the cache, hashed just now."""
    archive = cache_root() / "sdists" / lock.sha256 / lock.sdist
    with exclusive("sdists", wait=True):  # two cells of a line may be built at once
        if not archive.exists() and not take(lock.sha256, lock.size, archive):
            index = index or Index()
            url = index.find("vllm", lock.sdist).url
            item = Download(url=url, sha256=lock.sha256, size=lock.size, target=archive)
            download_all(index.session, [item])
        return verified(archive, lock.sha256)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A tree that lacks one patch of its series; ``way``: how it was made."""

    left_out: Patch
    tree: str
    way: str


def without(repo: SourceRepo, applied: Applied, patches: Sequence[Patch], index: int) -> Variant:
    """The whole series without ``patches[index]``, else InseparablePatchError."""
    patch = patches[index]
    tree: str | None = applied.before(index)
    for other in patches[index + 1 :]:
        tree = tree and apply_one(repo, tree, other)
    if tree is not None:
        return Variant(left_out=patch, tree=tree, way=OTHERS)
    if (tree := _taken_out(repo, applied, patch, index)) is not None:
        return Variant(left_out=patch, tree=tree, way=TAKEN_OUT)
    what = f"{patch.name} can neither be left out nor be taken out: later patches build on it"
    remedy = "make one patch of those that cannot do without each other"
    raise errors.InseparablePatchError(what, where=patch.path, remedy=remedy)


def require_idempotent(repo: SourceRepo, applied: Applied, patches: Sequence[Patch]) -> None:
    """SeriesOrderError if a second run gives other trees, or a patch goes onto its own result."""
    again = apply.apply_series(repo, applied.base, patches)
    if again != applied:
        what = f"applied twice to the same source, the series gave {applied.result}, then "
        remedy = "no result can be trusted: look for what is not a function of the patches"
        raise errors.SeriesOrderError(what + again.result, remedy=remedy)
    for patch, tree in zip(patches, applied.trees, strict=True):
        try:
            apply.apply_series(repo, tree, [patch])
        except errors.AlreadyUpstreamError:
            continue
        except ForgeError as error:
            outcome = f"was refused as {type(error).__name__}"
        else:
            outcome = "applied again"
        what = f"{patch.name} {outcome} on its own result, where it must be refused as "
        what += errors.AlreadyUpstreamError.__name__
        remedy = "its hunks fit in more than one place: give them context that fits in one"
        raise errors.SeriesOrderError(what, where=patch.path, remedy=remedy)


def pairs(repo: SourceRepo, applied: Applied, patches: Sequence[Patch]) -> list[dict[str, Any]]:
    """Neighbours of the series, and whether their order does not matter (``commutes``).

    SeriesOrderError if hunks apart from each other do not commute, or if both orders apply and
    give different trees.
    """
    rows = []
    for index, (first, second) in enumerate(pairwise(patches)):
        tree: str | None = apply_one(repo, applied.before(index), second, moved=True)
        tree = tree and apply_one(repo, tree, first, moved=True)
        same = tree == applied.trees[index + 1]
        if not same and (tree is not None or not _touch(first, second)):
            do = "give another tree" if tree else "do not apply"
            what = f"{first.name} and {second.name} {do} in the other order"
            remedy = "make one patch of the two, or see which lines they share"
            raise errors.SeriesOrderError(what, where=first.path.parent, remedy=remedy)
        rows.append({"first": first.name, "second": second.name, "commutes": same})
    return rows


def trees_of_moved(repo: SourceRepo, base: str, patches: Sequence[Patch]) -> list[str]:
    """The base and the tree after each patch, hunks at other lines and other forms allowed."""
    trees = [base]
    for patch in patches:
        after = apply_one(repo, trees[-1], patch, moved=True)
        # Refused: the strict way says best why.
        trees.append(after or apply.apply_series(repo, trees[-1], [patch]).result)
    return trees


def apply_one(repo: SourceRepo, tree: str, patch: Patch, *, moved: bool = False) -> str | None:
    """The tree after one patch, None where git refuses it; ``moved`` allows an offset."""
    with apply.tree_index(repo, tree) as index:
        applied, stderr = index.apply(patch)
        return index.tree() if applied and (moved or not apply.MOVED.search(stderr)) else None


def _taken_out(repo: SourceRepo, applied: Applied, patch: Patch, number: int) -> str | None:
    """The whole without what one patch did to its files, by a three-way merge; None: a conflict.

    Not by applying it in reverse: a hunk at other lines may be found at the wrong ones.
    """
    trees = (applied.result, applied.trees[number], applied.before(number))
    with (
        apply.tree_index(repo, applied.result) as index,
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
