"""Known vulnerabilities of Python packages in an SBOM, by an export of OSV that the user brings.

osv.dev exports its records by ecosystem, a zip with a JSON file for each (PyPI/all.zip at
osv-vulnerabilities.storage.googleapis.com). Nothing is downloaded here. Of Debian's packages an
SBOM has the version that was built, and advisories have that of the source, which may be another:
they are left to scanners, which read the SBOM, as are crates and libraries inside wheels.

Sources: github.com/ossf/osv-schema, docs/schema.md, "Evaluation"; google.github.io/osv.dev/data.
"""

import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from packageurl import PackageURL
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from vllm_forge.host import open_plain, parse_json, printable
from vllm_forge.release.errors import OsvError
from vllm_forge.release.sbom import Document, components_of

ECOSYSTEM, PURL_TYPE = "PyPI", "pypi"
LARGEST = 16 << 20  # bytes of a record
# RuntimeError: a member is encrypted, or compressed in another way.
MALFORMED = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, zlib.error,
)  # fmt: skip


class Vulnerability(NamedTuple):
    """``ids``: that of the record, and its aliases; ``fixed``: versions, as far as known."""

    package: str
    version: str
    ids: tuple[str, ...]
    fixed: tuple[str, ...]


def find(document: Document, export: Path) -> tuple[list[Vulnerability], list[str]]:
    """Vulnerabilities of an SBOM, and what was not checked; OsvError: not an export of PyPI."""
    packages: dict[str, set[str]] = {}
    others: Counter[str] = Counter()
    for row, _ in components_of(document):
        if "purl" in row:
            purl = PackageURL.from_string(row["purl"])
            if purl.type == PURL_TYPE:
                packages.setdefault(canonicalize_name(purl.name), set()).add(purl.version or "")
            else:
                others[purl.type] += 1
    known, empty = set(), True
    try:
        for name, row, record in _affected_rows(export):
            empty = False
            for version in packages.get(canonicalize_name(name), ()):
                if _is_affected(version, row):
                    known.add(_vulnerability(name, version, row, record))
        if empty:
            raise ValueError(f"no record is about {ECOSYSTEM}")
    except (zipfile.BadZipFile, *MALFORMED) as error:
        what = f"not an export of OSV for {ECOSYSTEM}: {printable(str(error))}"
        remedy = f"download {ECOSYSTEM}/all.zip again"
        raise OsvError(what, where=str(export), remedy=remedy) from None
    return sorted(known), [f"{count} packages of type {kind}" for kind, count in others.items()]


def _affected_rows(export: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Package, row ``affected`` and record, of all records that were not withdrawn."""
    with open_plain(export) as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.file_size > LARGEST:
                raise ValueError(f"{member.filename} has {member.file_size} bytes")
            record = parse_json(archive.read(member))
            for row in record.get("affected", ()) if "withdrawn" not in record else ():
                package = row.get("package", {})
                if package.get("ecosystem") == ECOSYSTEM:
                    yield package["name"], row, record


def _is_affected(version: str, row: dict[str, Any]) -> bool:
    """Whether a version is listed, or in a range.

    Also where versions cannot be compared: to be looked at is better than to be missed.
    """
    release = version.partition("+")[0]  # as advisories have it: of torch 2.11.0+cu130
    try:
        return release in row.get("versions", ()) or any(
            item["type"] == "ECOSYSTEM" and _in_range(Version(release), item["events"])
            for item in row.get("ranges", ())
        )
    except InvalidVersion:
        return True


def _in_range(version: Version, events: list[dict[str, str]]) -> bool:
    """Whether it was introduced by this version, and has not ended since."""
    pairs = [(kind, Version(value)) for event in events for kind, value in event.items()]
    ends = [
        end
        for kind, end in pairs
        if (kind == "fixed" and end <= version) or (kind == "last_affected" and end < version)
    ]
    starts = [start for kind, start in pairs if kind == "introduced" and start <= version]
    return any(all(end < start for end in ends) for start in starts)


def _vulnerability(
    name: str, version: str, row: dict[str, Any], record: dict[str, Any]
) -> Vulnerability:
    events = [event for item in row.get("ranges", ()) for event in item["events"]]
    fixed = tuple(str(event["fixed"]) for event in events if "fixed" in event)
    ids = (str(record["id"]), *map(str, record.get("aliases", ())))
    return Vulnerability(package=name, version=version, ids=ids, fixed=fixed)
