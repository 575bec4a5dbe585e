"""A patch file, and patches applied by git to a tree in a throw-away index: exactly, or not at all.

A file is a DEP-3 header, a line with ``---``, and the diff as git writes it. DEP-3
(https://dep-team.pages.debian.net/deps/dep3/) gives the vocabulary; we add ``Skus``, ``Proves`` (a
test id that is red without the patch) and ``Drop-When``.

``git apply`` never uses fuzz, but it does move a hunk that fits at another line, and says so
only with ``-v``; that is refused here (git-apply(1)).
"""

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from unidiff.errors import UnidiffParseError
from unidiff.patch import PatchSet

from vllm_forge.errors import ForgeError
from vllm_forge.patches import errors
from vllm_forge.sources import SourceRepo

FIELDS = (
    "Description", "Origin", "Bug", "Forwarded", "Applied-Upstream", "Author", "Last-Update",
    "Skus", "Proves", "Drop-When",
)  # fmt: skip
SEPARATOR = "---\n"
EXPORT = "run: vllm-forge patch checkout, and patch export"
FORM = "give each field once, as NAME: TEXT, in a commit as last paragraph: docs/develop/patches.md"
FORMS = {
    "Proves": (re.compile(r"^tests/[\w/]+\.py::\w+$"), "a test id, e.g. tests/a/test_b.py::test_c"),
    "Last-Update": (re.compile(r"^\d{4}-\d{2}-\d{2}$"), "YYYY-MM-DD"),
}
MOVED = re.compile(r"^Hunk #(\d+) succeeded at (\d+) \(offset (-?\d+) lines?\)", re.M)
FAILED = re.compile(r"^error: patch failed: (?P<file>.+):(?P<line>\d+)$", re.M)
ABSENT = re.compile(r"^error: (?P<file>.+): (?:does not exist in index|No such file)", re.M)
CORRUPT = re.compile(
    r"^error: (?:corrupt patch|patch fragment without header|No valid patches|unrecognized input"
    r"|invalid path|'.+' appears as both a file and as a directory)", re.M,  # e.g. ../x
)  # fmt: skip
UNREADABLE = re.compile(r"^error: failed to read ", re.M)  # a blob; the exit code is 1
CANONICAL = (
    "-c", "core.quotePath=true",
    "-c", "diff.algorithm=myers",
    "diff", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--full-index",
    "-U3", "--src-prefix=a/", "--dst-prefix=b/",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A parsed patch: header ``fields`` by name, lines of a value joined with newlines.

    ``diff`` is what git applies; ``files`` are the paths that it changes, in the source tree.
    """

    path: Path
    fields: dict[str, str]
    diff: str
    files: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def summary(self) -> str:
        """First line of the description."""
        return self.fields["Description"].partition("\n")[0]

    @property
    def proves(self) -> str:
        return self.fields["Proves"]


def read_patch(path: Path) -> Patch:
    """Parse one patch file; an error of ``errors.py`` names what keeps it from being one."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise errors.CorruptPatchError(f"not UTF-8: {error}", where=path) from None
    _require_lf(text, str(path))
    head, separator, diff = text.partition("\n" + SEPARATOR)
    if not separator or not (diff.startswith("diff --git ") or not diff.strip()):
        what = "expected a header, a line with --- and then the diff"
        remedy = "see docs/develop/patches.md for the form"
        raise errors.PatchHeaderError(what, where=path, remedy=remedy)
    return parse_patch(path, parse_fields(head, str(path)), diff, str(path))


def parse_patch(path: Path, fields: dict[str, str], diff: str, where: str) -> Patch:
    """A patch of header fields and a diff; ``where`` is for errors."""
    _require_lf(diff, where)
    try:
        parsed = PatchSet(diff)
    except UnidiffParseError as error:
        what = f"cannot parse a hunk: {error}"
        remedy = "the counts in @@ do not match its lines: export the change again with git"
        raise errors.CorruptPatchError(what, where=where, remedy=remedy) from None
    if not any(len(file) for file in parsed):
        remedy = "change lines of text, not only modes or binary files; or drop the patch"
        raise errors.EmptyPatchError("the patch has no hunk", where=where, remedy=remedy)
    if binary := [file.path for file in parsed if file.is_binary_file]:
        what = f"the patch has no content of a binary file: {', '.join(binary)}"
        remedy = "change text alone, and export the change again"
        raise errors.CorruptPatchError(what, where=where, remedy=remedy)
    files = tuple(file.path for file in parsed)
    return Patch(path=path, fields=fields, diff=diff, files=files)


def patch_text(patch: Patch) -> str:
    return header_text(patch.fields) + SEPARATOR + patch.diff


def header_text(fields: dict[str, str]) -> str:
    """Header lines; further lines of a value start with a space."""
    rows = (f"{name}: {value}".replace("\n", "\n ") for name, value in fields.items())
    return "".join(f"{row}\n" for row in rows)


def parse_fields(head: str, where: str, *, ordered: bool = True) -> dict[str, str]:
    """Header fields by name, in the order of FIELDS, which ``head`` must have if ``ordered``."""
    fields: dict[str, str] = {}
    last = ""
    for number, line in enumerate(head.splitlines(), 1):
        at = f"{where}:{number}"
        if line.startswith(" ") and last:
            fields[last] += "\n" + line[1:]
            continue
        name, colon, value = line.partition(": ")
        if not colon or not value.strip():
            what = f"invalid header line {line!r}: expected NAME: TEXT"
            raise errors.PatchHeaderError(what, where=at, remedy=FORM)
        if name not in FIELDS:
            what = f"unknown field {name!r}"
            raise errors.PatchHeaderError(what, where=at, remedy="fields: " + ", ".join(FIELDS))
        if name in fields:
            raise errors.PatchHeaderError(f"duplicate field {name}", where=at, remedy=FORM)
        fields[last := name] = value
    if missing := [name for name in FIELDS if name not in fields]:
        what = f"missing: {', '.join(missing)}"
        raise errors.PatchHeaderError(what, where=where, remedy=FORM)
    if ordered and list(fields) != list(FIELDS):
        what = "header fields are out of order"
        remedy = "the order is: " + ", ".join(FIELDS)
        raise errors.NonCanonicalPatchError(what, where=where, remedy=remedy)
    for name, (form, expected) in FORMS.items():
        if not form.match(fields[name]):
            what = f"invalid {name} {fields[name]!r}: expected {expected}"
            raise errors.PatchHeaderError(what, where=where, remedy=FORM)
    return {name: fields[name] for name in FIELDS}


def _require_lf(text: str, where: str) -> None:
    if "\r\n" in text:
        remedy = "write it with LF; check your editor and git's autocrlf"
        raise errors.LineEndingError("the patch has CRLF line ends", where=where, remedy=remedy)


@dataclass(frozen=True)
class TreeIndex:
    """A git index; ``env`` names its file."""

    repo: SourceRepo
    env: dict[str, str]

    def git(self, *args: str) -> str:
        return self.repo.git(*args, env=self.env).stdout.decode()

    def apply(self, patch: Patch, *options: str) -> tuple[bool, str]:
        """``git apply``: whether it was applied, and stderr; nowarn leaves whitespace as it is.

        CommandFailedError if git cannot read or write the repository.
        """
        done = self.repo.git(
            "apply", "--cached", "-v", "--whitespace=nowarn", *options, "-",
            stdin=patch.diff.encode(), env=self.env, check=False,
        )  # fmt: skip
        stderr = done.stderr.decode(errors="replace")
        if UNREADABLE.search(stderr) or (
            done.returncode not in {0, 1} and not CORRUPT.search(stderr)
        ):
            raise self.repo.failed("apply", done)
        return done.returncode == 0, stderr

    def reverses(self, patch: Patch) -> bool:
        """Whether the tree has the patch's change."""
        return self.apply(patch, "--check", "--reverse")[0]

    def put(self, path: str, mode: str, content: bytes) -> None:
        """Add a file, or replace its content."""
        blob = self.repo.text("hash-object", "-w", "--stdin", stdin=content)
        self.git("update-index", "--add", "--cacheinfo", f"{mode},{blob},{path}")

    def tree(self) -> str:
        return self.git("write-tree").strip()


@contextmanager
def tree_index(repo: SourceRepo, tree: str | None = None) -> Iterator[TreeIndex]:
    """An index of its own, filled with a tree."""
    with tempfile.TemporaryDirectory(prefix="vllm-forge-index-") as folder:
        index = TreeIndex(repo, {"GIT_INDEX_FILE": str(Path(folder) / "index")})
        if tree is not None:
            index.git("read-tree", tree)
        yield index


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A series applied: tree hashes before the first and after each patch."""

    base: str
    trees: tuple[str, ...]

    @property
    def result(self) -> str:
        return self.before(len(self.trees))

    def before(self, index: int) -> str:
        """The tree that patch number ``index`` is applied to."""
        return (self.base, *self.trees)[index]


def apply_series(repo: SourceRepo, base: str, patches: Sequence[Patch]) -> Applied:
    """Apply patches in order to the tree ``base``, or raise what the first unfit one has wrong.

    That is one of CorruptPatchError, EmptyPatchError, AlreadyUpstreamError, AppliedTwiceError,
    WrongContextError, OffsetError and NonCanonicalPatchError.
    """
    trees = [base]
    with tree_index(repo, base) as index:
        for patch in patches:
            applied, stderr = index.apply(patch)
            if not applied:
                raise _refusal(repo, base, patch, stderr, index)
            if moved := MOVED.search(stderr):
                what = f"hunk {moved[1]} applies at line {moved[2]}, {moved[3]} lines from where "
                where = f"{patch.path} ({', '.join(patch.files)})"
                remedy = f"it was made for another tree: look at the new place, then {EXPORT}"
                raise errors.OffsetError(f"{what}it says", where=where, remedy=remedy)
            trees.append(index.tree())
            _require_canonical(repo, patch, *trees[-2:])
    return Applied(base=base, trees=tuple(trees[1:]))


def canonical_diff(repo: SourceRepo, before: str, after: str) -> str:
    """The difference of two trees in the one form that a patch file may have."""
    # Context that is not UTF-8 makes a patch that is not canonical, not a crash.
    return repo.git(*CANONICAL, before, after).stdout.decode(errors="replace")


def _require_canonical(repo: SourceRepo, patch: Patch, before: str, after: str) -> None:
    expected = canonical_diff(repo, before, after)
    if patch.diff != expected:
        rows = zip_longest(patch.diff.splitlines(), expected.splitlines())
        differ = (number for number, (row, canonical) in enumerate(rows, 1) if row != canonical)
        what = f"the diff is not in canonical form from its line {next(differ, 'last')} on"
        raise errors.NonCanonicalPatchError(what, where=patch.path, remedy=EXPORT)


def _refusal(
    repo: SourceRepo, base: str, patch: Patch, stderr: str, index: TreeIndex
) -> ForgeError:
    # "while searching for:" is followed by lines of code; the line after those says where.
    lines = [line for line in stderr.splitlines() if line.startswith("error:")]
    first = next((line for line in lines if "while searching for" not in line), stderr.strip())
    where = str(patch.path)
    if CORRUPT.search(stderr):
        what = f"git cannot read the patch: {first}"
        remedy = "name files of the source tree, and export the change again with git"
        return errors.CorruptPatchError(what, where=where, remedy=remedy)
    if index.reverses(patch):
        with tree_index(repo, base) as pristine:
            if pristine.reverses(patch):
                what = f"{patch.name}: the release already has this change"
                remedy = "drop it: delete the file and its line in the series, and record it as "
                remedy += "retired in dispositions.toml"
                return errors.AlreadyUpstreamError(what, where=where, remedy=remedy)
        what = f"{patch.name}: an earlier patch of the series makes this change"
        return errors.AppliedTwiceError(what, where=where, remedy="delete one of the two")
    place = FAILED.search(stderr) or ABSENT.search(stderr)
    target = ":".join(place.groups()) if place else ", ".join(patch.files)
    remedy = "the patch was made for other code: look at it, then write the patch again for "
    remedy += "this tree. GNU patch might take it with fuzz; we do not"
    what, where = f"{patch.name} does not fit: {first}", f"{target} (from {where})"
    return errors.WrongContextError(what, where=where, remedy=remedy)
