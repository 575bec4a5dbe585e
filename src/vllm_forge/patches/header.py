"""One patch file: a DEP-3 header, a line with ``---``, and the diff as git writes it.

DEP-3 (https://dep-team.pages.debian.net/deps/dep3/) gives the vocabulary; we add ``Skus``,
``Proves`` (a test id that is red without the patch) and ``Drop-When``.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from unidiff.errors import UnidiffParseError
from unidiff.patch import PatchSet

from vllm_forge.patches import errors

FIELDS = (
    "Description",
    "Origin",
    "Bug",
    "Forwarded",
    "Applied-Upstream",
    "Author",
    "Last-Update",
    "Skus",
    "Proves",
    "Drop-When",
)
SEPARATOR = "---\n"
PROVES = re.compile(r"^tests/[\w/]+\.py::\w+$")
DATE = re.compile(r"^\d{4}-\d{2}-\d{2}$")


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A parsed patch.

    Attributes:
        fields: header fields by name, continuation lines joined with newlines.
        diff: what git applies, text from the first ``diff --git`` on.
        files: paths that it changes, relative to the source tree.
    """

    path: Path
    fields: dict[str, str]
    diff: str
    files: tuple[str, ...]

    @property
    def name(self) -> str:
        """The file's name, as the series lists it."""
        return self.path.name

    @property
    def summary(self) -> str:
        """First line of the description."""
        return self.fields["Description"].partition("\n")[0]

    @property
    def proves(self) -> str:
        """Test id that is red without this patch."""
        return self.fields["Proves"]


def read_patch(path: Path) -> Patch:
    """Parse one patch file.

    Raises:
        LineEndingError: it has CRLF line ends.
        PatchHeaderError: a field is missing, unknown, doubled or malformed.
        EmptyPatchError: no hunk.
        CorruptPatchError: a hunk does not parse, e.g. its counts are not its lines.
        NonCanonicalPatchError: fields out of order, or text around header and diff.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise errors.CorruptPatchError(f"not UTF-8: {error}", where=str(path)) from None
    _require_lf(text, str(path))
    head, separator, diff = text.partition("\n" + SEPARATOR)
    if not separator or not (diff.startswith("diff --git ") or not diff.strip()):
        raise errors.PatchHeaderError(
            "expected a header, a line with --- and then the diff",
            where=str(path),
            remedy="see docs/develop/patches.md for the form",
        )
    return parse_patch(path, parse_fields(head, str(path)), diff, str(path))


def parse_patch(path: Path, fields: dict[str, str], diff: str, where: str) -> Patch:
    """A patch of header fields and a diff, with the errors of read_patch; ``where`` is for them."""
    _require_lf(diff, where)
    try:
        parsed = PatchSet(diff)
    except UnidiffParseError as error:
        raise errors.CorruptPatchError(
            f"cannot parse a hunk: {error}",
            where=where,
            remedy="the counts in @@ do not match its lines: export the change again with git",
        ) from None
    if not any(len(file) for file in parsed):
        raise errors.EmptyPatchError(
            "the patch has no hunk",
            where=where,
            remedy="export the change again, or delete the file and its line in the series",
        )
    files = tuple(file.path for file in parsed)
    return Patch(path=path, fields=fields, diff=diff, files=files)


def patch_text(patch: Patch) -> str:
    """The content of the patch's file."""
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
            raise errors.PatchHeaderError(
                f"invalid header line {line!r}: expected NAME: TEXT", where=at
            )
        if name not in FIELDS:
            raise errors.PatchHeaderError(
                f"unknown field {name!r}", where=at, remedy="fields: " + ", ".join(FIELDS)
            )
        if name in fields:
            raise errors.PatchHeaderError(f"duplicate field {name}", where=at)
        fields[name] = value
        last = name
    if missing := [name for name in FIELDS if name not in fields]:
        raise errors.PatchHeaderError(f"missing: {', '.join(missing)}", where=where)
    if ordered and list(fields) != list(FIELDS):
        raise errors.NonCanonicalPatchError(
            "header fields are out of order",
            where=where,
            remedy="the order is: " + ", ".join(FIELDS),
        )
    if not PROVES.match(fields["Proves"]):
        raise errors.PatchHeaderError(
            f"invalid Proves {fields['Proves']!r}: expected a test id",
            where=where,
            remedy="e.g. tests/patches/test_wo_a_scale_name.py::test_reads_either_name",
        )
    if not DATE.match(fields["Last-Update"]):
        raise errors.PatchHeaderError(
            f"invalid Last-Update {fields['Last-Update']!r}: expected YYYY-MM-DD", where=where
        )
    return {name: fields[name] for name in FIELDS}


def _require_lf(text: str, where: str) -> None:
    if "\r\n" in text:
        raise errors.LineEndingError(
            "the patch has CRLF line ends",
            where=where,
            remedy="write it with LF; check your editor and git's autocrlf",
        )
