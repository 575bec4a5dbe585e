"""A line's folder: the ordered list of its patches, exactly its patch files, and ``lock.toml``.

The lock names what the series starts from and must end at.
"""

import json
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from vllm_forge.host import atomic_path, cache_root, exclusive, read_plain
from vllm_forge.patches import errors
from vllm_forge.patches.apply import Applied, apply_series, canonical_diff
from vllm_forge.patches.header import Patch, patch_text, read_patch
from vllm_forge.project import Project
from vllm_forge.sources import Download, Index, IndexFile, SourceRepo, download_all, verified
from vllm_forge.sources.errors import DistributionNotFoundError, LockFileError

COMMAND = "nox -s forge -- patch lock --line"


@dataclass(frozen=True, kw_only=True)
class TreeLock:
    """A line's source archive (name, bytes, hash); git's hashes of its tree, as is and patched."""

    sdist: str
    size: int
    sha256: str
    base: str
    result: str


def read_series(folder: Path) -> tuple[Patch, ...]:
    """Parse ``folder/series``, where # starts a comment, and all its patches.

    Raises:
        PatchMissingError: the series file, or a patch that it lists, does not exist.
        PatchUnlistedError: a .patch file that the series does not list.
        AppliedTwiceError: a patch is listed twice.
        ForgeError: see read_patch.
    """
    path = folder / "series"
    if not path.is_file():
        raise errors.PatchMissingError("no series file", where=str(path))
    names = [
        line.strip()
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    for name in names:
        if names.count(name) > 1:
            raise errors.AppliedTwiceError(
                f"{name} is listed twice", where=str(path), remedy="delete one of the lines"
            )
        if not (folder / name).is_file():
            raise errors.PatchMissingError(
                f"the series lists {name}, which does not exist",
                where=str(path),
                remedy="add the file, or delete the line",
            )
    present = {file.name for file in folder.iterdir() if file.suffix in {".patch", ".diff"}}
    if unlisted := sorted(present - set(names)):
        raise errors.PatchUnlistedError(
            f"not in the series: {', '.join(unlisted)}",
            where=str(path),
            remedy="list it where it belongs, or delete the file",
        )
    return tuple(read_patch(folder / name) for name in names)


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
    path = folder / "lock.toml"
    kinds = {field.name: field.type for field in fields(TreeLock)}
    try:
        data = tomllib.loads(read_plain(path).decode("utf-8"))
    except FileNotFoundError:
        problem = "the series has no lock"
    except ValueError as error:  # not UTF-8, not TOML
        problem = f"not a tree lock: {error}"
    else:
        if {name: type(value) for name, value in data.items()} == kinds:
            return TreeLock(**data)
        problem = f"not a tree lock: expected {', '.join(kinds)}"
    raise LockFileError(problem, where=str(path), remedy=f"run: {COMMAND} {line_name}")


def fetch_base(lock: TreeLock, version: str, repo: SourceRepo, index: Index | None = None) -> str:
    """Tree hash of the pristine source, imported if need be; WrongBaseError if not the lock's."""
    tree = repo.tree(version)
    if tree is not None and tree != lock.base:  # of a release that was published again
        repo.forget(version)
        tree = None
    if tree is None:
        tree = repo.import_archive(version, _archive(lock, index))
    if tree != lock.base:
        raise errors.WrongBaseError(
            f"the source tree of vLLM {version} is {tree}, the series is for {lock.base}",
            where=str(repo.path),
            remedy="the release may have been published again: look at what changed before you "
            "make a new lock",
        )
    return tree


def check_line(project: Project, line_name: str, repo: SourceRepo) -> Applied:
    """Apply a line's series; TreeMismatchError if the result is not the lock's."""
    line = project.matrix.line[line_name]
    folder = project.root / line.series
    patches = read_series(folder)
    lock = read_tree_lock(folder, line_name)
    with repo.mending():
        base = fetch_base(lock, line.vllm, repo)
        applied = apply_series(repo, base, patches)
    if applied.result != lock.result:
        raise errors.TreeMismatchError(
            f"the series gives tree {applied.result}, the lock says {lock.result}",
            where=str(folder / "lock.toml"),
            remedy=f"if the change is meant, run: {COMMAND} {line_name}",
        )
    return applied


def update_line(project: Project, line_name: str, repo: SourceRepo) -> Applied:
    """Apply a line's series and write its lock."""
    line, index = project.matrix.line[line_name], project.index
    folder = project.root / line.series
    patches = read_series(folder)
    sdist = f"vllm-{line.vllm}.tar.gz"
    offered = _offered(index, sdist)
    size, sha256 = offered.size or 0, offered.sha256 or ""
    draft = TreeLock(sdist=sdist, size=size, sha256=sha256, base="", result="")
    base = repo.import_archive(line.vllm, _archive(draft, index))
    applied = apply_series(repo, base, patches)
    with atomic_path(folder / "lock.toml") as aside:
        lock = replace(draft, base=applied.base, result=applied.result)
        aside.write_text(lock_text(lock, line_name), encoding="utf-8")
    return applied


def lock_text(lock: TreeLock, line_name: str) -> str:
    """The content of lock.toml."""
    # JSON's strings and numbers are TOML's.
    rows = (f"{name} = {json.dumps(value)}\n" for name, value in asdict(lock).items())
    return f"# Made by: {COMMAND} {line_name}\n" + "".join(rows)


def export_line(folder: Path, repo: SourceRepo, trees: list[str]) -> None:
    """Rewrite each patch's diff in canonical form, from the trees before and after it."""
    patches = read_series(folder)
    for patch, before, after in zip(patches, trees[:-1], trees[1:], strict=True):
        with atomic_path(patch.path) as aside:
            canonical = replace(patch, diff=canonical_diff(repo, before, after))
            aside.write_text(patch_text(canonical), encoding="utf-8")


def _archive(lock: TreeLock, index: Index | None) -> Path:
    archive = cache_root() / "sdists" / lock.sha256 / lock.sdist
    with exclusive("sdists", wait=True):  # two cells of a line may be built at once
        if not archive.exists():
            index = index or Index()
            url = _offered(index, lock.sdist).url
            item = Download(url=url, sha256=lock.sha256, size=lock.size, target=archive)
            download_all(index.session, [item])
        return verified(archive, lock.sha256)


def _offered(index: Index, sdist: str) -> IndexFile:
    for file in index.files("vllm"):
        if file.filename == sdist and file.sha256 is not None and file.size is not None:
            return file
    raise DistributionNotFoundError(f"the index does not offer {sdist}", where=index.url)
