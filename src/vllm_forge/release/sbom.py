"""What an image has: by its record, its wheels, its layers and its SBOM (made in ``components``).

Wheels have SBOMs of their own (PEP 770) and vendored distributions, which no lock lists. They are
read from wheels, to write the SBOM, and from the layers, to compare it with what ships.

Known vulnerabilities are those of an export of OSV that the user brings. osv.dev exports its
records by ecosystem, a zip with a JSON file for each (PyPI/all.zip at
osv-vulnerabilities.storage.googleapis.com). Nothing is downloaded here. Of Debian's packages an
SBOM has the version that was built, and advisories have that of the source, which may be another:
they are left to scanners, which read the SBOM, as are crates and libraries inside wheels.

Sources: github.com/ossf/osv-schema, docs/schema.md, "Evaluation"; google.github.io/osv.dev/data.
"""

import base64
import email.parser
import hashlib
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from packageurl import PackageURL
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from pydantic import Field

from vllm_forge.host import cache_root, hash_of, open_plain, parse_json, printable
from vllm_forge.host.files import read_sealed, write_sealed
from vllm_forge.images.errors import BuildRecordError
from vllm_forge.images.layer import LayerBlob, overlay
from vllm_forge.images.layout import Image
from vllm_forge.images.record import differences
from vllm_forge.matrix import FrozenModel, ImageCell
from vllm_forge.patches import read_tree_lock
from vllm_forge.project import Project
from vllm_forge.release.errors import OsvError, SbomError
from vllm_forge.signing.bundle import MALFORMED
from vllm_forge.sources import Lock, LockedWheel, Wheelhouse
from vllm_forge.sources.debian import DebianPackage, installed_packages, read_base_lock

FORMAT = 1  # raise when WheelContents has other fields
LARGEST = 16 << 20  # bytes of a file of metadata, or a record of OSV; no SBOM has over 0.4 MB
MOST_METADATA = 64 << 20  # bytes of all of them; the wheels of all lines together have 4 MB
METADATA = re.compile(r"(?:^|/)[^/]+\.dist-info/METADATA$")
SBOMS = re.compile(r"(?:^|/)[^/]+\.dist-info/sboms/.*[^/]$")
SITE = re.compile(r"^opt/venv/lib/python[\d.]+/site-packages/")
# Properties of components: where a distribution is vendored; path and hash of an SBOM in a wheel.
VENDORED, EMBEDDED = "vllm-forge:vendored", "vllm-forge:sbom"
STATUS = "var/lib/dpkg/status"
ECOSYSTEM, PURL_TYPE = "PyPI", "pypi"
# RuntimeError: a member is encrypted, or compressed in another way.
UNREADABLE = (OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile, *MALFORMED)
Document = dict[str, Any]
Tables = tuple[dict[str, str], ...]


class Distribution(FrozenModel):
    """What METADATA says; ``path`` of its folder, relative to site-packages."""

    name: str
    version: str
    path: str


class WheelContents(FrozenModel):
    """Of one wheel. ``sboms``: path relative to site-packages -> content."""

    license: str | None = None  # a licence expression (PEP 639)
    sboms: dict[str, str] = Field(default_factory=dict)
    vendored: tuple[Distribution, ...] = ()


def wheel_contents(lock: Lock) -> dict[str, WheelContents]:
    """Name of each locked wheel -> its contents; kept in the cache, for all are hashed first.

    Raises:
        SbomError: a wheel's metadata does not match the lock, or cannot be read.
        HashMismatchError: a wheel in the cache is not the locked one.
    """
    path = cache_root() / "contents" / f"{hash_of([FORMAT, lock.digest])}.json"
    try:
        rows = read_sealed(path)
        return {name: WheelContents.model_validate(row) for name, row in rows.items()}
    except (OSError, ValueError):
        pass  # never read before, or damaged: written again
    Wheelhouse().fetch(lock.wheels)
    with ThreadPoolExecutor() as pool:
        read = zip(lock.wheels, pool.map(_read, lock.wheels), strict=True)
        contents = {wheel.name: row for wheel, row in read}
    write_sealed(path, {name: row.model_dump(mode="json") for name, row in contents.items()})
    return contents


def _read(wheel: LockedWheel) -> WheelContents:
    path = Wheelhouse().verify(wheel)
    sboms, vendored, licenses = {}, [], None
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                place = re.sub(r"^[^/]+\.data/(?:pure|plat)lib/", "", member.filename)
                is_sbom = bool(SBOMS.search(place))
                if not is_sbom and not METADATA.search(place):
                    continue
                if member.file_size > LARGEST:
                    raise ValueError(f"{place} has {member.file_size} bytes")  # noqa: TRY301
                text = archive.read(member).decode("utf-8")
                if is_sbom:
                    sboms[place] = text
                elif place.count("/") > 1:
                    vendored.append(_distribution(text, place)[0])
                else:
                    own, licenses = _distribution(text, place)
                    if (own.name, own.version) != (wheel.name, wheel.version):
                        raise ValueError(f"it says {own.name} {own.version}")  # noqa: TRY301
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        what = f"cannot read what {wheel.filename} has: {error}"
        remedy = "ask its authors; until then, lock another version"
        raise SbomError(what, where=path, remedy=remedy) from None
    return WheelContents(license=licenses, sboms=sboms, vendored=tuple(vendored))


def _distribution(text: str, path: str) -> tuple[Distribution, str | None]:
    """A distribution, and its licence expression if it has one."""
    fields = email.parser.HeaderParser().parsestr(text)
    name, version = fields["Name"], fields["Version"]
    if not name or not version:
        raise ValueError(f"{path} has no Name or Version")
    row = Distribution(
        name=canonicalize_name(name), version=str(version), path=path.rpartition("/")[0]
    )
    return row, fields["License-Expression"]


def require_own_image(
    project: Project, cell: ImageCell, image: Image, record: dict[str, Any]
) -> None:
    """BuildRecordError unless this checkout's lock and series gave the image of a record."""
    stack, folder = record["stack"], project.root / cell.line.series
    rows = {
        "digest": (f"sha256:{image.digest}", record["digest"]),
        "lock": (project.lock(cell.line_name).digest, stack["lock"]["sha256"]),
        "tree": (read_tree_lock(folder, cell.line_name).result, stack["tree"]),
    }
    if other := [f"{name} {b}, not {a}" for name, (a, b) in rows.items() if a != b]:
        what = f"the record of the image is not of this checkout: {'; '.join(other)}"
        remedy = "build the image again"
        raise BuildRecordError(what, where=image.path, remedy=remedy)


def locked_debs(
    project: Project, cell: ImageCell, stack: dict[str, Any]
) -> tuple[DebianPackage, ...]:
    """The locked Debian packages of an image; none where it was built from current ones."""
    lock = read_base_lock(project.root, cell.base)
    if lock is None or stack["base"]["packages"] != f"sha256:{lock.digest}":
        return ()
    return lock.packages


def image_contents(layers: Sequence[LayerBlob]) -> tuple[dict[str, str], ...]:
    """What the bytes of an image have, of which its SBOM says the same.

    Versions of Python and of Debian packages by name, names and versions of vendored distributions
    by path, hashes of SBOMs (SHA-256, hex) by path. Reads all layers, given lowest first: about a
    minute for a full image. SbomError: one of these is not a file, or too large, or all are.
    """
    left = MOST_METADATA

    def read(path: str, info: tarfile.TarInfo, tar: tarfile.TarFile) -> bytes | None:
        if not (METADATA.search(path) or SBOMS.search(path) or path == STATUS):
            return None
        nonlocal left
        file = tar.extractfile(info) if info.isreg() else None
        if file is None or info.size > (most := min(LARGEST, left)):
            what = f"/{path} is not a file of at most {most} bytes"
            raise SbomError(what, remedy="build the image again")
        left -= info.size
        return file.read()

    python, debian, vendored, sboms = {}, {}, {}, {}
    for path, (_, content) in overlay(layers, read).items():
        place, text = SITE.sub("", path), content.decode(errors="replace")
        if path == STATUS:
            debian = installed_packages(text)
        elif SBOMS.search(path):
            sboms[place] = hashlib.sha256(content).hexdigest()
        else:
            row, _ = _distribution(text, place)
            if place.count("/") == 1 and place != path:
                python[row.name] = row.version
            else:
                vendored[row.path] = f"{row.name} {row.version}"
    return python, debian, vendored, sboms


class Vulnerability(NamedTuple):
    """``ids``: that of the record, and its aliases; ``fixed``: versions, as far as known."""

    package: str
    version: str
    ids: tuple[str, ...]
    fixed: tuple[str, ...]


@contextmanager
def _valid() -> Iterator[None]:
    """SbomError where a document is not an SBOM as ``make_sbom`` writes it."""
    try:
        yield
    except MALFORMED as error:
        remedy = "get the SBOM that was made with the image"
        raise SbomError(f"invalid SBOM: {error!r}", remedy=remedy) from None


def packages_of(document: Document) -> tuple[dict[str, str], dict[str, str]]:
    """Name -> version of the image's own Python and Debian packages, without nested components.

    SbomError: not an SBOM as ``make_sbom`` writes it.
    """
    python: dict[str, str] = {}
    debian: dict[str, str] = {}
    tables = {"pkg:pypi/": python, "pkg:deb/debian/": debian}
    with _valid():
        if (document["bomFormat"], document["specVersion"]) != ("CycloneDX", "1.6"):
            raise ValueError("it is not CycloneDX 1.6")
        for row in document["components"]:
            name, version, purl = str(row["name"]), row.get("version"), str(row.get("purl", ""))
            table = next((t for start, t in tables.items() if purl.startswith(start)), None)
            if table is None:
                continue
            if name in table:
                raise ValueError(f"{name} is listed twice")
            table[name] = str(version)
    return python, debian


def diff(old: Document, new: Document) -> list[str]:
    """What was added, removed or changed, a sentence each: packages, their parts, patches."""
    with _valid():
        return _compare(_tables(old), _tables(new))


def compare_contents(document: Document, layers: Sequence[LayerBlob]) -> list[str]:
    """Differences between an SBOM and the bytes of an image, none if it is right.

    Unpacks all layers, lowest first, which takes about a minute for a full image.
    """
    python, debian = packages_of(document)
    vendored: dict[str, str] = {}
    sboms: dict[str, str] = {}
    for row, nested in components_of(document):
        for item in row.get("properties", ()):
            if item["name"] == VENDORED:
                vendored[item["value"]] = f"{row['name']} {row['version']}"
            elif item["name"] == EMBEDDED and not nested:
                path, _, digest = item["value"].rpartition(" ")
                sboms[path] = digest
    return _compare((python, debian, vendored, sboms), image_contents(layers))


def _compare(old: Tables, new: Tables) -> list[str]:
    pairs = zip(old, new, strict=True)
    return [row for a, b in pairs if a != b for row in differences(a, b)]


def _tables(document: Document) -> Tables:
    """Own packages, parts of packages, and patches: name -> version and hash."""
    packages_of(document)
    own: dict[str, str] = {}
    parts: dict[str, set[str]] = {}
    patches = {}
    for row, inside in components_of(document):
        digest = next((item["content"] for item in row.get("hashes", ())), "")
        if inside:
            parts.setdefault(f"{row['name']} in {inside}", set()).add(str(row.get("version", "")))
        elif row.get("purl"):
            own[row["name"]] = f"{row['version']} {digest}".strip()
        for patch in row.get("pedigree", {}).get("patches", ()):
            content = base64.b64decode(patch["diff"]["text"]["content"])
            patches[f"patch {patch['diff']['url']}"] = hashlib.sha256(content).hexdigest()
    return own, {name: " ".join(sorted(versions)) for name, versions in parts.items()}, patches


def components_of(document: Document) -> Iterator[tuple[Document, str]]:
    """Each component with the name of the one that it is nested in, empty for own ones."""
    for row in document["components"]:
        yield row, ""
        for nested in row.get("components", ()):
            yield nested, row["name"]


def find(document: Document, export: Path) -> tuple[list[Vulnerability], list[str]]:
    """Vulnerabilities of an SBOM, and what was not checked; OsvError: not an export of PyPI."""
    packages: dict[str, set[str]] = {}
    others: Counter[str] = Counter()
    with _valid():
        for component, _ in components_of(document):
            if "purl" in component:
                purl = PackageURL.from_string(component["purl"])
                if purl.type == PURL_TYPE:
                    packages.setdefault(canonicalize_name(purl.name), set()).add(purl.version or "")
                else:
                    others[purl.type] += 1
    known, empty = set(), True
    try:
        for name, row, record in _affected_rows(export):
            empty = False
            versions = packages.get(canonicalize_name(name), ())
            if affected := [version for version in versions if _is_affected(version, row)]:
                events = [event for item in row.get("ranges", ()) for event in item["events"]]
                fixed = tuple(str(event["fixed"]) for event in events if "fixed" in event)
                ids = (str(record["id"]), *map(str, record.get("aliases", ())))
                known |= {Vulnerability(name, version, ids, fixed) for version in affected}
        if empty:
            raise ValueError(f"no record is about {ECOSYSTEM}")
    except UNREADABLE as error:
        what = f"not an export of OSV for {ECOSYSTEM}: {printable(str(error))}"
        remedy = f"download {ECOSYSTEM}/all.zip again"
        raise OsvError(what, where=export, remedy=remedy) from None
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
