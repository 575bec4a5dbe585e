"""One patch file: a DEP-3 header, a line with ``---``, and the diff as git writes it.

DEP-3 (https://dep-team.pages.debian.net/deps/dep3/) gives the vocabulary; we add ``Skus``,
``Proves`` (a test id that is red without the patch) and ``Drop-When``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from unidiff.errors import UnidiffParseError
from unidiff.patch import PatchSet

from vllm_forge.patches.errors import (
    CorruptPatchError,
    EmptyPatchError,
    LineEndingError,
    NonCanonicalPatchError,
    PatchHeaderError,
)

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
        path: the file.
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
    raw = path.read_bytes()
    if b"\r\n" in raw:
        raise LineEndingError(
            "the patch has CRLF line ends",
            where=str(path),
            remedy="write it with LF; check your editor and git's autocrlf",
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptPatchError(f"not UTF-8: {error}", where=str(path)) from None
    head, found, diff = text.partition("\n" + SEPARATOR)
    if not found or not (diff.startswith("diff --git ") or not diff.strip()):
        raise PatchHeaderError(
            "no header, a line with --- and then the diff",
            where=str(path),
            remedy="see docs/develop/patches.md for the form",
        )
    fields = _fields(head, path)
    if not diff.strip():
        raise EmptyPatchError(
            "the patch has a header and no diff",
            where=str(path),
            remedy="export the change again, or delete the file and its line in the series",
        )
    return Patch(path=path, fields=fields, diff=diff, files=_parse(diff, path))


def _fields(head: str, path: Path) -> dict[str, str]:
    fields: dict[str, str] = {}
    last = ""
    for number, line in enumerate(head.splitlines(), 1):
        where = f"{path}:{number}"
        if line.startswith(" ") and last:
            fields[last] += "\n" + line[1:]
            continue
        name, colon, value = line.partition(": ")
        if not colon or not value.strip():
            raise PatchHeaderError(f"not a header line: {line!r}", where=where)
        if name not in FIELDS:
            raise PatchHeaderError(
                f"unknown field {name!r}", where=where, remedy="fields: " + ", ".join(FIELDS)
            )
        if name in fields:
            raise PatchHeaderError(f"field {name} stands twice", where=where)
        fields[name] = value
        last = name
    if missing := [name for name in FIELDS if name not in fields]:
        raise PatchHeaderError(f"missing: {', '.join(missing)}", where=str(path))
    if list(fields) != list(FIELDS):
        raise NonCanonicalPatchError(
            "header fields are out of order",
            where=str(path),
            remedy="the order is: " + ", ".join(FIELDS),
        )
    if not PROVES.match(fields["Proves"]):
        raise PatchHeaderError(
            f"Proves is not a test id: {fields['Proves']!r}",
            where=str(path),
            remedy="e.g. tests/patches/test_wo_a_scale_name.py::test_reads_either_name",
        )
    if not DATE.match(fields["Last-Update"]):
        raise PatchHeaderError(
            f"Last-Update is not YYYY-MM-DD: {fields['Last-Update']!r}", where=str(path)
        )
    return fields


def _parse(diff: str, path: Path) -> tuple[str, ...]:
    try:
        parsed = PatchSet(diff)
    except UnidiffParseError as error:
        raise CorruptPatchError(
            f"a hunk does not parse: {error}",
            where=str(path),
            remedy="its counts in @@ are not its lines: export the change again with git",
        ) from None
    if not parsed or not any(len(file) for file in parsed):
        raise EmptyPatchError(
            "the patch has no hunk",
            where=str(path),
            remedy="export the change again, or delete the file and its line in the series",
        )
    return tuple(file.path for file in parsed)
