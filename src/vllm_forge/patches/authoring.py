"""A series as a git branch to edit, and back: one commit a patch, DEP-3 fields in its message.

The subject and the body of a commit are the Description; the last paragraph has the other fields
as trailers, and ``Patch``, the file's name. Without ``Patch`` the name is made of the commit's
position and subject. Export accepts only what `checkout` can give back byte for byte.
"""

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from vllm_forge.errors import UsageError
from vllm_forge.host import atomic_path
from vllm_forge.patches import apply, errors
from vllm_forge.patches.series import (
    fetch_base,
    lock_text,
    read_series,
    read_tree_lock,
    series_text,
    trees_of_moved,
)
from vllm_forge.patches.wheel import changed_files
from vllm_forge.project import Project
from vllm_forge.sources import SourceRepo
from vllm_forge.sources.sdist import EPOCH_IDENT

BASE = "refs/forge/base"
PATCH = "Patch"
CONFIG = ("config", "--local", "--get")
AGAIN = "check the line out to another directory and cherry-pick your commits there"
FILE_NAME = re.compile(r"^\w[\w.+-]*\.patch$")
TRAILER = re.compile(rf"^({'|'.join((*apply.FIELDS, PATCH))}):", re.M)
# State files of git -> the command that ends what they belong to.
UNFINISHED = {
    "rebase-merge": "git rebase --continue",
    "rebase-apply": "git rebase --continue",
    "MERGE_HEAD": "git merge --abort",
    "CHERRY_PICK_HEAD": "git cherry-pick --continue",
    "REVERT_HEAD": "git revert --continue",
    "sequencer": "git cherry-pick --continue, or git revert --continue",
}


def checkout(project: Project, line_name: str, repo: SourceRepo, target: Path) -> int:
    """Make ``target`` a git work tree of the line's source, on a branch with its patches.

    Hunks at other lines than they name are allowed; export then writes where they fit. Returns the
    number of patches. On an error ``target`` is not created.
    """
    if target.exists() or target.is_symlink():
        raise UsageError("the directory exists", where=target, remedy="give a new path")
    name, line = project.line(line_name)
    series = project.root / line.series
    patches = read_series(series)
    base = fetch_base(read_tree_lock(series, name), line.vllm, repo)
    trees = trees_of_moved(repo, base, patches)
    messages = [f"vLLM {line.vllm}\n", *map(_message, patches)]
    commits: list[str] = []
    for tree, message in zip(trees, messages, strict=True):
        parent = f"\nparent {commits[-1]}" if commits else ""
        idents = "".join(f"\n{who} {EPOCH_IDENT}" for who in ("author", "committer"))
        commit = f"tree {tree}{parent}{idents}\n\n{message}".encode()
        commits.append(repo.text("hash-object", "-w", "-t", "commit", "--stdin", stdin=commit))
    pack = repo.git("pack-objects", "--quiet", "--revs", "--stdout", stdin=commits[-1].encode())
    with atomic_path(target) as aside:
        work = SourceRepo(aside / ".git")
        aside.mkdir()
        work.git("init", "--quiet")
        work.git("index-pack", "--stdin", stdin=pack.stdout)
        work.git("update-ref", BASE, commits[0])
        work.git("update-ref", f"refs/heads/forge/{name}", commits[-1])
        work.git("symbolic-ref", "HEAD", f"refs/heads/forge/{name}")
        # The work tree has the bytes of the source, whatever .gitattributes or the user say.
        (work.path / "info").mkdir(exist_ok=True)
        (work.path / "info" / "attributes").write_text("* -text -filter -ident\n")
        template = work.path / "info" / "message"
        trailers = "".join(f"{field}: \n" for field in apply.FIELDS[1:])
        template.write_text(f"\n\n{trailers}", encoding="utf-8")
        for key, value in {
            "core.bare": "false",
            "core.autocrlf": "false",
            "core.commentChar": ";",  # a line that starts with # is text
            "commit.template": ".git/info/message",
            "forge.line": name,
            "forge.series": _digest(series),
        }.items():
            work.git("config", key, value)
        work.git(f"--work-tree={aside}", "reset", "--quiet", "--hard")
    return len(patches)


def export(project: Project, source: Path) -> tuple[str, tuple[apply.Patch, ...]]:
    """Write the line's patch files, series and lock from the commits of a patch checkout.

    Returns the line's name and its new series. WrongBaseError if the branch does not start at the
    line's source, or the series was changed since the checkout; DirtyTreeError, and the errors of
    a patch file, for what is not committed, or not as a patch.
    """
    work = SourceRepo(source / ".git")
    line_name = work.text(*CONFIG, "forge.line", check=False) if work.path.exists() else ""
    if not line_name:
        remedy = "make one: nox -s forge -- patch checkout --line LINE DIR"
        raise UsageError("not a patch checkout", where=source, remedy=remedy)
    name, line = project.line(line_name)
    series = project.root / line.series
    lock = read_tree_lock(series, name)
    _require_clean(work, source)
    with _plain(work) as repo:
        patches, applied = _patches(repo, source, lock.base)
        changed_files(repo, applied)
    names = [patch.name for patch in patches]
    before = _digest(series)
    with atomic_path(series) as aside:
        shutil.copytree(series, aside, ignore=shutil.ignore_patterns("*.patch"))
        for patch in patches:
            (aside / patch.name).write_text(apply.patch_text(patch), encoding="utf-8")
        (aside / "series").write_text(series_text(series, names), encoding="utf-8")
        new = lock.model_copy(update={"result": applied.result})
        (aside / "lock.toml").write_text(lock_text(new, name), encoding="utf-8")
        after = _digest(aside)
        # Equal to `after`: killed between the two writes below.
        if before not in {work.text(*CONFIG, "forge.series", check=False), after}:
            what = f"the series of line {name} was changed since the checkout {source}"
            raise errors.WrongBaseError(what, where=series, remedy=AGAIN)
    work.git("config", "forge.series", after)
    return name, read_series(series)


@contextmanager
def _plain(work: SourceRepo) -> Iterator[SourceRepo]:
    """The commits of a checkout in a repository without its settings, attributes and replacements.

    All of these change what git says of a commit.
    """
    objects = work.text("rev-parse", "--path-format=absolute", "--git-path", "objects")
    with tempfile.TemporaryDirectory(prefix="vllm-forge-export-") as folder:
        repo = SourceRepo(Path(folder))
        repo.git("init", "--quiet", "--bare", "--template=")
        (repo.path / "objects" / "info" / "alternates").write_text(f"{objects}\n")
        for ref in (BASE, "HEAD"):
            if commit := work.text("rev-parse", "--verify", "--quiet", ref, check=False):
                repo.git("update-ref", ref, commit)
        yield repo


def _patches(
    repo: SourceRepo, source: Path, base: str
) -> tuple[tuple[apply.Patch, ...], apply.Applied]:
    """The patches of the commits after the base, applied to it."""
    _, *commits = _commits(repo, source, base)
    trees = [base, *(repo.text("rev-parse", f"{commit}^{{tree}}") for commit in commits)]
    steps = enumerate(zip(commits, pairwise(trees), strict=True), 1)
    patches = tuple(_patch(repo, commit, number, *pair) for number, (commit, pair) in steps)
    names = [patch.name for patch in patches]
    if doubled := sorted({item for item in names if names.count(item) > 1}):
        what = f"more than one commit is {PATCH}: {', '.join(doubled)}"
        remedy = "change the trailer of one with git rebase -i, or squash the two"
        raise errors.PatchHeaderError(what, where=source, remedy=remedy)
    applied = apply.apply_series(repo, base, patches)
    if applied.trees != tuple(trees[1:]):
        what = "the patches do not give the trees of the commits"
        raise errors.NonCanonicalPatchError(what, where=source)
    return patches, applied


def _message(patch: apply.Patch) -> str:
    first, _, body = patch.fields["Description"].partition("\n")
    trailers = {name: patch.fields[name] for name in apply.FIELDS[1:]} | {PATCH: patch.name}
    message = "\n\n".join(filter(None, [first, body, apply.header_text(trailers)]))
    # read_patch accepts more than a message keeps, e.g. a description that starts with a blank.
    if _fields(message, str(patch.path)) != (patch.fields, patch.name):
        what = "cannot write the header as a commit message"
        remedy = "remove blank lines and trailing spaces from the header"
        raise errors.PatchHeaderError(what, where=patch.path, remedy=remedy)
    return message


def _fields(message: str, where: str) -> tuple[dict[str, str], str | None]:
    """The header fields of a commit message in their order, and its Patch trailer."""
    text, _, trailers = message.rstrip("\n").rpartition("\n\n")
    if not TRAILER.search(trailers):
        text, trailers = message.rstrip("\n"), ""
    if field := TRAILER.search(text):  # of a squash, or above a paragraph that a hook added
        what = f"{field[1]} is given above the last paragraph"
        raise errors.PatchHeaderError(what, where=where, remedy=apply.FORM)
    subject, _, body = text.partition("\n")
    description = "\n".join(filter(None, [subject, body.lstrip("\n")]))
    rows = trailers.splitlines()
    named = next((row for row in rows if row.startswith(f"{PATCH}: ")), None)
    rest = [row for row in rows if row != named]
    head = "\n".join([f"Description: {description}".replace("\n", "\n "), *rest])
    fields = apply.parse_fields(head, where, ordered=False)
    return fields, named and named.partition(": ")[2].strip()


def _patch(work: SourceRepo, commit: str, number: int, before: str, after: str) -> apply.Patch:
    message = work.git("log", "-1", "--format=%B", commit).stdout.decode(errors="replace")
    subject = message.partition("\n")[0]
    where = f"commit {commit[:12]} ({subject})"
    if before == after:
        what = "the commit changes nothing"
        raise errors.EmptyPatchError(what, where=where, remedy="drop it with git rebase -i")
    fields, name = _fields(message, where)
    if name is None:
        slug = re.sub(r"[^a-z0-9]+", "-", subject.lower()).strip("-")[:50].rstrip("-")
        name = f"{number:04d}-{slug}.patch"
    if not FILE_NAME.match(name):
        remedy = "give a file name that ends in .patch, or remove the trailer"
        raise errors.PatchHeaderError(f"invalid {PATCH}: {name!r}", where=where, remedy=remedy)
    diff = apply.canonical_diff(work, before, after)
    if "\ufffd" in diff:
        what = "the changed code is not UTF-8"
        remedy = "change other lines, or other files"
        raise errors.NonCanonicalPatchError(what, where=where, remedy=remedy)
    return apply.parse_patch(Path(name), fields, diff, where)


def _commits(work: SourceRepo, source: Path, tree: str) -> list[str]:
    """The base commit and those after it, oldest first."""
    actual = work.text("rev-parse", "--verify", "--quiet", f"{BASE}^{{tree}}", check=False)
    if actual != tree:
        what = f"the checkout is of the source tree {actual or 'unknown'}, the line's is {tree}"
        raise errors.WrongBaseError(what, where=source, remedy=AGAIN)
    rows = work.text("rev-list", "--reverse", "--parents", f"{BASE}..HEAD").splitlines()
    history = [row.split() for row in rows]
    if merges := [row[0] for row in history if len(row) > 2]:  # noqa: PLR2004 - itself, one parent
        what = f"commit {merges[0][:12]} is a merge"
        remedy = f"make the history linear: git rebase {BASE}"
        raise errors.NonCanonicalPatchError(what, where=source, remedy=remedy)
    commits = [work.text("rev-parse", BASE), *(row[0] for row in history)]
    if [row[1:] for row in history] != [[parent] for parent in commits[:-1]]:
        what = "the branch does not start at the line's source"
        raise errors.WrongBaseError(what, where=source, remedy=AGAIN)
    return commits


def _require_clean(work: SourceRepo, source: Path) -> None:
    folder = Path(work.text("rev-parse", "--absolute-git-dir"))  # also of a linked work tree
    for state, command in UNFINISHED.items():
        if (folder / state).exists():
            what = "a git operation is unfinished"
            raise errors.DirtyTreeError(what, where=source, remedy=f"finish it: {command}")
    if not work.text("symbolic-ref", "--quiet", "HEAD", check=False):
        what = "HEAD is detached: commits of the branch may be missing"
        remedy = "git switch to the branch, or git switch -c NEW; after a bisect git bisect reset"
        raise errors.DirtyTreeError(what, where=source, remedy=remedy)
    options = ("status", "--porcelain", "--untracked-files=all")
    if status := work.text(f"--work-tree={source}", *options):
        rows = status.splitlines()
        what = f"{len(rows)} uncommitted changes:\n" + "\n".join(rows[:5])
        remedy = "commit or stash them; delete files that do not belong to a patch"
        raise errors.DirtyTreeError(what, where=source, remedy=remedy)


def _digest(series: Path) -> str:
    """Hash of the names and contents of a series' files."""
    files = sorted(path for path in series.iterdir() if path.is_file())
    parts = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in files]
    return hashlib.sha256("".join(parts).encode()).hexdigest()
